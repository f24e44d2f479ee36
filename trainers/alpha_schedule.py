"""Mixing over a run of training: a schedule of α's bounds, and rows that are sampled from the student alone."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from osd.core import MixingConfig

MIX_COLUMN = "mix"
SHAPES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class AlphaSchedule:
    """Mixing of every optimizer step: the bounds of α and its fixed value go from `start` to `end`.

    Attributes:
        start, end: equal except for `alpha_min`, `alpha_max` and `fixed_alpha`.
        shape: "constant" (no change), "linear", or "cosine" (slow at both ends).
        steps: optimizer steps from `start` to `end`; None: all steps of the run.
    """

    start: MixingConfig
    end: MixingConfig
    shape: str = "constant"
    steps: int | None = None

    def at(self, step: int, max_steps: int) -> MixingConfig:
        """Return the mixing of completions sampled before optimizer step `step` (from 0) of `max_steps`."""
        if self.shape == "constant":
            return self.start
        progress = min(1.0, step / max(1, self.steps or max_steps))
        weight = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        # This form keeps the order of the bounds under rounding, because both factors are the same for all and not negative.
        return replace(
            self.start,
            **{
                name: (1 - weight) * getattr(self.start, name) + weight * getattr(self.end, name)
                for name in ("alpha_min", "alpha_max", "fixed_alpha")
            },
        )

    def metrics(self, mixing: MixingConfig) -> dict[str, float]:
        """Return the scheduled values of `mixing`, by metric name."""
        if self.shape == "constant":
            return {}
        names = ("fixed_alpha",) if mixing.alpha_method == "fixed" else ("alpha_min", "alpha_max")
        return {f"osd/schedule/{name}": getattr(mixing, name) for name in names}


def unmixed(rows: Sequence[Mapping[str, Any]], mix_fraction: float, *, seed: str) -> list[float | None] | None:
    """Draw α for the completion of each row: 0 (the student alone) or None (as configured).

    α is 0 where the `mix` column is false, and with probability 1 - `mix_fraction` elsewhere. Returns None if every completion
    is mixed. Depends on its arguments alone, so that a resumed run draws the same.

    Raises:
        ValueError: a `mix` that is neither true nor false.
    """
    draw = random.Random(seed)
    alphas = [None if wants_mixing(row) and draw.random() < mix_fraction else 0.0 for row in rows]
    return None if all(alpha is None for alpha in alphas) else alphas


def wants_mixing(row: Mapping[str, Any]) -> bool:
    """Return whether the completion of a row may be drawn from q*: its `mix`, or True where it has none.

    Raises:
        ValueError: a `mix` that is neither true nor false.
    """
    wanted = row.get(MIX_COLUMN)
    if wanted is not None and not isinstance(wanted, bool):
        raise ValueError(f"the dataset's column {MIX_COLUMN!r} has {wanted!r}; use true, or false for the student alone")
    return wanted is not False
