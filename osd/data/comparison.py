"""`osd compare`: student, teacher, linear mixtures and q* on the same prompts; what each is worth, and how far it goes.

One engine draws all arms with the same seeds, and its own record scores them: every token comes with log π_θ and log π_t,
whatever it was drawn from. Quality is accuracy where there are answers, else the teacher's mean log-probability; distance is
the mean KL(arm ‖ student) per token, exact at every state. Intervals are bootstraps over prompts, 95 %.

A arms, P prompts, B bootstrap resamples.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from osd.data import grading
from osd.data.generate import NothingUsable, batches, describe, read_rows
from osd.data.pair import Pair
from osd.data.requests import Request, RequestBuilder
from osd.data.samples import SCHEMA, Sample, sample_of
from osd.data.settings import CompareConfig
from osd.data.writer import finite, json_text
from osd.report.charts import FOURTH, INK, STUDENT, TEACHER, THIRD, png, svg
from osd.report.pages import render, write

if TYPE_CHECKING:
    from osd.core import MixingConfig

PROMPTS = 100  # unless there is a limit
RESAMPLES = 2000
EXAMPLES = 8
SUMS = ("tokens", "logp_theta", "logp_teacher", "kl_theta", "kl_teacher", "alpha", "finished", "correct", "scored", "samples")


class StartPair(Protocol):
    """Makes the pair: `osd.data.pair.EnginePair`."""

    def __call__(self, settings: CompareConfig) -> AbstractContextManager[Pair]: ...


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to sample: `alpha` for every token, or a mixing; neither is the settings' own, q*."""

    name: str
    alpha: float | None = None
    mixing: MixingConfig | None = None


def arms(settings: CompareConfig) -> list[Arm]:
    """What is compared, from the student's end to the teacher's."""
    from osd.core import MixingConfig

    linear = [
        Arm(name=f"linear {weight:g}", mixing=MixingConfig(mixture="linear", alpha_method="fixed", fixed_alpha=weight))
        for weight in sorted(settings.linear_weights)
    ]
    return [Arm(name="student", alpha=0.0), *linear, Arm(name="q*"), Arm(name="teacher", alpha=1.0)]


def compare(settings: CompareConfig, start_pair: StartPair) -> dict[str, Any]:
    """Sample, score, and write compare.json, compare.html, compare.png and the completions of every arm; returns the JSON.

    Raises:
        ValueError: settings that do not fit the input; before any model loads.
        NothingUsable: no row could be sampled.
    """
    rows = read_rows(settings, limit=settings.limit or PROMPTS)
    if not rows.columns:
        raise NothingUsable(f"all {len(rows.rows)} rows were rejected (the first: {rows.rows[0].error})")
    builder = RequestBuilder(settings, rows.columns)
    run = describe(settings, rows, 1)
    compared = arms(settings)
    with start_pair(settings) as pair:
        builder.use_tokenizers(pair.teacher_tokenizer, pair.student_tokenizer)
        requests, rejected = _requests(settings, builder, rows.rows, pair)
        if not requests:
            raise NothingUsable(f"all {len(rejected)} rows were rejected (the first: {rejected[0]['reason']})")
        drawn = _draw(settings, compared, requests, pair, run["config_hash"])
    result = {**_scores(drawn), "rejected": rejected, **run}
    _write(Path(settings.output or ""), result, drawn)
    return result


def _requests(
    settings: CompareConfig, builder: RequestBuilder, rows: Sequence[Any], pair: Pair
) -> tuple[list[Request], list[dict[str, Any]]]:
    requests, rejected = [], []
    for row in rows:
        try:
            built = [builder.build(row, sample) for sample in range(settings.num_samples)]
            refusals = (pair.refusal(request, settings.sampling()) for request in built)
            refusal = next((refusal for refusal in refusals if refusal is not None), None)
        except ValueError as error:
            refusal = str(error)
        if refusal is None:
            requests += built
        else:
            rejected.append({"id": row.id, "row": row.number, "reason": refusal})
    return requests, rejected


def _draw(
    settings: CompareConfig, compared: Sequence[Arm], requests: Sequence[Request], pair: Pair, config_hash: str
) -> dict[str, list[Sample]]:
    """The samples of every arm. A request that failed in one arm is left out of all, so that they stay comparable."""
    models = {"student_model": str(settings.model_name_or_path), "teacher_model": str(settings.teacher_model_name_or_path)}
    drawn: dict[str, list[Sample | None]] = {}
    with tqdm(
        total=len(compared) * len(requests),
        unit="sample",
        file=sys.stderr,
        desc="loading the models",
        mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file needs no animation
    ) as bar:
        for arm in compared:
            drawn[arm.name] = []

            def finished(_: int, name: str = arm.name) -> None:
                bar.set_description_str(name, refresh=False)
                bar.update()

            for batch in batches(requests, settings.batch_size):
                completions = pair.sample(batch, settings.sampling(), alpha=arm.alpha, mixing=arm.mixing, on_finished=finished)
                drawn[arm.name] += [
                    None
                    if done.error
                    else sample_of(asked, done, pair.teacher_tokenizer, {**models, "config_hash": config_hash})
                    for asked, done in zip(batch, completions, strict=True)
                ]
    whole = [i for i in range(len(requests)) if all(samples[i] is not None for samples in drawn.values())]
    if not whole:
        raise NothingUsable("every completion ended in an error")
    return {name: [sample for i in whole if (sample := samples[i]) is not None] for name, samples in drawn.items()}


# -- scores -------------------------------------------------------------------------------------------------------------


def _scores(drawn: dict[str, list[Sample]]) -> dict[str, Any]:
    """The table, and the verdict."""
    sums_APS = np.stack([_sums(samples) for samples in drawn.values()])
    names, prompts = list(drawn), sums_APS.shape[1]
    by_accuracy = bool(sums_APS[..., SUMS.index("correct")].sum())  # all wrong tells nobody apart
    chosen = np.random.default_rng(0).integers(prompts, size=(RESAMPLES, prompts))
    estimates = _figures(sums_APS.sum(axis=1))
    resampled = [_figures(sums_APS[:, pick].sum(axis=1)) for pick in chosen]
    table = []
    for a, name in enumerate(names):
        row: dict[str, Any] = {"arm": name, **{key: float(values[a]) for key, values in estimates.items()}}
        for key in ("accuracy", "logp_teacher", "kl_theta"):
            row[f"{key}_interval"] = _interval([figures[key][a] for figures in resampled])
        table.append(row)
    quality = "accuracy" if by_accuracy else "logp_teacher"
    return {
        "prompts": prompts,
        "samples": len(next(iter(drawn.values()))),
        "quality": quality,
        "arms": table,
        "verdict": _verdict(names, estimates, resampled, quality),
    }


def _sums(samples: Sequence[Sample]) -> np.ndarray:
    """Sums over each prompt's samples, [P, len(SUMS)], prompts in their order."""
    by_prompt: dict[str, np.ndarray] = {}
    for sample in samples:
        sums = by_prompt.setdefault(sample["id"], np.zeros(len(SUMS)))
        scored = sample["answer"] is not None
        sums += [
            sample["num_tokens"],
            *(sum(sample[name]) for name in ("logp_theta", "logp_teacher", "kl_theta", "kl_teacher", "alpha")),
            sample["finish_reason"] == "stop",
            scored and grading.matches(sample["completion"], sample["answer"]),
            scored,
            1,
        ]
    return np.stack(list(by_prompt.values()))


def _figures(sums_AS: np.ndarray) -> dict[str, np.ndarray]:
    """What the table says of every arm, [A] each; per-token means weigh every token alike."""
    sums = dict(zip(SUMS, sums_AS.T, strict=True))
    means = {name: sums[name] / sums["tokens"] for name in ("logp_theta", "logp_teacher", "kl_theta", "kl_teacher", "alpha")}
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = sums["correct"] / sums["scored"]
    return {
        **means,
        "perplexity_student": np.exp(-means["logp_theta"]),
        "perplexity_teacher": np.exp(-means["logp_teacher"]),
        "accuracy": accuracy,
        "length": sums["tokens"] / sums["samples"],
        "finished": sums["finished"] / sums["samples"],
    }


def _verdict(
    names: list[str], estimates: dict[str, np.ndarray], resampled: Sequence[dict[str, np.ndarray]], quality: str
) -> Any:
    """How much of the teacher's advantage q* has, at which share of its distance, and whether a linear mixture does better."""
    at = {name: i for i, name in enumerate(names)}
    line = [i for name, i in at.items() if name != "q*"]

    def shares(figures: dict[str, np.ndarray]) -> tuple[float, float, float, float]:
        worth, far = figures[quality], figures["kl_theta"]
        lead = worth[at["teacher"]] - worth[at["student"]]
        gain = (worth[at["q*"]] - worth[at["student"]]) / lead if lead else math.nan
        distance = far[at["q*"]] / far[at["teacher"]] if far[at["teacher"]] else math.nan
        order = sorted(line, key=lambda i: far[i])
        same_distance = np.interp(far[at["q*"]], far[order], worth[order])
        return float(lead), float(gain), float(distance), float(worth[at["q*"]] - same_distance)

    lead, gain, distance, over_linear = shares(estimates)
    samples = np.array([shares(figures) for figures in resampled])
    lead_interval, over_interval = _interval(samples[:, 0]), _interval(samples[:, 3])
    margin_interval = _interval(samples[:, 1] - samples[:, 2])
    return {
        "teacher_lead": lead,
        "teacher_lead_interval": lead_interval,
        "gain_share": gain,
        "distance_share": distance,
        "margin_interval": margin_interval,
        "over_linear": over_linear,
        "over_linear_interval": over_interval,
        "worth_it": _worth_it(lead_interval, margin_interval),
    }


def _worth_it(lead: list[float], margin: list[float]) -> str:
    if not lead[0] > 0:
        return "no lead"
    return "yes" if margin[0] > 0 else "no" if margin[1] < 0 else "undecided"


def _interval(values: Any) -> list[float]:
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    return [float(np.quantile(known, q)) for q in (0.025, 0.975)] if len(known) else [math.nan, math.nan]


def sentence(result: dict[str, Any]) -> tuple[str, str]:
    """The verdict in words: a headline, and what it rests on."""
    v, measure = result["verdict"], "accuracy" if result["quality"] == "accuracy" else "log π_t per token"
    lowest, highest = v["teacher_lead_interval"]
    lead = f"{v['teacher_lead']:+.3f} {measure} (95 %: {lowest:+.3f} to {highest:+.3f})"
    if v["worth_it"] == "no lead":
        return (
            "The teacher is not measurably better than the student here",
            f"Its lead is {lead} on {result['prompts']} prompts: there is nothing to gain, or too few prompts to see it.",
        )
    headline = {
        "yes": "Worth it: q* gains more than it goes away from the student",
        "no": "Not worth it: q* goes further from the student than it gains",
        "undecided": "Undecided: q* gains about as much as it goes away from the student",
    }[v["worth_it"]]
    more = "above" if v["over_linear"] >= 0 else "below"
    (low, high), (least, most) = v["over_linear_interval"], v["margin_interval"]
    return headline, (
        f"The teacher's lead is {lead}. q* has {v['gain_share']:.0%} of it at {v['distance_share']:.0%} of the teacher's "
        f"distance from the student (difference, 95 %: {least:+.0%} to {most:+.0%}). It is "
        f"{abs(v['over_linear']):.3f} {more} the line through student, linear mixtures and teacher at the same distance "
        f"(95 %: {low:+.3f} to {high:+.3f}). {result['prompts']} prompts."
    )


# -- files --------------------------------------------------------------------------------------------------------------


def _write(folder: Path, result: dict[str, Any], drawn: dict[str, list[Sample]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, samples in drawn.items():
        part = folder / ".completions.part"
        pq.write_table(pa.Table.from_pylist(samples, schema=SCHEMA), part)
        part.replace(folder / f"completions-{file_name(name)}.parquet")
    write(folder / "compare.png", png(partial(_trade_off, result=result, quality=result["quality"])))
    write(folder / "compare.html", _page(result, drawn))
    write(folder / "compare.json", json_text(finite(result)))


def file_name(arm: str) -> str:
    """An arm's name in a file name: q-star, linear-0.5, ..."""
    return arm.replace("*", "-star").replace(" ", "-")


def _page(result: dict[str, Any], drawn: dict[str, list[Sample]]) -> str:
    headline, reasons = sentence(result)
    first = next(iter(drawn.values()))
    examples = [
        {
            "prompt": first[i]["student_prompt"],
            "answer": first[i]["answer"],
            "arms": [(name, samples[i]["completion"], _mark(samples[i])) for name, samples in drawn.items()],
        }
        for i in _first_of_each(first)
    ]
    return render(
        "compare.html.j2",
        r=result,
        headline=headline,
        reasons=reasons,
        plots=[
            (title, svg(partial(_trade_off, result=result, quality=quality), width=5.4, height=4.0))
            for quality, title in _qualities(result)
        ],
        examples=examples,
    )


def _first_of_each(samples: Sequence[Sample]) -> Iterator[int]:
    seen: set[str] = set()
    for i, sample in enumerate(samples):
        if sample["id"] not in seen and len(seen) < EXAMPLES:
            seen.add(sample["id"])
            yield i


def _mark(sample: Sample) -> str:
    if sample["answer"] is None:
        return ""
    return "✓" if grading.matches(sample["completion"], sample["answer"]) else "✗"


def _qualities(result: dict[str, Any]) -> list[tuple[str, str]]:
    both = [("accuracy", "Accuracy"), ("logp_teacher", "What the teacher thinks of it: mean log π_t per token")]
    return both if result["quality"] == "accuracy" else both[1:]


def _label(arm: str, result: dict[str, Any]) -> str | None:
    """An arm's name in the legend; the linear mixtures have one entry together."""
    linear = [row["arm"] for row in result["arms"] if row["arm"].startswith("linear ")]
    return arm if arm not in linear else "linear mixtures" if arm == linear[0] else None


def _trade_off(axes: Any, *, result: dict[str, Any], quality: str) -> None:
    shown = {row["arm"]: row for row in result["arms"]}
    line = sorted((row for name, row in shown.items() if name != "q*"), key=lambda row: row["kl_theta"])
    xs, ys = ([row[key] for row in line] for key in ("kl_theta", quality))
    axes.plot(xs, ys, color=INK, alpha=0.35, linewidth=1.2, linestyle=(0, (4, 3)))
    for name, row in shown.items():
        colour = {"student": STUDENT, "teacher": TEACHER, "q*": FOURTH}.get(name, THIRD)
        x, y = row["kl_theta"], row[quality]
        low, high = row[f"{quality}_interval"]
        near, far = row["kl_theta_interval"]
        bars = {"yerr": [[max(y - low, 0)], [max(high - y, 0)]], "xerr": [[max(x - near, 0)], [max(far - x, 0)]]}
        marker = "*" if name == "q*" else "o"
        size = 15 if name == "q*" else 7
        axes.errorbar(
            x, y, **bars, color=colour, marker=marker, markersize=size, elinewidth=1, capsize=0, label=_label(name, result)
        )
        if name.startswith("linear "):
            axes.annotate(name.split()[1], (x, y), xytext=(7, -13), textcoords="offset points", fontsize=8.5, color=colour)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=9.5, handletextpad=0.3, columnspacing=1.2)
    axes.margins(x=0.1, y=0.12)
    axes.set_xlabel("distance: mean KL(arm ‖ student) per token, nats")
    axes.set_ylabel("accuracy" if quality == "accuracy" else "mean log π_t per token, nats")
