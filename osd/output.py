"""Output of the offline API: completions by column and by row, statistics of α, and its JSON file."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from osd.core import TokenRecord
from osd.prompt_checks import Prompt


@dataclass(frozen=True, kw_only=True)
class OptimalSample:
    """One completion of an `OptimalSamplingOutput`: the same fields, for this completion alone.

    Attributes:
        prompt, theta_prompt: the prompts of teacher and student, as they were given.
        sample: number of this completion among those of its prompt, from 0.
        text, token_ids, num_tokens: the completion without special tokens, its ids, and their number.
        finish_reason, error: "stop", "length" or "error"; the reason of an error, or None.
        record: the per-token record, or None if not tracked.
        alpha_stats, alpha_history: statistics of α, and α of every token; None if not tracked.
    """

    prompt: Prompt | None
    theta_prompt: Prompt | None
    sample: int
    text: str
    token_ids: list[int]
    num_tokens: int
    finish_reason: str | None
    error: str | None
    record: TokenRecord | None
    alpha_stats: dict[str, float] | None
    alpha_history: list[float] | None


@dataclass(frozen=True, kw_only=True)
class OptimalSamplingOutput(Sequence[OptimalSample]):
    """Completions of one ``generate`` call: columns as attributes, rows by index (``output[0].text``) and iteration.

    Every column has one entry per completion, ``len(prompts) * n`` of them, prompt by prompt: completion ``k`` of prompt
    ``i`` is entry ``i * n + k``.

    Attributes:
        generated_texts: the completions without special tokens.
        generated_ids: their token ids, including the one that ended them.
        num_tokens: their lengths in tokens.
        finish_reasons: "stop", "length" or "error".
        errors: the reason why a completion ended in an error, or None.
        records: the per-token record of each (α, log q*, log π_θ, log π_t, both KLs, ...), or None if not tracked. With
            ``use_optimal_sampling=False``: alpha is 1, logq is logp_teacher, kl_teacher is 0, ess_teacher is 1, entropy_q is
            the teacher's; logp_theta, kl_theta and ess_theta are NaN, because the student did not run.
        alpha_stats: mean, std, min, max and count of α over each completion, or None if not tracked.
        alpha_history: α of every token of each completion, or None if not tracked.
        prompts, theta_prompts: the prompts as they were given, one entry per prompt.
        n: completions per prompt.
        settings: models, mixing, system prompts and sampling arguments of the call, as plain values.
    """

    generated_texts: list[str]
    generated_ids: list[list[int]]
    num_tokens: list[int]
    finish_reasons: list[str | None]
    errors: list[str | None]
    records: list[TokenRecord] | None
    alpha_stats: list[dict[str, float]] | None
    alpha_history: list[list[float]] | None
    prompts: list[Prompt] = field(default_factory=list)
    theta_prompts: list[Prompt] = field(default_factory=list)
    n: int = 1
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.generated_ids)

    @overload
    def __getitem__(self, index: int) -> OptimalSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[OptimalSample]: ...
    def __getitem__(self, index: int | slice) -> OptimalSample | list[OptimalSample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]  # negative indices, and IndexError
        prompt = i // self.n
        return OptimalSample(
            prompt=self.prompts[prompt] if self.prompts else None,
            theta_prompt=self.theta_prompts[prompt] if self.theta_prompts else None,
            sample=i % self.n,
            text=self.generated_texts[i],
            token_ids=self.generated_ids[i],
            num_tokens=self.num_tokens[i],
            finish_reason=self.finish_reasons[i],
            error=self.errors[i],
            record=self.records[i] if self.records else None,
            alpha_stats=self.alpha_stats[i] if self.alpha_stats else None,
            alpha_history=self.alpha_history[i] if self.alpha_history else None,
        )

    def __iter__(self) -> Iterator[OptimalSample]:
        return (self[i] for i in range(len(self)))


def alpha_stats(alphas: Sequence[float]) -> dict[str, float]:
    """Return mean, population standard deviation, minimum, maximum and count of the α of one completion."""
    if not alphas:
        nan = float("nan")
        return {"mean": nan, "std": nan, "min": nan, "max": nan, "count": 0}
    return {
        "mean": statistics.fmean(alphas),
        "std": statistics.pstdev(alphas),
        "min": min(alphas),
        "max": max(alphas),
        "count": len(alphas),
    }


def save_alpha_history(output: OptimalSamplingOutput, path: str | os.PathLike[str]) -> None:
    """Write settings, prompts and the α of every token as JSON; the file is whole or absent.

    ``{"settings": {...}, "completions": [{"prompt", "theta_prompt", "sample", "text", "token_ids", "finish_reason", "alpha",
    "alpha_stats"}, ...]}``, in the order of the output. JSON has no NaN: a statistic of no tokens is null.

    Raises:
        ValueError: an output that was sampled without ``track_alpha_stats=True``; a path that is a folder.
    """
    if output.alpha_history is None:
        raise ValueError("this output has no α: construct OptimalSamplingV1 with track_alpha_stats=True")
    rows = [
        {
            "prompt": sample.prompt,
            "theta_prompt": sample.theta_prompt,
            "sample": sample.sample,
            "text": sample.text,
            "token_ids": sample.token_ids,
            "finish_reason": sample.finish_reason,
            "alpha": sample.alpha_history,
            "alpha_stats": sample.alpha_stats,
        }
        for sample in output
    ]
    text = json.dumps(_strict({"settings": output.settings, "completions": rows}), ensure_ascii=False, allow_nan=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise ValueError(f"path={str(path)!r} is a folder; name a file")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / path.name
        whole.write_text(text, encoding="utf-8", errors="replace")
        os.replace(whole, path)


def _strict(value: Any) -> Any:
    """Copy a value in the types of strict JSON: null for NaN and infinities, text for what JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
