"""Statistics of a data set for `osd inspect`: one pass over its files, in memory that does not grow with the data.

T tokens of a completion. Histograms have fixed bins. A seeded sample of the completions is kept to be shown, and the most
extreme tokens with their surroundings.
"""

from __future__ import annotations

import heapq
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from osd.data import grading
from osd.data.configs import nearby
from osd.data.samples import SCHEMA
from osd.data.writer import is_data_file

# Columns of tokens that are tallied, and the bins of each.
UNIT = np.linspace(0, 1, 41)
NATS = np.concatenate([[0], np.geomspace(1e-4, 50, 58)])  # divergences span decades
BINS = {"alpha": UNIT, "kl_theta": NATS, "kl_teacher": NATS, "ess_theta": UNIT, "ess_teacher": UNIT}
PLACES = 20  # parts of a completion, for where the two disagree
EARLY = 256  # tokens from the start, one by one
CONTEXT = 12  # tokens shown on each side of an extreme one
SHOWN_COLUMNS = ("alpha", "kl_theta", "logp_theta", "logp_teacher")
READ_COLUMNS = (*BINS, *SHOWN_COLUMNS, "logq")


@dataclass
class Extreme:
    """One token with its surroundings: `gap` is log π_t − log π_θ, in nats."""

    id: str
    place: int
    before: str
    token: str
    after: str
    alpha: float
    gap: float
    kl_theta: float
    logp_theta: float
    logp_teacher: float


@dataclass
class TokenSums:
    """Sums over the occurrences of one token text."""

    count: int = 0
    gap: float = 0.0
    kl: float = 0.0
    alpha: float = 0.0


@dataclass
class Tally:
    """Statistics of a data set; made by `tally`."""

    completions: int = 0
    tokens: int = 0
    right: int = 0
    scored: int = 0  # completions with a reference answer
    histograms: dict[str, np.ndarray] = field(default_factory=lambda: {n: np.zeros(len(b) - 1) for n, b in BINS.items()})
    sums: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    config_hashes: Counter[str] = field(default_factory=Counter)
    place_counts: np.ndarray = field(default_factory=lambda: np.zeros(PLACES))
    place_sums: dict[str, np.ndarray] = field(default_factory=lambda: {n: np.zeros(PLACES) for n in ("alpha", "kl_theta")})
    early_counts: np.ndarray = field(default_factory=lambda: np.zeros(EARLY))
    early_sums: np.ndarray = field(default_factory=lambda: np.zeros(EARLY))
    by_token: dict[str, TokenSums] = field(default_factory=dict)
    teacher_side: list[tuple[float, int, Extreme]] = field(default_factory=list)
    student_side: list[tuple[float, int, Extreme]] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)


def data_files(path: Path) -> list[Path]:
    """Return the files of a data set: the file itself, or a folder's shards in order.

    Raises:
        ValueError: there is no data at the path.
    """
    if not path.exists():
        raise ValueError(f"{str(path)!r} has no data: it does not exist{nearby(path)}; give a file or folder of `osd generate`")
    if path.is_file() and path.suffix in (".parquet", ".jsonl"):
        return [path]
    if path.is_file():
        raise ValueError(f"{str(path)!r} is neither .parquet nor .jsonl; give a file or folder that `osd generate` wrote")
    files = sorted(file for file in path.glob("*") if is_data_file(file)) if path.is_dir() else []
    if not files:
        raise ValueError(f"{str(path)!r} has no data; give a file or folder that `osd generate` wrote")
    return files


def samples(files: list[Path]) -> Iterator[dict[str, Any]]:
    """Yield the completions of all files.

    Raises:
        ValueError: a file that cannot be read, or without the columns that `osd generate` writes, one entry per token.
    """
    for file in files:
        for number, sample in enumerate(_parquet(file) if file.suffix == ".parquet" else _jsonl(file)):
            if wrong := _what_is_wrong(sample):
                raise ValueError(f"{str(file)!r}, completion {number}: {wrong}; give a file that `osd generate` wrote")
            yield sample


def _what_is_wrong(sample: Any) -> str | None:
    if not isinstance(sample, dict):
        return "it is not a mapping of columns"
    for name in ("id", "tokens", *READ_COLUMNS):
        if sample.get(name) is None:
            return f"it has no {name!r}"
        if name != "id" and len(sample[name]) != len(sample["tokens"]):
            return f"it has {len(sample['tokens'])} tokens and {len(sample[name])} entries in {name!r}"
    return None


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        opened = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{str(file)!r} is not a Parquet file ({error})") from error
    wanted = [name for name in SCHEMA.names if name in opened.schema_arrow.names and not name.endswith("_ids")]
    for batch in opened.iter_batches(batch_size=256, columns=wanted):
        yield from batch.to_pylist()


def _jsonl(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{str(file)!r}, line {number} is not JSON ({error}); was it cut off?") from error


def tally(files: list[Path], *, shown: int, extremes: int, seed: int = 0, matcher: grading.Matcher = grading.matches) -> Tally:
    """Read a data set once.

    Args:
        shown: number of completions to keep whole, drawn evenly.
        extremes: number of tokens to keep from each end.
        matcher: grades completions that have a reference answer; a kept one gets its grade as `right`.
    """
    result, chance = Tally(), random.Random(seed)
    for number, sample in enumerate(samples(files)):
        result.completions += 1
        result.lengths[len(sample["tokens"])] += 1
        result.finish_reasons[sample.get("finish_reason") or "?"] += 1
        result.pairs[(sample.get("teacher_model") or "?", sample.get("student_model") or "?")] += 1
        result.config_hashes[sample.get("config_hash") or "?"] += 1
        sample["right"] = _graded(sample, matcher)
        result.scored += sample["right"] is not None
        result.right += sample["right"] is True
        _keep(result.shown, sample, number, shown, chance)
        if sample["tokens"]:
            _add_tokens(result, sample, extremes)
    return result


def _graded(sample: dict[str, Any], matcher: grading.Matcher) -> bool | None:
    """Return whether a completion is right; None without a reference answer or without the text."""
    answer, text = sample.get("answer"), sample.get("completion")
    return None if answer is None or text is None else matcher(text, answer)


def _keep(shown: list[dict[str, Any]], sample: dict[str, Any], number: int, most: int, chance: random.Random) -> None:
    """Keep a completion by reservoir sampling: every one has the same chance to be shown."""
    if len(shown) < most:
        shown.append(sample)
    elif (place := chance.randrange(number + 1)) < most:
        shown[place] = sample


def _add_tokens(result: Tally, sample: dict[str, Any], extremes: int) -> None:
    # JSON has null where Parquet has -inf, the logarithm of probability 0.
    columns_T = {name: np.array(sample[name], dtype=float) for name in READ_COLUMNS}
    length = len(sample["tokens"])
    result.tokens += length
    for name, edges in BINS.items():
        known = columns_T[name][np.isfinite(columns_T[name])]
        result.histograms[name] += np.histogram(np.clip(known, edges[0], edges[-1]), edges)[0]
        result.sums[name] += known.sum()
    for name in ("logp_theta", "logp_teacher"):
        result.sums[name] += columns_T[name][np.isfinite(columns_T[name])].sum()
    with np.errstate(invalid="ignore"):  # minus infinity on both sides
        ratio_T = np.exp(np.minimum(columns_T["logp_theta"] - columns_T["logq"], 0.0))
    result.sums["accepted"] += np.nansum(ratio_T)
    _add_places(result, columns_T, length)
    gap_T = np.nan_to_num(columns_T["logp_teacher"] - columns_T["logp_theta"], nan=0.0, posinf=99.0, neginf=-99.0)
    for text, gap, kl, alpha in zip(sample["tokens"], gap_T, columns_T["kl_theta"], columns_T["alpha"], strict=True):
        sums = result.by_token.setdefault(text, TokenSums())
        sums.count, sums.gap, sums.kl, sums.alpha = sums.count + 1, sums.gap + gap, sums.kl + kl, sums.alpha + alpha
    for heap, sign in ((result.teacher_side, 1), (result.student_side, -1)):
        _add_extremes(heap, sign * gap_T, sample, columns_T, gap_T, extremes, result.tokens)


def _add_places(result: Tally, columns_T: dict[str, np.ndarray], length: int) -> None:
    place_T = np.arange(length) * PLACES // length
    known_T = np.isfinite(columns_T["kl_theta"])
    result.place_counts += np.bincount(place_T[known_T], minlength=PLACES)
    for name, sums in result.place_sums.items():
        sums += np.bincount(place_T[known_T], weights=columns_T[name][known_T], minlength=PLACES)
    early = columns_T["kl_theta"][:EARLY]
    result.early_counts[: len(early)] += np.isfinite(early)
    result.early_sums[: len(early)] += np.nan_to_num(early, posinf=0.0)


def _add_extremes(
    heap: list[tuple[float, int, Extreme]],
    score_T: np.ndarray,
    sample: dict[str, Any],
    columns_T: dict[str, np.ndarray],
    gap_T: np.ndarray,
    most: int,
    serial: int,
) -> None:
    """Keep the most extreme tokens, at most three of a completion: one strange completion must not fill the table."""
    for i in np.argsort(-score_T, kind="stable")[:3]:
        score = float(score_T[i])
        if score <= 0 or (len(heap) == most and score <= heap[0][0]):
            return
        tokens = sample["tokens"]
        extreme = Extreme(
            id=sample["id"],
            place=int(i),
            before="".join(tokens[max(0, i - CONTEXT) : i]),
            token=tokens[i],
            after="".join(tokens[i + 1 : i + 1 + CONTEXT]),
            gap=float(gap_T[i]),
            **{name: float(columns_T[name][i]) for name in SHOWN_COLUMNS},
        )
        (heapq.heappush if len(heap) < most else heapq.heapreplace)(heap, (score, serial + int(i), extreme))
