"""Requests of a pair: what each side reads, how they are sampled, what comes of them, and what is refused of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from osd.core import TokenRecord
from osd.engine.options import PairOptions


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
