"""The nouns of the project: how two policies are mixed, and what is kept of every token.

Imports nothing else of ours. Shape suffixes: T tokens of one completion, R record columns (RECORD_FIELDS),
H the teacher's hidden size. All logarithms are natural.
"""

import dataclasses
import difflib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

ALPHA_METHODS = ("kl_symmetry", "ess_balance", "entropy", "reverse_kl_symmetry", "fixed")
MIXTURES = ("geometric", "linear")
# Methods whose condition does not mention the geometric family, so that they mean something for a linear one.
_LINEAR_METHODS = ("entropy", "fixed")

RECORD_FIELDS = (
    "alpha",  # the teacher's weight in q
    "logq",  # log q(y), before top-k, top-p, penalties and logit bias
    "logp_theta",  # log pi_theta(y), tempered
    "logp_teacher",  # log pi_t(y), tempered
    "kl_theta",  # KL(q || pi_theta)
    "kl_teacher",  # KL(q || pi_t)
    "entropy_q",  # H(q)
    "ess_theta",  # 1 / sum(pi_theta^2 / q), see osd.mixing.Mixture
    "ess_teacher",  # 1 / sum(pi_t^2 / q)
    "logp_draw",  # log-probability the token was drawn with, after top-k and the rest; equals logq without them
)


def _suggest(given: object, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(given), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """How alpha, the teacher's weight, is chosen for each token, and what it weighs.

    alpha_method: one of ALPHA_METHODS.
    fixed_alpha: alpha of the "fixed" method, in [alpha_min, alpha_max]; 0 is the student, 1 the teacher.
    alpha_min, alpha_max: bounds of alpha, 0 <= alpha_min <= alpha_max <= 1.
    mixture: "geometric", q ∝ pi_theta^(1-alpha) pi_t^alpha, or "linear", q = (1-alpha) pi_theta + alpha pi_t.

    Raises ValueError on anything else; warns when fixed_alpha is set and another method ignores it.
    """

    alpha_method: str = "kl_symmetry"
    fixed_alpha: float = 0.5
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    mixture: str = "geometric"

    def __post_init__(self) -> None:
        self._check_choice("alpha_method", ALPHA_METHODS)
        self._check_choice("mixture", MIXTURES)
        for name in ("fixed_alpha", "alpha_min", "alpha_max"):
            self._check_weight(name)
        self._check_bounds()
        if self.mixture == "linear" and self.alpha_method not in _LINEAR_METHODS:
            raise ValueError(
                f"mixture='linear' cannot be used with alpha_method={self.alpha_method!r}, whose condition is about "
                f"the geometric mixture; use alpha_method 'fixed' or 'entropy', or mixture='geometric'"
            )

    def _check_choice(self, name: str, known: tuple[str, ...]) -> None:
        given = getattr(self, name)
        if given not in known:
            raise ValueError(f"{name}={given!r} is unknown{_suggest(given, known)}; use one of {', '.join(known)}")

    def _check_weight(self, name: str) -> None:
        given = getattr(self, name)
        number = isinstance(given, (int, float)) and not isinstance(given, bool)
        if not number or math.isnan(given) or not 0 <= given <= 1:
            raise ValueError(f"{name}={given!r} is not a weight; use a number from 0 (student) to 1 (teacher)")

    def _check_bounds(self) -> None:
        low, high, fixed = self.alpha_min, self.alpha_max, self.fixed_alpha
        if low > high:
            raise ValueError(f"alpha_min={low!r} is above alpha_max={high!r}; swap them")
        if self.alpha_method == "fixed" and not low <= fixed <= high:
            raise ValueError(
                f"fixed_alpha={fixed!r} is outside [alpha_min, alpha_max] = [{low!r}, {high!r}]; widen the bounds "
                f"or move fixed_alpha inside them"
            )
        if self.alpha_method != "fixed" and fixed != 0.5:
            warnings.warn(
                f"fixed_alpha={fixed!r} has no effect with alpha_method={self.alpha_method!r}; "
                f"use alpha_method='fixed' to apply it",
                stacklevel=4,
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, accepted by from_dict."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MixingConfig":
        """The configuration with these fields, the others at their defaults. Raises ValueError on an unknown key."""
        known = tuple(field.name for field in dataclasses.fields(cls))
        for key in values:
            if key not in known:
                raise ValueError(f"unknown mixing option {key!r}{_suggest(key, known)}; use {', '.join(known)}")
        return cls(**values)


def _column(name: str) -> property:
    index = RECORD_FIELDS.index(name)
    return property(lambda record: record.values_TR[:, index], doc=f"{name}, [T] float32 view of values_TR.")


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRecord:
    """What the sampler kept of one completion of T tokens.

    values_TR: [T, R] float32, columns in RECORD_FIELDS order.
    teacher_hidden_TH: the teacher's final hidden states, [T, H], or None when they were not asked for.
    weights_version: number of weight syncs the student had received when it sampled these tokens.
    """

    values_TR: torch.Tensor
    teacher_hidden_TH: torch.Tensor | None
    weights_version: int

    def __post_init__(self) -> None:
        values, hidden = self.values_TR, self.teacher_hidden_TH
        if values.ndim != 2 or values.shape[1] != len(RECORD_FIELDS) or values.dtype != torch.float32:
            raise ValueError(
                f"values_TR is {values.dtype} {tuple(values.shape)}; use float32 [T, {len(RECORD_FIELDS)}], "
                f"columns as in RECORD_FIELDS"
            )
        if hidden is not None and (hidden.ndim != 2 or len(hidden) != len(values)):
            raise ValueError(f"teacher_hidden_TH is {tuple(hidden.shape)}; use [T, H] with T = {len(values)} as in values_TR")

    alpha = _column("alpha")
    logq = _column("logq")
    logp_theta = _column("logp_theta")
    logp_teacher = _column("logp_teacher")
    kl_theta = _column("kl_theta")
    kl_teacher = _column("kl_teacher")
    entropy_q = _column("entropy_q")
    ess_theta = _column("ess_theta")
    ess_teacher = _column("ess_teacher")
    logp_draw = _column("logp_draw")

    def __len__(self) -> int:
        return len(self.values_TR)

    def chernoff_gap(self, config: MixingConfig) -> torch.Tensor:
        """|KL(q||pi_theta) - KL(q||pi_t)| at the tokens where the two should agree; [n] float32, n <= T.

        With alpha_method "kl_symmetry", an alpha strictly inside its bounds is the Chernoff point, where both
        divergences equal the Chernoff information. Any other method, and any clamped token, promises nothing:
        those are left out. An alpha that is off by e shows as a gap of e * Var_q[log pi_t/pi_theta].
        """
        if config.alpha_method != "kl_symmetry" or config.mixture != "geometric":
            return self.values_TR.new_empty(0)
        inside_T = (self.alpha > config.alpha_min) & (self.alpha < config.alpha_max)
        return (self.kl_theta - self.kl_teacher).abs()[inside_T]
