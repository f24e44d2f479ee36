"""Tables and plots of the studies from their JSONs alone, and the results section of docs/evidence.md.

    python studies/quality/report.py             # prints the tables, writes the plots and docs/evidence.md
    python studies/quality/report.py --results FOLDER --page PAGE.md

Intervals are 95 %, Student's t over seeds. Differences are to the on-policy arm ("student"), paired by seed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # Python adds only this folder to a script's path

from osd.report.pages import write
from studies.quality.results import Result, check_comparable, check_distinct, frozen, load

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "evidence.md"
STUDIES = ("privileged", "capacity")
BEGIN, END = "<!-- begin results: python studies/quality/report.py -->", "<!-- end results -->"
BASELINE = "student"
NOTE = "note.md"  # what a reader must know of the runs on a machine; copied into the page
ORDER = (BASELINE, "linear 0.1", "linear 0.5", "fixed 0.5", "q*", "ess_balance", "q* annealed", "q* prefix", "teacher", "sft")
AXES = {"step": "optimizer steps", "tokens": "generated tokens", "seconds": "seconds of training"}
# One value per run; None where it is unknown.
MEASURES: dict[str, Callable[[Result, Result], float | None]] = {
    "final": lambda run, base: run["curve"][-1]["accuracy"],
    "area": lambda run, base: area(run),
    "tokens": lambda run, base: accuracy_at(run, "tokens", base["curve"][-1]["tokens"]),
    "seconds": lambda run, base: accuracy_at(run, "seconds", base["curve"][-1]["seconds"]),
    "kl": lambda run, base: run["curve"][-1]["kl_teacher"],
    "gap": lambda run, base: mean(run["steps"]["kl_q_student"]),
    "elsewhere": lambda run, base: run["elsewhere"]["after"] - run["elsewhere"]["before"],
    "cost": lambda run, base: run["curve"][-1]["seconds"] / base["curve"][-1]["seconds"],
}
GAINS = ("final", "area", "tokens", "seconds")  # measures whose difference to the on-policy arm is shown
HEADERS = (
    "sampled from",
    "seeds",
    "final accuracy, %",
    "− on-policy",
    "area under the curve, %",
    "− on-policy",
    "at its tokens",
    "at its seconds",
    "KL(student‖teacher)",
    "gap of sampled states",
    "loss elsewhere",
    "time",
)


# -- statistics --------------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % t interval; NaN from fewer than two values."""
    if len(values) < 2:
        return float(np.mean(values)) if len(values) else np.nan, np.nan
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def area(run: Result) -> float:
    """Return the mean accuracy over the steps of a run: the area under its learning curve, by trapezoids."""
    steps, accuracy = ([point[key] for point in run["curve"]] for key in ("step", "accuracy"))
    return float(np.trapezoid(accuracy, steps) / steps[-1])


def accuracy_at(run: Result, axis: str, value: float) -> float:
    """Return the accuracy when so many tokens or seconds were spent: on a line between measurements, or the last one."""
    return float(np.interp(value, [point[axis] for point in run["curve"]], [point["accuracy"] for point in run["curve"]]))


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def by_arm(runs: Iterable[Result]) -> dict[str, dict[int, Result]]:
    """Group runs by arm and seed, arms in the order of the tables."""
    found: dict[str, dict[int, Result]] = defaultdict(dict)
    for run in runs:
        found[run["run"]["arm"]][run["run"]["seed"]] = run
    return {arm: found[arm] for arm in ORDER if arm in found}


def figures(runs: Iterable[Result]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return mean and half width of every measure of every arm, and of its difference to the on-policy arm ("final_gain", ...).

    Only seeds that the on-policy arm has too are used.

    Raises:
        ValueError: no run of the on-policy arm.
    """
    arms = by_arm(runs)
    if BASELINE not in arms:
        raise ValueError(f"no run of the arm {BASELINE!r}, which all others are compared with")
    base, table = arms[BASELINE], {}
    for arm, of_seed in arms.items():
        seeds = sorted(set(of_seed) & set(base))
        values = {name: [measure(of_seed[s], base[s]) for s in seeds] for name, measure in MEASURES.items()}
        row = {name: interval([v for v in of if v is not None]) for name, of in values.items()}
        for name in GAINS:
            own = [MEASURES["final" if name != "area" else "area"](base[s], base[s]) for s in seeds]
            row[f"{name}_gain"] = interval([v - o for v, o in zip(values[name], own, strict=True)])  # type: ignore[operator]
        table[arm] = {"seeds": (len(seeds), np.nan), **row}
    return table


def best_rates(runs: Sequence[Result]) -> dict[str, float]:
    """Return the learning rate of every arm with the best final accuracy on validation rows."""
    scores: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        scores[run["run"]["arm"]][run["run"]["learning_rate"]].append(run["curve"][-1]["validation"])
    return {arm: max(sorted(rates), key=lambda rate: np.mean(rates[rate])) for arm, rates in scores.items()}


def rank_correlations(compared: Sequence[Result], runs: Sequence[Result]) -> list[dict[str, Any]]:
    """Compare what `osd compare` says of the arms before training with their results, per task and loss.

    Arms are ranked by their results minus the on-policy arm's, paired by seed. Of several comparisons of the same task and
    models the one with the most arms is used.

    Returns for each: task, loss, arms; of every name in `PREDICTIONS` a `Rank` with the area under the learning curve (`area`)
    and with the final accuracy (`final`); `seeds`, the rank correlation of the areas of two seeds, the mean over pairs;
    the verdict; and q*'s area minus the student's (`gain`).
    """
    found = []
    for (task, loss), group in grouped(runs).items():
        same = [before for before in compared if before["task"] == task and before.get("models") == group[0].get("models")]
        if not same or BASELINE not in by_arm(group):
            continue
        before = max(same, key=lambda result: len(result["arms"]))
        said = {row["arm"]: row for row in before["arms"]}
        table = {arm: of for arm, of in figures(group).items() if arm in said}
        gains = {name: [of[f"{name}_gain"][0] for of in table.values()] for name in ("area", "final")}
        predicted = {name: predict(said, before["quality"]) for name, predict in PREDICTIONS.items()}
        found.append(
            {
                "task": task,
                "loss": loss,
                "arms": len(table),
                **{
                    name: {of: spearman([worth[arm] for arm in table], gains[of]) for of in gains}
                    for name, worth in predicted.items()
                },
                "seeds": seeds_agree(group, set(table)),
                "verdict": before["verdict"]["worth_it"],
                "gain": table["q*"]["area_gain"][0] if "q*" in table else np.nan,
            }
        )
    return found


def margins(said: dict[str, Any], quality: str) -> dict[str, float]:
    """Return each arm's share of the teacher's lead minus its share of the teacher's distance."""
    student, teacher = said["student"], said["teacher"]
    lead, reach = teacher[quality] - student[quality], teacher["kl_theta"]
    return {
        arm: (row[quality] - student[quality]) / lead - row["kl_theta"] / reach if lead and reach else np.nan
        for arm, row in said.items()
    }


# From the rows of `osd compare` and its measure of quality to a number per arm.
PREDICTIONS: dict[str, Callable[[dict[str, Any], str], dict[str, float]]] = {
    "nearness": lambda said, quality: {arm: -row["kl_teacher"] for arm, row in said.items()},
    "log π_t": lambda said, quality: {arm: row["logp_teacher"] for arm, row in said.items()},
    "accuracy": lambda said, quality: {arm: row["accuracy"] for arm, row in said.items()},
    "margin": margins,
}


class Rank(NamedTuple):
    """Spearman's rank correlation, and the share of all orders of the arms that have at least this one."""

    correlation: float
    chance: float


def spearman(xs: Sequence[float], ys: Sequence[float]) -> Rank:
    """Correlate ranks, with an exact one-sided permutation test; NaN from fewer than three values, or if all are equal."""
    if len(xs) < 3 or len(set(xs)) < 2 or len(set(ys)) < 2 or not np.isfinite([*xs, *ys]).all():
        return Rank(np.nan, np.nan)
    ranks_x, ranks_y = (stats.rankdata(values) - (len(xs) + 1) / 2 for values in (xs, ys))
    scale = np.sqrt((ranks_x**2).sum() * (ranks_y**2).sum())
    every = np.array([ranks_x @ np.array(order) for order in permutations(ranks_y)]) / scale
    found = ranks_x @ ranks_y / scale
    return Rank(float(found), float((every >= found - 1e-9).mean()))


def seeds_agree(runs: Iterable[Result], arms: set[str]) -> float:
    """Return the mean rank correlation of the areas of two seeds, over the arms that both have: no prediction does better."""
    areas = {arm: {seed: area(run) for seed, run in of.items()} for arm, of in by_arm(runs).items() if arm in arms}
    seeds = sorted({seed for of in areas.values() for seed in of})
    found = []
    for one, other in combinations(seeds, 2):
        shared = [of for of in areas.values() if one in of and other in of]
        found.append(spearman([of[one] for of in shared], [of[other] for of in shared]).correlation)
    known = [value for value in found if not np.isnan(value)]
    return float(np.mean(known)) if known else np.nan


def grouped(runs: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """Group runs by task and loss."""
    found: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for run in runs:
        found[run["run"]["task"], run["run"]["loss"]].append(run)
    return dict(found)


# -- the text ----------------------------------------------------------------------------------------------------------------


def results_text(folder: Path, plots: Path) -> str:
    """Return the results section in Markdown; draws its plots into the folder `plots`."""
    machines = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    counts = {(study, m): len(load(m / study / "runs")) for m in machines for study in STUDIES if (m / study).is_dir()}
    there = [f"{study} on {machine.name} ({count} training runs)" for (study, machine), count in counts.items()]
    missing = [study for study in STUDIES if not any(count for (name, _), count in counts.items() if name == study)]
    head = f"Results exist of: {', '.join(there) or 'nothing'}. Studies without a training run: {', '.join(missing) or 'none'}."
    parts = [head, *(study_text(study, machine, plots) for study, machine in counts)]
    compared = {study: [result for m in machines for result in load(m / study / "compare")] for study in STUDIES}
    ranks = [
        {"machine": m.name, **rank} for study, m in counts for rank in rank_correlations(compared[study], main_only(m / study))
    ]
    return "\n\n".join([*parts, ranks_text(ranks)] if ranks else parts)


def study_text(study: str, machine: Path, plots: Path) -> str:
    """Return the section of one study on one kind of machine."""
    folder = machine / study
    checks, runs, tuning = (load(folder / name) for name in ("check", "runs", "tune"))
    check_distinct(runs)
    check_distinct(tuning)
    check_comparable(runs)
    note = machine / NOTE
    parts = [note.read_text(encoding="utf-8").strip()] if note.is_file() else []
    parts += [checks_text(checks)] if checks else []
    chosen = frozen(tuning)
    for (task, loss), group in grouped(runs).items():
        shown = main_runs(group, chosen.get((task, loss)))
        parts.append(f"### {task}, {loss} KL\n\n{conditions(shown)}\n\n{table_text(figures(shown))}")
        name = f"{machine.name}_{task}_{loss}.png"
        write(plots / name, plot(shown))
        parts.append(f"![accuracy of every arm against steps, tokens and seconds]({plots.name}/{name})")
        if len({run["run"]["learning_rate"] for run in group}) > 1:
            best = best_rates(group)
            own = [run for run in group if run["run"]["learning_rate"] == best[run["run"]["arm"]]]
            rates = ", ".join(f"{arm} {rate:g}" for arm, rate in best.items())
            parts.append(f"Each arm at its own best learning rate ({rates}):\n\n{table_text(figures(own))}")
    return "\n\n".join([f"## Results: {study}, {machine.name}", *parts])


def main_only(folder: Path) -> list[Result]:
    """Return the runs of a study at the learning rate and length of its main table."""
    chosen = frozen(load(folder / "tune"))
    return [run for key, group in grouped(load(folder / "runs")).items() for run in main_runs(group, chosen.get(key))]


def main_runs(group: list[Result], chosen: dict[str, Any] | None) -> list[Result]:
    """Return the runs at the frozen learning rate and length, or at the only ones there are."""
    rates = {(run["run"]["learning_rate"], run["run"]["steps"]) for run in group}
    if chosen is None and len(rates) > 1:
        raise ValueError(f"several learning rates or lengths {sorted(rates)}, and no tuning runs to choose between them")
    rate, steps = (chosen["learning_rate"], chosen["steps"]) if chosen else next(iter(rates))
    return [run for run in group if (run["run"]["learning_rate"], run["run"]["steps"]) == (rate, steps)]


def conditions(runs: list[Result]) -> str:
    """Return a line on the settings and the machine of some runs."""
    run, first = runs[0]["run"], runs[0]
    devices = sorted({f"{r['hardware']['device']} ({r['hardware']['processes']} at a time)" for r in runs})
    cross = [sum(r["cross_check"][key] for r in runs) for key in ("rows", "transformers", "engine")]
    return (
        f"{run['steps']} steps of {run['batch']} completions, learning rate {run['learning_rate']:g}, "
        f"{first['data']['held_out']['rows']} held-out rows, {len(runs)} runs, on {', '.join(devices)}. Of {cross[0]} held-out "
        f"rows that transformers completed too, {cross[1]} were right there and {cross[2]} in the engine."
    )


def table_text(table: dict[str, dict[str, tuple[float, float]]]) -> str:
    rows = [HEADERS, ("---",) * len(HEADERS)]
    for arm, of in table.items():
        gains = ["" if arm == BASELINE else shown(of[f"{name}_gain"], 100, "+") for name in GAINS]
        rows.append(
            (
                arm.replace("*", "\\*"),
                f"{of['seeds'][0]:.0f}",
                shown(of["final"], 100),
                gains[0],
                shown(of["area"], 100),
                *gains[1:],
                shown(of["kl"], digits=3),
                shown(of["gap"], digits=3),
                shown(of["elsewhere"], sign="+", digits=3),
                f"{of['cost'][0]:.2f} ×",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def shown(value: tuple[float, float], factor: float = 1.0, sign: str = "", digits: int = 1) -> str:
    """Format a mean and its half width; only the mean if there is no interval."""
    middle, half = (part * factor for part in value)
    if np.isnan(middle):
        return "–"
    text = f"{middle:{sign}.{digits}f}"
    return text if np.isnan(half) else f"{text} ± {half:.{digits}f}"


def checks_text(checks: list[Result]) -> str:
    lines = ["| task | student right | teacher right | rows |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {check['task']} | {check['student']['right']} | {check['teacher']['right']} | {check['rows']} |" for check in checks
    ]
    return "Before training, greedy, on validation rows:\n\n" + "\n".join(lines)


def ranks_text(ranks: list[dict[str, Any]]) -> str:
    """Return the table of rank correlations with the area under the curve, and of one with the final accuracy."""
    header = ["machine", "task", "loss", "arms", *PREDICTIONS, "nearness, final", "two seeds", "verdict", "q\\* − student"]
    rows = [header, ["---"] * len(header)]
    for rank in ranks:
        cells = [*(rank[name]["area"] for name in PREDICTIONS), rank["nearness"]["final"]]
        found = ["–" if np.isnan(cell.correlation) else f"{cell.correlation:.2f} ({cell.chance:.2f})" for cell in cells]
        ends = [shown((rank["seeds"], np.nan), digits=2), rank["verdict"], shown((rank["gain"], np.nan), 100, "+")]
        rows.append([rank["machine"], rank["task"], rank["loss"], str(rank["arms"]), *found, *ends])
    return "## `osd compare` beforehand\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


# -- the plot ----------------------------------------------------------------------------------------------------------------


def plot(runs: Sequence[Result]) -> bytes:
    """Draw the mean accuracy of every arm against steps, tokens and seconds, as a PNG."""
    import io

    from osd.report.charts import plt

    panels, axes = plt.subplots(1, len(AXES), figsize=(12, 3.8), layout="constrained", sharey=True)
    for panel, (axis, label) in zip(axes, AXES.items(), strict=True):
        for number, (arm, of_seed) in enumerate(by_arm(runs).items()):
            curves = [run["curve"] for run in of_seed.values()]
            xs, ys = (np.mean([[point[key] for point in curve] for curve in curves], axis=0) for key in (axis, "accuracy"))
            style = {"linewidth": 2.4} if arm in (BASELINE, "q*") else {"linewidth": 1.2}
            panel.plot(
                xs, 100 * ys, color=plt.colormaps["tab10"](ORDER.index(arm) % 10), label=arm, zorder=10 - number, **style
            )
        panel.set_xlabel(label)
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out rows right, %")
    axes[-1].legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    panels.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(panels)
    return buffer.getvalue()


# -- the page ----------------------------------------------------------------------------------------------------------------


def with_results(page: str, text: str) -> str:
    """Return the page with its results section replaced.

    Raises:
        ValueError: a page without the two marks.
    """
    found = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{text}\n\n{END}", page, flags=re.DOTALL)
    if found[1] != 1:
        raise ValueError(f"the page must have {BEGIN!r} and {END!r} once")
    return found[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="the page to write; plots go to the folder of its name beside it"
    )
    flags = parser.parse_args(argv)
    text = results_text(flags.results, flags.page.with_suffix(""))
    write(flags.page, with_results(flags.page.read_text(encoding="utf-8"), text))
    print(text)


if __name__ == "__main__":
    main()
