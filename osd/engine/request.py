"""Requests of a pair: both prompts, sampling options, validation and completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from osd.core import TokenRecord

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


@dataclass(frozen=True, kw_only=True)
class PairPrompt:
    """One request: what each side reads before the completion, as token ids."""

    teacher_token_ids: list[int]
    student_token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class PairCompletion:
    """What came of one request.

    Attributes:
        token_ids: the completion, including the token that ended it.
        text: its text without special tokens; empty with ``detokenize=False``.
        finish_reason: "stop", "length", "abort" or "error".
        stop_reason: the stop string or id that ended it, if one did.
        error: why it ended in an error ("NaN in the student's logits"), or None.
        record: one row per token, or None if it was not asked for.
        weights_version: the student weights that sampled it.
        teacher_prompt_tokens, student_prompt_tokens: prompt lengths.
        teacher_cached_tokens, student_cached_tokens: how much of each was in that side's prefix cache.
    """

    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    error: str | None
    record: TokenRecord | None
    weights_version: int
    teacher_prompt_tokens: int
    student_prompt_tokens: int
    teacher_cached_tokens: int
    student_cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class RequestChecks:
    """Both sides' limits.

    Attributes:
        teacher, student: their configurations.
        weights_version: the student weights that the requests are for.
    """

    teacher: VllmConfig = field(repr=False)
    student: VllmConfig = field(repr=False)
    weights_version: int

    def sampling_params(
        self,
        prompts: Sequence[PairPrompt],
        sampling: dict[str, Any] | Sequence[dict[str, Any]],
        options: PairOptions | Sequence[PairOptions],
    ) -> list[SamplingParams]:
        """vLLM's parameters of each request, with what the pair must know of it.

        Raises:
            ValueError: naming the prompt or the parameter, what it is, and what to do.
        """
        return list(self._each(prompts, sampling, options))

    def _each(self, prompts: Sequence[PairPrompt], sampling: Any, options: Any) -> Iterator[SamplingParams]:
        per_prompt = (one_each(name, given, len(prompts)) for name, given in (("sampling", sampling), ("options", options)))
        for index, (prompt, kwargs, option) in enumerate(zip(prompts, *per_prompt, strict=True)):
            extra = {**vars(option), "weights_version": self.weights_version}
            extra["student_prompt_token_ids"] = list(prompt.student_token_ids)
            extra_args = {**(kwargs.get("extra_args") or {}), **PairOptions(**extra).to_extra_args()}
            # Nobody looks at an output before its request ends.
            params = checked_params({**kwargs, "extra_args": extra_args, "output_kind": RequestOutputKind.FINAL_ONLY})
            self._check(index, prompt, params, option.teacher_only)
            yield params

    def _check(self, index: int, prompt: PairPrompt, params: SamplingParams, teacher_only: bool) -> None:
        if params.n != 1:
            raise ValueError(f"sampling n={params.n}: give each prompt {params.n} times instead")
        if params.max_tokens is None:
            raise ValueError("sampling max_tokens is None; give the longest completion you want, in tokens")
        if params.prompt_logprobs is not None:
            raise ValueError("sampling prompt_logprobs is not supported by the paired engine; remove it")
        sides = [
            ("teacher", prompt.teacher_token_ids, self.teacher),
            ("student", prompt.student_token_ids, self.student),
        ]
        for side, ids, config in sides[:1] if teacher_only else sides:
            vocab_size = config.model_config.get_vocab_size()
            limit = config.model_config.max_model_len
            if not ids:
                raise ValueError(f"prompt {index}: the {side}'s prompt is empty; give it at least one token")
            if not 0 <= min(ids) <= max(ids) < vocab_size:
                wrong = next(i for i in ids if not 0 <= i < vocab_size)
                raise ValueError(f"prompt {index}: token id {wrong} is not one of the {side}'s {vocab_size} ids")
            if len(ids) + params.max_tokens > limit:
                raise ValueError(
                    f"prompt {index}: the {side}'s prompt has {len(ids)} tokens, and with max_tokens={params.max_tokens} that "
                    f"is over its max_model_len={limit}; shorten one of them or raise max_model_len"
                )


def one_each(name: str, given: Any, count: int) -> list[Any]:
    """One value per prompt, from one for all of them or a sequence."""
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{name} has {len(given)} entries for {count} prompts; give one each, or one for all")
    return list(given)


def checked_params(kwargs: dict[str, Any]) -> SamplingParams:
    """vLLM's sampling parameters; its complaints, of several types, as a ValueError."""
    try:
        return SamplingParams(**kwargs)
    except (AssertionError, TypeError, ValueError, VLLMValidationError) as error:
        raise ValueError(
            f"sampling: {error}" if str(error) else f"sampling {kwargs}: vLLM refuses it by an assertion"
        ) from error
