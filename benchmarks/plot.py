"""Plots of the ratio to teacher-only vLLM, from results of benchmarks/sampling.py and benchmarks/speculation.py.

    python benchmarks/plot.py SAMPLING.json [MORE.json ...] [--output sampling.svg]
    python benchmarks/plot.py SPECULATION.json [--output drafts.svg]

Of sampling: against batch size. Each pair and machine gets one panel; several results of the same pair and machine are merged.
Of speculation: against the number of drafts, with the line of Theorem 21 for each acceptance; one panel per batch size.
Writes SVG and PNG.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python adds only benchmarks/ to the path of a script

from benchmarks.summary import SYSTEMS, Result, merge, summarise
from osd.engine.speculation import expected_tokens

# Okabe and Ito's colours: distinguishable with colour blindness and in print.
STYLES = {
    "nested": ("#D55E00", "s"),
    "transformers": ("#E69F00", "^"),
    "paired": ("#0072B2", "o"),
    "sum": ("#777777", ""),
    "teacher": ("#000000", ""),
    "student": ("#009E73", "v"),
}
LABELS = SYSTEMS | {"sum": "both models, one after the other"}


def curves(result: Result) -> dict[str, list[tuple[int, float]]]:
    """Return (sequences, ratio to teacher-only) points of each system, and of teacher-only plus student-only."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in STYLES}
    shapes = [r for r in summarise(result)["ratios"] if r["statistic"] == "ms_per_step"]
    for row in shapes:
        over = dict(row["over_teacher"])
        if over.get("student"):
            over["sum"] = 1 + over["student"]
        for name, value in over.items():
            if value:
                found[name].append((row["batch_size"], value))
    return {name: points for name, points in found.items() if points}


def group(results: list[Result]) -> list[Result]:
    """Merge the results of each pair and machine."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["pair"], result["hardware"]["device"]), []).append(result)
    return [merge(found) for found in groups.values()]


def draw(axes: Any, result: Result) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    lines = curves(result)
    for name, points in lines.items():
        colour, marker = STYLES[name]
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=2.2 if name == "paired" else 1.4,
            linestyle="--" if name in ("sum", "teacher") else "-",
            label=LABELS[name],
            zorder=3 if name == "paired" else 2,
        )
        if name == "paired":
            for x, y in points:
                axes.annotate(f"{y:.2f}×", (x, y), (0, -13), textcoords="offset points", ha="center", fontsize=8, color=colour)
    sizes = sorted({x for points in lines.values() for x, _ in points})
    axes.set(
        xscale="log", yscale="log", xlabel="sequences in the batch", title=f"{result['pair']}, {result['hardware']['device']}"
    )
    axes.xaxis.set_major_locator(NullLocator())
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]]
    axes.set_yticks(ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)


@contextmanager
def panels(count: int, output: Path) -> Iterator[Any]:
    """Give `count` axes side by side; write them with one legend to ``output`` as SVG and PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 9, "axes.titlesize": 10, "svg.hashsalt": "osd", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(1, count, figsize=(4.6 * count + 0.6, 3.8), squeeze=False, layout="constrained")
        yield axes[0]
        handles = {label: handle for panel in axes[0] for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        for path in written(output):
            figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def written(output: Path) -> list[Path]:
    return [output.with_suffix(suffix) for suffix in (".svg", ".png")]


def plot(results: list[Result], output: Path) -> list[Path]:
    """Draw sampling against batch size and write it to ``output`` as SVG and PNG. Raises ImportError without matplotlib."""
    drawn = [result for result in group(results) if curves(result)]
    if not drawn:
        raise ValueError("nothing to draw: no result has teacher-only and another system at the same batch size")
    with panels(len(drawn), output) as axes:
        for panel, result in zip(axes, drawn, strict=True):
            draw(panel, result)
        axes[0].set_ylabel("time per step / teacher-only vLLM")
    return written(output)


# -- drafts --------------------------------------------------------------------------------------------------------------

RATES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def is_speculation(result: Result) -> bool:
    return any("acceptance" in row for system in result["systems"].values() for row in system["rows"])


def over_teacher(result: Result) -> dict[int, dict[float | None, list[tuple[int, float]]]]:
    """Return (drafts, time per token / teacher-only) points by batch size and acceptance; None: without drafts."""
    alone = times_alone(result, "teacher")
    found: dict[int, dict[float | None, list[tuple[int, float]]]] = {batch: {} for batch in sorted(alone)}
    for name, system in result["systems"].items():
        for row in system["rows"] if name.isdecimal() else ():
            if row["ms_per_step"] and row["batch_size"] in alone:
                point = (int(name), row["ms_per_step"] / alone[row["batch_size"]])
                found[row["batch_size"]].setdefault(row["acceptance"], []).append(point)
    return found


def times_alone(result: Result, system: str) -> dict[int, float]:
    return {row["batch_size"]: row["ms_per_step"] for row in result["systems"][system]["rows"] if row["ms_per_step"]}


def break_even_line(cost: float, acceptance: float, most: int) -> list[tuple[int, float]]:
    """Return (k, T(k)) of Theorem 21 for k up to ``most``; ``cost`` is c, the student's step over the teacher's."""
    return [(k, (1 + (k + 1) * cost) / expected_tokens(acceptance, k)) for k in range(most + 1)]


def plot_drafts(result: Result, output: Path, most: int = 8) -> list[Path]:
    """Draw time per token against the number of drafts."""
    teacher, student = (times_alone(result, name) for name in ("teacher", "student"))
    points = over_teacher(result)
    with panels(len(points), output) as axes:
        for panel, (batch, by_rate) in zip(axes, points.items(), strict=True):
            cost = student[batch] / teacher[batch]
            rates = sorted(rate for rate in by_rate if rate is not None)
            for colour, rate in zip(RATES, rates, strict=False):
                line = break_even_line(cost, rate, most)
                panel.plot(
                    *zip(*line, strict=True), color=colour, linestyle="--", linewidth=1.2, label=f"theory, {rate:g} accepted"
                )
                panel.plot(*zip(*by_rate[rate], strict=True), color=colour, marker="o", label=f"measured, {rate:g} accepted")
            if without := by_rate.get(None):
                panel.plot(*zip(*without, strict=True), color="#000000", marker="s", linestyle="", label="measured, no drafts")
            panel.axhline(1, color="#777777", linewidth=0.8)
            title = f"{result['pair']}, {result['hardware']['device']}, {batch} sequences"
            panel.set(xlabel="drafts, k", title=title, ylim=(0, None), xticks=range(most + 1))
            panel.grid(axis="y", color="#dddddd", linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("time per token / teacher-only vLLM")
    return written(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="default: beside the first result")
    args = parser.parse_args()
    results, output = [json.loads(path.read_text()) for path in args.results], args.output or args.results[0]
    drafts = [result for result in results if is_speculation(result)]
    if drafts and len(results) > 1:
        parser.error("give one result of benchmarks/speculation.py alone")
    paths = plot_drafts(drafts[0], output) if drafts else plot(results, output)
    print("written to", *paths)


if __name__ == "__main__":
    main()
