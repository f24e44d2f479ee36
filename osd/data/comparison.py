"""`osd compare`: sample student, teacher, linear mixtures and q* on the same prompts, and report quality and distance.

One engine draws all arms with the same seeds. Its record scores them: every token comes with log π_θ and log π_t, whatever
it was drawn from. `osd.data.verdict` has the scores and the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from osd.data import grading
from osd.data.generate import NothingUsable, batches, describe, read_rows
from osd.data.pair import Pair
from osd.data.progress import SampleBar
from osd.data.requests import Request, RequestBuilder
from osd.data.samples import SCHEMA, Sample, sample_of
from osd.data.settings import CompareConfig
from osd.data.strict_json import finite, json_text
from osd.data.verdict import Marks, linear_at_same_distance, on_line, score, scoring, sentence, what_would_change
from osd.report.charts import FOURTH, INK, STUDENT, TEACHER, THIRD, png, svg
from osd.report.pages import check_writable, render, write

if TYPE_CHECKING:
    from osd.core import MixingConfig

PROMPTS = 100  # unless there is a limit
EXAMPLES = 8
MARKS = {None: "", True: "✓", False: "✗"}


class StartPair(Protocol):
    """Factory of the pair: `osd.data.pair.EnginePair`."""

    def __call__(self, settings: CompareConfig) -> AbstractContextManager[Pair]: ...


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to sample: with `alpha` for every token, with a mixing, or (neither) with the settings' own mixing, q*."""

    name: str
    alpha: float | None = None
    mixing: MixingConfig | None = None


def arms(settings: CompareConfig) -> list[Arm]:
    """Return the arms to compare, ordered from student to teacher."""
    from osd.core import MixingConfig

    linear = [
        Arm(name=f"linear {weight:g}", mixing=MixingConfig(mixture="linear", alpha_method="fixed", fixed_alpha=weight))
        for weight in sorted(settings.linear_weights)
    ]
    return [Arm(name="student", alpha=0.0), *linear, Arm(name="q*"), Arm(name="teacher", alpha=1.0)]


def compare(settings: CompareConfig, start_pair: StartPair, further: Sequence[Arm] = ()) -> dict[str, Any]:
    """Sample, score, and write compare.json, compare.html, compare.png and the completions of every arm; returns the JSON.

    Args:
        settings: of the command.
        start_pair: makes the pair.
        further: more arms for the table; the verdict does not depend on them.

    Raises:
        ValueError: settings that do not fit the input; before any model loads.
        NothingUsable: no row could be sampled.
    """
    check_writable(Path(settings.output or "") / "compare.html")
    rows = read_rows(settings, limit=settings.limit or PROMPTS)
    if not rows.columns:
        raise NothingUsable(f"all {len(rows.rows)} rows were rejected (the first: {rows.rows[0].error})")
    builder = RequestBuilder(settings, rows.columns)
    run = describe(settings, rows, 1)
    compared = [*arms(settings), *further]
    with start_pair(settings) as pair:
        builder.use_tokenizers(pair.teacher_tokenizer, pair.student_tokenizer)
        requests, rejected = _requests(settings, builder, rows.rows, pair)
        if not requests:
            raise NothingUsable(f"all {len(rejected)} rows were rejected (the first: {rejected[0]['reason']})")
        drawn = _draw(settings, compared, requests, pair, run["config_hash"])
    folder = Path(settings.output or "")
    _write_completions(folder, drawn)  # before grading, which may call the user's own function
    marks = _marks(drawn, grading.matcher(settings.answer_match))
    result = {**_scores(drawn, marks), "rejected": rejected, **run}
    _write_report(folder, result, drawn, marks)
    return result


def _requests(
    settings: CompareConfig, builder: RequestBuilder, rows: Sequence[Any], pair: Pair
) -> tuple[list[Request], list[dict[str, Any]]]:
    requests: list[Request] = []
    rejected: list[dict[str, Any]] = []
    for row in rows:
        try:
            built = [builder.build(row, sample) for sample in range(settings.num_samples)]
        except ValueError as error:
            refusal: str | None = str(error)
        else:
            refusals = (pair.refusal(request, settings.sampling()) for request in built)
            refusal = next((refusal for refusal in refusals if refusal is not None), None)
        if refusal is None:
            requests += built
        else:
            rejected.append({"id": row.id, "row": row.number, "reason": refusal})
    return requests, rejected


def _draw(
    settings: CompareConfig, compared: Sequence[Arm], requests: Sequence[Request], pair: Pair, config_hash: str
) -> dict[str, list[Sample]]:
    """Draw the samples of every arm. A request that failed in one arm is left out of all, to keep them comparable."""
    models = {"student_model": str(settings.model_name_or_path), "teacher_model": str(settings.teacher_model_name_or_path)}
    drawn: dict[str, list[Sample | None]] = {}
    with SampleBar(len(compared) * len(requests), quiet=settings.quiet) as bar:
        for arm in compared:
            drawn[arm.name] = []

            def finished(_: int, name: str = arm.name) -> None:
                if not bar.n:
                    bar.begin()
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


def _scores(drawn: dict[str, list[Sample]], marks: dict[str, Marks] | None = None) -> dict[str, Any]:
    """Score all arms; without `marks`, grade by final answers."""
    return score(drawn, marks or _marks(drawn, grading.matches))


def _marks(drawn: dict[str, list[Sample]], matcher: grading.Matcher) -> dict[str, Marks]:
    """Grade every sample: right, wrong, or None without a reference answer."""
    return {
        name: [None if (answer := sample["answer"]) is None else matcher(sample["completion"], answer) for sample in samples]
        for name, samples in drawn.items()
    }


def _write_completions(folder: Path, drawn: dict[str, list[Sample]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, samples in drawn.items():
        part = folder / ".completions.part"
        pq.write_table(pa.Table.from_pylist(samples, schema=SCHEMA), part)
        part.replace(folder / f"completions-{file_name(name)}.parquet")


def _write_report(folder: Path, result: dict[str, Any], drawn: dict[str, list[Sample]], marks: dict[str, Marks]) -> None:
    write(folder / "compare.png", png(partial(_trade_off, result=result, quality=result["quality"])))
    write(folder / "compare.html", _page(result, drawn, marks))
    write(folder / "compare.json", json_text(finite(result)))


def file_name(arm: str) -> str:
    """Return an arm's name as part of a file name: q-star, linear-0.5, ..."""
    return arm.replace("*", "-star").replace(" ", "-")


def _page(result: dict[str, Any], drawn: dict[str, list[Sample]], marks: dict[str, Marks]) -> str:
    headline, reasons = sentence(result)
    first = next(iter(drawn.values()))
    examples = [
        {
            "prompts": [("student", first[i]["student_prompt"]), ("teacher", first[i]["teacher_prompt"])],
            "answer": first[i]["answer"],
            "arms": [(name, samples[i]["completion"], MARKS[marks[name][i]]) for name, samples in drawn.items()],
        }
        for i in _first_of_each(first)
    ]
    return render(
        "compare.html.j2",
        r=result,
        headline=headline,
        reasons=reasons,
        changes=what_would_change(result),
        scoring=scoring(result),
        line=linear_at_same_distance(result),
        perplexity=lambda logp: math.exp(-logp),
        plots=[
            (title, svg(partial(_trade_off, result=result, quality=quality), width=4.8, height=3.6))
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


def _qualities(result: dict[str, Any]) -> list[tuple[str, str]]:
    both = [("accuracy", "Accuracy"), ("logp_teacher", "Log-probability under the teacher: mean log π_t per token")]
    return both if result["quality"] == "accuracy" else both[1:]


def _label(arm: str, result: dict[str, Any]) -> str | None:
    """Return an arm's label in the legend. The first linear mixture has the label of them all, the others None."""
    linear = [row["arm"] for row in result["arms"] if row["arm"].startswith("linear ")]
    return arm if arm not in linear else "linear mixtures" if arm == linear[0] else None


def _trade_off(axes: Any, *, result: dict[str, Any], quality: str) -> None:
    shown = {row["arm"]: row for row in result["arms"]}
    line = sorted((row for name, row in shown.items() if on_line(name)), key=lambda row: row["kl_theta"])
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
