"""Basic data types of the project: the mixing configuration and the per-token record.

Imports no other module of the project, and torch only when a record is made. Shape suffixes: T tokens of one completion,
R record columns (RECORD_FIELDS), H the teacher's hidden size, X columns of its top-k rows. All logarithms are natural.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ALPHA_METHODS = ("kl_symmetry", "ess_balance", "entropy", "reverse_kl_symmetry", "fixed")
MIXTURES = ("geometric", "linear")
# The conditions of the other methods hold for the geometric mixture only.
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

# How a token came to be under speculation: without a draft, as an accepted draft of the student, in the place of a draft that
# was refused, or after the last draft of a cycle, all of which were accepted.
TOKEN_ORIGINS = ("drawn", "accepted", "corrected", "bonus")

MOST_SPECULATIVE_TOKENS = 16
SPECULATION_HELP = (
    "Tokens that the student drafts and the teacher verifies in one pass: 0 (none) to 16, or 'auto', which measures acceptance "
    "and times and chooses. Completions follow the same distribution for every value."
)


def speculative_tokens(given: Any) -> int | str:
    """Return the number of drafts, also from text, or "auto".

    Raises:
        ValueError: anything else, or a number out of range.
    """
    number = int(given) if isinstance(given, str) and given.isdecimal() else given
    whole = isinstance(number, int) and not isinstance(number, bool)
    if number != "auto" and not (whole and 0 <= number <= MOST_SPECULATIVE_TOKENS):
        raise ValueError(
            f"num_speculative_tokens={given!r} is not a whole number from 0 to {MOST_SPECULATIVE_TOKENS}; use 0 for no drafts, "
            "about 4, or 'auto'"
        )
    return number


def suggest(given: object, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the known name that is closest to `given`, or "" if none is close."""
    close = difflib.get_close_matches(str(given), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """Mixing options: the method and the bounds of α, the teacher's weight of each token, and the kind of mixture.

    The five options are declared only here. The sampler, the trainer and the command line take their defaults and help texts
    from here (`mixing_option`, `MixingConfig.of`).

    Attributes:
        alpha_method: one of ALPHA_METHODS.
        fixed_alpha: α of the "fixed" method, in [alpha_min, alpha_max]; 0 is the student, 1 the teacher.
        alpha_min, alpha_max: bounds of α, 0 <= alpha_min <= alpha_max <= 1.
        mixture: "geometric", q ∝ π_θ^(1-α) π_t^α, or "linear", q = (1-α) π_θ + α π_t.

    Raises:
        ValueError: any other value, naming the field. (A fixed_alpha that another method ignores is a warning.)
    """

    alpha_method: str = _option(
        "kl_symmetry",
        "Method that chooses α, the teacher's weight, for every token: 'kl_symmetry' (both KL divergences from q* are equal), "
        "'ess_balance', 'entropy', 'reverse_kl_symmetry', or 'fixed'.",
    )
    fixed_alpha: float = _option(
        0.5, "α under alpha_method='fixed', in [0, 1]: 0 samples from the student alone, 1 from the teacher alone."
    )
    alpha_min: float = _option(0.0, "Lower bound of α, in [0, alpha_max].")
    alpha_max: float = _option(1.0, "Upper bound of α, in [alpha_min, 1].")
    mixture: str = _option(
        "geometric",
        "'geometric': q* ∝ π_θ^(1-α) π_t^α. 'linear': q* = (1-α) π_θ + α π_t, the baseline of other papers "
        "(alpha_method 'fixed' or 'entropy' only).",
    )

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
            raise ValueError(f"{name}={given!r} is unknown{suggest(given, known)}; use one of {', '.join(known)}")

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
        """Return plain values that from_dict accepts."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MixingConfig:
        """Make a configuration with these fields and the defaults of the others. Raises ValueError on an unknown key."""
        for key in values:
            if key not in MIXING_OPTIONS:
                raise ValueError(
                    f"unknown mixing option {key!r}{suggest(key, MIXING_OPTIONS)}; use {', '.join(MIXING_OPTIONS)}"
                )
        return cls(**values)

    @classmethod
    def of(cls, options: object) -> MixingConfig:
        """Make a configuration from the attributes of the same names of any object (a trainer's or a command's settings).

        Raises:
            ValueError: as the constructor.
        """
        return cls(**{name: getattr(options, name) for name in MIXING_OPTIONS})


_FIELDS = {field.name: field for field in dataclasses.fields(MixingConfig)}
MIXING_OPTIONS = tuple(_FIELDS)


def mixing_option(name: str) -> Any:
    """Return a dataclass field with the default and the help text of this option of `MixingConfig`.

    For settings classes that have the option too: ``alpha_max: float = mixing_option("alpha_max")``.
    """
    return dataclasses.field(default=_FIELDS[name].default, metadata=dict(_FIELDS[name].metadata))


def _column(name: str) -> property:
    index = RECORD_FIELDS.index(name)
    return property(lambda record: record.values_TR[:, index], doc=f"{name}, [T] float32 view of values_TR.")


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRecord:
    """Per-token record of one completion of T tokens.

    Attributes:
        values_TR: [T, R] float32, columns in RECORD_FIELDS order.
        teacher_hidden_TH: the teacher's final hidden states, [T, H], or None when they were not asked for.
        teacher_topk_TX: the teacher's k largest log-probabilities, tempered, over the shared vocabulary: float32 [T, 2k + 1],
            with k ids, their log π_t in descending order, and that of all other ids together. None when not asked for.
        weights_version: number of weight syncs the student had received when it sampled the last of these tokens.
        version_T: that number for each token, int64 [T]; None: it is ``weights_version`` for all of them.
        origin_T: how each token came to be, uint8 [T], an index into ``TOKEN_ORIGINS``; None without speculation.
    """

    values_TR: torch.Tensor
    teacher_hidden_TH: torch.Tensor | None
    weights_version: int
    origin_T: torch.Tensor | None = None
    teacher_topk_TX: torch.Tensor | None = None
    version_T: torch.Tensor | None = None

    def __post_init__(self) -> None:
        import torch

        values, hidden = self.values_TR, self.teacher_hidden_TH
        if values.ndim != 2 or values.shape[1] != len(RECORD_FIELDS) or values.dtype != torch.float32:
            raise ValueError(
                f"values_TR is {values.dtype} {tuple(values.shape)}; use float32 [T, {len(RECORD_FIELDS)}], "
                f"columns as in RECORD_FIELDS"
            )
        if hidden is not None and (hidden.ndim != 2 or len(hidden) != len(values)):
            raise ValueError(f"teacher_hidden_TH is {tuple(hidden.shape)}; use [T, H] with T = {len(values)} as in values_TR")
        topk = self.teacher_topk_TX
        if topk is not None and (topk.ndim != 2 or len(topk) != len(values) or topk.shape[1] % 2 == 0):
            raise ValueError(f"teacher_topk_TX is {tuple(topk.shape)}; use [T, 2k + 1] with T = {len(values)} as in values_TR")

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
        """Return |KL(q||pi_theta) - KL(q||pi_t)| at the tokens where the two must agree; [n] float32, n <= T.

        With alpha_method "kl_symmetry", an alpha strictly inside its bounds is the Chernoff point: both divergences
        equal the Chernoff information. Tokens at a bound, and all tokens of other methods, are left out. An error e in
        alpha gives a gap of e * Var_q[log pi_t/pi_theta].
        """
        if config.alpha_method != "kl_symmetry" or config.mixture != "geometric":
            return self.values_TR.new_empty(0)
        inside_T = (self.alpha > config.alpha_min) & (self.alpha < config.alpha_max)
        return (self.kl_theta - self.kl_teacher).abs()[inside_T]
