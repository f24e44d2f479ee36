"""What a request tells the pair, carried by ``SamplingParams.extra_args["osd"]`` from any vLLM front end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

EXTRA_ARGS_KEY = "osd"


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Per-request options of the pair. A request without any is sampled from q* with one prompt for both sides.

    Attributes:
        student_prompt_token_ids: the student's own prompt; None gives it the teacher's.
        alpha: the teacher's weight for this request, in [0, 1]; None lets the engine's α method decide per token.
        mix_tokens: sample from q* for that many tokens and from the student alone (α = 0) after them; None: no limit.
        teacher_only: sample from the teacher and never run the student (its record has NaN in the student's columns).
        record: keep the per-token record on the device until ``take_records``.
        hidden: keep the teacher's final hidden state with it.
        weights_version: the student weights that this request is to be sampled with; a version newer than the
            scheduler's resets the student's prefix cache, and the worker refuses to run with any other weights.
            None means whatever is loaded.
    """

    student_prompt_token_ids: list[int] | None = None
    alpha: float | None = None
    mix_tokens: int | None = None
    teacher_only: bool = False
    record: bool = False
    hidden: bool = False
    weights_version: int | None = None

    def to_extra_args(self) -> dict[str, Any]:
        """The ``SamplingParams.extra_args`` entry that carries these options."""
        return {EXTRA_ARGS_KEY: asdict(self)}

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha={self.alpha} is outside [0, 1]; 0 samples from the student, 1 from the teacher")
        if self.mix_tokens is not None and self.mix_tokens < 0:
            raise ValueError(f"mix_tokens={self.mix_tokens} is negative; 0 samples from the student alone, None always mixes")

    @classmethod
    def of(cls, sampling_params: Any) -> PairOptions:
        """The options of a request.

        Raises:
            ValueError: a key that is not an option, an α outside [0, 1], or a negative ``mix_tokens``.
        """
        given = (getattr(sampling_params, "extra_args", None) or {}).get(EXTRA_ARGS_KEY)
        if not given:
            return _DEFAULT
        unknown = sorted(set(given) - {f.name for f in fields(cls)})
        if unknown:
            known = ", ".join(f.name for f in fields(cls))
            raise ValueError(f'extra_args["{EXTRA_ARGS_KEY}"] has unknown keys {unknown}; the options are {known}')
        return cls(**given)


_DEFAULT = PairOptions()
