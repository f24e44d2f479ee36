"""`osd inspect`: write one HTML page about a file or folder of data. Its size is bounded for data of any size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from osd.data import grading
from osd.data.findings import headline, statistics_in_words
from osd.data.statistics import EARLY, NATS, PLACES, UNIT, Tally, TokenSums, data_files, tally
from osd.data.writer import RUN, SUMMARY
from osd.report.charts import FOURTH, INK, STUDENT, TEACHER, THIRD, svg
from osd.report.pages import check_writable, render, script_json, write

SHOWN_TOKENS = 60_000  # in all completions on the page: about 2 MB
CUT = 2_000  # tokens of one completion
PROMPT_CUT = 6_000  # characters of a prompt
EXTREMES, WORDS = 15, 15


def inspect(path: Path, output: Path | None = None, *, shown: int = 200, answer_match: str | None = None) -> Path:
    """Write the page of a data set and return its path.

    Args:
        path: a Parquet or JSONL file, or an output folder of `osd generate`.
        output: the page. Default: inspect.html in the folder, or beside the file with its name.
        shown: largest number of completions on the page; fewer if they are long.
        answer_match: when a completion is right. Default: as the run was told (run.json beside the data), else "final".

    Raises:
        ValueError: no data, data that `osd generate` did not write, an unknown `answer_match`, a page that cannot be written.
    """
    files = data_files(path)
    page = output or (path / "inspect.html" if path.is_dir() else path.with_suffix(".html"))
    check_writable(page)
    matcher = grading.matcher(answer_match or _answer_match((path if path.is_dir() else path.parent) / RUN))
    result = tally(files, shown=shown, extremes=EXTREMES, matcher=matcher)
    if not result.tokens:
        raise ValueError(f"{str(path)!r} has no tokens to show")
    write(page, page_of(result, path.resolve().name, _became(path / SUMMARY)))
    return page


def _answer_match(run: Path) -> str:
    """Return the `answer_match` of the run that wrote the data."""
    try:
        return str(json.loads(run.read_text(encoding="utf-8"))["settings"]["answer_match"])
    except (OSError, ValueError, KeyError, TypeError):
        return "final"


def _became(summary: Path) -> str | None:
    """Describe what happened to the samples of a finished run; None without a summary beside the data."""
    if not summary.is_file():
        return None
    counts = json.loads(summary.read_text(encoding="utf-8"))
    removed = [f"{count:,} removed by {name}" for name, count in counts["removed"].items()]
    rejected = [f"{counts['rejected']:,} rejected before sampling"] if counts["rejected"] else []
    return ", ".join([f"{counts['drawn']:,} drawn", f"{counts['kept']:,} kept", *removed, *rejected])


def page_of(result: Tally, name: str, became: str | None = None) -> str:
    """Render the page of a tally. `became` describes what happened to the samples of the run."""
    samples = _within_budget(result.shown)
    vocabulary: dict[str, int] = {}
    data = {"samples": [_compact(sample, vocabulary) for sample in samples], "vocab": list(vocabulary)}
    least = max(3, math.ceil(result.tokens / 20_000))
    return render(
        "inspect.html.j2",
        name=name,
        became=became,
        t=result,
        headline=headline(result),
        statistics=statistics_in_words(result),
        plots=_plots(result),
        data=script_json(data),
        shown=len(samples),
        cut=CUT if any(len(sample["tokens"]) > CUT for sample in samples) else None,
        extremes=[
            ("Tokens that the teacher gave far more probability than the student", _by_score(result.teacher_side), "t"),
            ("Tokens that the student gave far more probability than the teacher", _by_score(result.student_side), "s"),
        ],
        least=least,
        words=_words(result.by_token, least),
    )


def _within_budget(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    tokens = 0
    for sample in samples:
        tokens += min(len(sample["tokens"]), CUT)
        if kept and tokens > SHOWN_TOKENS:
            break
        kept.append(sample)
    return kept


def _compact(sample: dict[str, Any], vocabulary: dict[str, int]) -> dict[str, Any]:
    """Compact a completion for the page's script: short keys, few digits, every token text once in `vocabulary`."""
    theta, teacher = sample["logp_theta"][:CUT], sample["logp_teacher"][:CUT]
    gaps = [None if a is None or b is None else a - b for a, b in zip(teacher, theta, strict=True)]
    return {
        "id": sample["id"],
        "s": sample.get("sample") or 0,
        "f": sample.get("finish_reason") or "?",
        "n": len(sample["tokens"]),
        "ma": _rounded(_mean(sample["alpha"])),
        "mk": _rounded(_mean(sample["kl_theta"])),
        "answer": sample.get("answer"),
        "ok": sample.get("right"),
        "sp": _cut(sample.get("student_prompt")),
        "tp": _cut(sample.get("teacher_prompt")),
        "t": [vocabulary.setdefault(text, len(vocabulary)) for text in sample["tokens"][:CUT]],
        "a": [_rounded(value) for value in sample["alpha"][:CUT]],
        "k": [_rounded(value) for value in sample["kl_theta"][:CUT]],
        "g": [_rounded(value, 2) for value in gaps],
        "lp": [_rounded(value) for value in theta],
        "lt": [_rounded(value) for value in teacher],
    }


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= PROMPT_CUT else f"{text[:PROMPT_CUT]} … ({len(text) - PROMPT_CUT:,} more characters)"


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return round(value, digits) if value is not None and math.isfinite(value) else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _by_score(heap: list[Any]) -> list[Any]:
    return [extreme for _, _, extreme in sorted(heap, key=lambda entry: entry[:2], reverse=True)]


def _words(by_token: dict[str, TokenSums], least: int) -> list[tuple[str, list[tuple[str, TokenSums]]]]:
    """Return the tokens drawn at least `least` times that the teacher favours most, and those that the student does."""
    common = sorted(
        ((text, sums) for text, sums in by_token.items() if sums.count >= least and text),
        key=lambda item: item[1].gap / item[1].count,
    )
    favours_teacher = [item for item in reversed(common) if item[1].gap > 0][:WORDS]
    favours_student = [item for item in common if item[1].gap < 0][:WORDS]
    return [("Favoured by the teacher", favours_teacher), ("Favoured by the student", favours_student)]


# -- plots --------------------------------------------------------------------------------------------------------------


def _plots(result: Tally) -> list[tuple[str, str, str]]:
    """Return title, SVG and caption of each plot."""
    h = result.histograms
    return [
        (
            "α, the teacher's weight",
            svg(lambda axes: _alpha(axes, h["alpha"])),
            "Share of the tokens in each of 40 bins; blue nearer to the student, orange nearer to the teacher.",
        ),
        (
            "Divergence of q* from each side",
            svg(lambda axes: _two(axes, NATS, h["kl_theta"], h["kl_teacher"], log=True)),
            "Share of the tokens; the leftmost bin holds everything below 10⁻⁴, where the two agree. "
            "A bar far above all others is cut, and its share written on it.",
        ),
        (
            "Effective sample size of one token",
            svg(lambda axes: _two(axes, UNIT, h["ess_theta"], h["ess_teacher"])),
            "Share of the tokens. 1 / Σ π²/q*: 1 where q* covers a side fully, near 0 where importance weights towards it "
            "would explode.",
        ),
        (
            "Length",
            svg(lambda axes: _lengths(axes, result)),
            f"From {min(result.lengths):,} to {max(result.lengths):,} tokens.",
        ),
        (
            "Where they disagree: through a completion",
            svg(lambda axes: _places(axes, result)),
            "Mean KL(q* ‖ student) and mean α in each twentieth of a completion.",
        ),
        (
            f"Where they disagree: the first {EARLY} tokens",
            svg(lambda axes: _early(axes, result)),
            "Mean KL(q* ‖ student) at each position, over the completions that reach it (shaded: their share).",
        ),
    ]


def _alpha(axes: Any, counts: np.ndarray) -> None:
    middles = (UNIT[:-1] + UNIT[1:]) / 2
    colours = [STUDENT if middle < 0.5 else TEACHER for middle in middles]
    bars = axes.bar(middles, _shares(counts), width=0.024, color=colours)
    for bar, middle in zip(bars, middles, strict=True):
        bar.set_alpha(0.35 + 0.6 * abs(2 * middle - 1))
    axes.set_xlim(0, 1)
    axes.set_xlabel("α: 0 student, 1 teacher")
    _percent(axes)


def _two(axes: Any, edges: np.ndarray, student: np.ndarray, teacher: np.ndarray, log: bool = False) -> None:
    # The two lines coincide where the sides agree; dashes show both.
    edges = np.concatenate([[edges[1] / 1.6], edges[1:]]) if log else edges
    axes.stairs(_shares(student), edges, fill=True, color=STUDENT, alpha=0.22)
    axes.stairs(_shares(student), edges, color=STUDENT, linewidth=2.6, alpha=0.8, label="student")
    axes.stairs(_shares(teacher), edges, color=TEACHER, linestyle=(0, (3, 2)), linewidth=1.6, label="teacher")
    _cut_the_tallest(axes, edges, np.maximum(_shares(student), _shares(teacher)))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=2, borderaxespad=0)
    axes.set_xlabel("KL, nats" if log else "ESS ratio")
    if log:
        axes.set_xscale("log")
        used = np.flatnonzero(student + teacher)
        axes.set_xlim(edges[0], edges[min(len(edges) - 1, used[-1] + 2)] if len(used) else edges[-1])
    _percent(axes)


def _cut_the_tallest(axes: Any, edges: np.ndarray, shares: np.ndarray) -> None:
    """Cut a bin that holds nearly everything, so that the others stay visible, and write its share."""
    second, tallest = np.sort(shares)[-2:]
    if not 0 < 4 * second < tallest:
        return
    axes.set_ylim(0, 1.5 * second)
    at = int(shares.argmax())
    right = at > len(shares) / 2  # the text stands to the free side of the bar
    axes.annotate(
        f"{tallest:.0%} ↑".replace("%", " %"),
        (edges[at] if right else edges[at + 1], 1.5 * second),
        xytext=(-5 if right else 5, -4),
        textcoords="offset points",
        ha="right" if right else "left",
        va="top",
    )


def _lengths(axes: Any, result: Tally) -> None:
    lengths = np.array(list(result.lengths), dtype=float)
    axes.hist(lengths, weights=list(result.lengths.values()), bins=min(40, max(5, len(lengths))), color=THIRD, alpha=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("tokens")
    axes.set_ylabel("completions")


def _places(axes: Any, result: Tally) -> None:
    counts = np.maximum(result.place_counts, 1)
    x = (np.arange(PLACES) + 0.5) / PLACES
    axes.bar(x, result.place_sums["kl_theta"] / counts, width=0.04, color=FOURTH, alpha=0.75, label="KL, nats")
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["start", "middle", "end"])
    axes.set_ylabel("KL, nats")
    right = axes.twinx()
    right.plot(x, result.place_sums["alpha"] / counts, color=TEACHER)
    right.set_ylim(0, 1)
    right.spines["top"].set_visible(False)
    right.set_ylabel("α", color=TEACHER)


def _early(axes: Any, result: Tally) -> None:
    reached = int(np.flatnonzero(result.early_counts)[-1]) + 1 if result.early_counts.any() else 1
    counts = np.maximum(result.early_counts[:reached], 1)
    axes.plot(np.arange(reached), result.early_sums[:reached] / counts, color=FOURTH, linewidth=1.4)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("token")
    axes.set_ylabel("KL, nats")
    shares = axes.twinx()
    shares.fill_between(
        np.arange(reached), result.early_counts[:reached] / result.completions, color=INK, alpha=0.06, linewidth=0
    )
    shares.set_ylim(0, 1)
    shares.set_axis_off()
    axes.set_zorder(1)
    axes.patch.set_visible(False)


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / max(counts.sum(), 1)


def _percent(axes: Any) -> None:
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.6g} %")  # as many decimals as a tick needs
