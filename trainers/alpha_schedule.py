"""What changes over a run of training: α's bounds, and which completions are mixed at all."""

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
    """The mixing at every optimizer step: the bounds of α and its fixed value move from `start` to `end`.

    Attributes:
        start, end: alike but for `alpha_min`, `alpha_max` and `fixed_alpha`.
        shape: "constant" stays at `start`; "linear"; "cosine" is slow at both ends.
        steps: optimizer steps until `end` is reached; None: all of the run's.
    """

    start: MixingConfig
    end: MixingConfig
    shape: str = "constant"
    steps: int | None = None

    def at(self, step: int, max_steps: int) -> MixingConfig:
        """The mixing for completions that are sampled before optimizer step `step` (from 0) of `max_steps`."""
        if self.shape == "constant":
            return self.start
        progress = min(1.0, step / max(1, self.steps or max_steps))
        weight = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        # This form keeps the order of the bounds under rounding: both factors are shared and not negative.
        return replace(
            self.start,
            **{
                name: (1 - weight) * getattr(self.start, name) + weight * getattr(self.end, name)
                for name in ("alpha_min", "alpha_max", "fixed_alpha")
            },
        )

    def metrics(self, mixing: MixingConfig) -> dict[str, float]:
        """What moves, as it is in `mixing`."""
        if self.shape == "constant":
            return {}
        names = ("fixed_alpha",) if mixing.alpha_method == "fixed" else ("alpha_min", "alpha_max")
        return {f"schedule/{name}": getattr(mixing, name) for name in names}


def unmixed(rows: Sequence[Mapping[str, Any]], mix_fraction: float, *, seed: str) -> list[float | None] | None:
    """α of the completion of each row: 0, the student alone, where its `mix` column is false, and of the others with
    probability 1 - `mix_fraction`; None (as configured) elsewhere.

    None for all of them if every one is mixed. Depends on nothing but its arguments, so that a resumed run draws the same.

    Raises:
        ValueError: a `mix` that is neither true nor false.
    """
    draw = random.Random(seed)
    alphas = [None if wants_mixing(row) and draw.random() < mix_fraction else 0.0 for row in rows]
    return None if all(alpha is None for alpha in alphas) else alphas


def wants_mixing(row: Mapping[str, Any]) -> bool:
    wanted = row.get(MIX_COLUMN, True)
    if not isinstance(wanted, bool):
        raise ValueError(f"the dataset's column {MIX_COLUMN!r} has {wanted!r}; use true, or false for the student alone")
    return wanted
