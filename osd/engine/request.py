"""Requests of a pair: both prompts, sampling options, checks and completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from osd.core import TokenRecord, suggest

EXTRA_ARGS_KEY = "osd"


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Per-request options, carried by ``SamplingParams.extra_args["osd"]`` from any vLLM front end.

    A request without any is sampled from q* with one prompt for both sides.

    Attributes:
        student_prompt_token_ids: the student's own prompt; None gives it the teacher's.
        alpha: the teacher's weight for this request, in [0, 1]; None lets the engine's α method decide per token.
        mix_tokens: sample from q* for that many tokens and from the student alone (α = 0) after them; None: no limit.
        teacher_only: sample from the teacher and never run the student (its record has NaN in the student's columns).
        record: keep the per-token record on the device until ``take_records``.
        hidden: keep, or return, the teacher's final hidden state with it.
        topk: keep, or return, so many of the teacher's largest log-probabilities with it (`osd.engine.topk`); 0: none. All
            requests that are recorded together must want the same number, or all of them hidden states.
        return_record: send the per-token record with the tokens: :mod:`osd.engine.backend.returned`.
        weights_version: the student weights to sample with. A version newer than the scheduler's resets the student's prefix
            cache. An older one ends the request in error. The worker refuses to run with weights of another version than the
            scheduler's. None: the version of the last request that named one.

    Raises:
        ValueError: a value of another type, an α outside [0, 1], or a negative ``mix_tokens``.
    """

    student_prompt_token_ids: list[int] | None = None
    alpha: float | None = None
    mix_tokens: int | None = None
    teacher_only: bool = False
    record: bool = False
    hidden: bool = False
    topk: int = 0
    return_record: bool = False
    weights_version: int | None = None

    def __post_init__(self) -> None:
        for name, (kind, what) in _KINDS.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
                raise ValueError(f"{name}={value!r:.200} is not {what}")
        if self.alpha is not None and not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha={self.alpha} is outside [0, 1]; 0 samples from the student, 1 from the teacher")
        if self.mix_tokens is not None and self.mix_tokens < 0:
            raise ValueError(f"mix_tokens={self.mix_tokens} is negative; 0 samples from the student alone, None always mixes")
        if self.hidden and self.topk:
            raise ValueError(f"topk={self.topk} with hidden=True: the record has one of them; leave the other out")

    def to_extra_args(self) -> dict[str, Any]:
        """Return the ``SamplingParams.extra_args`` entry that carries these options."""
        return {EXTRA_ARGS_KEY: {name: value for name, value in vars(self).items() if value != getattr(_DEFAULT, name)}}

    @classmethod
    def of(cls, sampling_params: Any) -> PairOptions:
        """Return the options of a request.

        Raises:
            ValueError: a key that is not an option, or a value that is out of range.
        """
        given = (getattr(sampling_params, "extra_args", None) or {}).get(EXTRA_ARGS_KEY)
        if not given:
            return _DEFAULT
        if not isinstance(given, Mapping):
            raise ValueError(f'extra_args["{EXTRA_ARGS_KEY}"]={given!r:.200} is not a mapping of options')
        check_names(given, [f.name for f in fields(cls)], f'extra_args["{EXTRA_ARGS_KEY}"]')
        return cls(**given)


def check_names(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise a ValueError for the first key of ``given`` that is not ``known``."""
    for name in given:
        if name not in known:
            raise ValueError(
                f"{where} has the unknown option {name!r}{suggest(name, known)}; the options are {', '.join(known)}"
            )


# The type of each option, and how an error describes it.
_FLAG = (bool, "true or false")
_KINDS: dict[str, tuple[Any, str]] = {
    "student_prompt_token_ids": (list, "a list of token ids"),
    "alpha": (Real, "a number from 0 to 1"),
    "mix_tokens": (Integral, "a whole number"),
    "topk": (Integral, "a whole number"),
    "weights_version": (Integral, "a whole number"),
    "teacher_only": _FLAG,
    "record": _FLAG,
    "hidden": _FLAG,
    "return_record": _FLAG,
}
_DEFAULT = PairOptions()

# vLLM's sampling parameters that act on q* before a token is drawn, or that need log q* itself; inactive at these values.
_ACTING: dict[str, tuple[Any, ...]] = {
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "min_tokens": (0,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "thinking_token_budget": (None,),
    "logprobs": (None,),
    "logprob_token_ids": (None, []),
}
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True, kw_only=True)
class SampledRequest:
    """Sampling options of a running request.

    Attributes:
        options: the pair's own.
        temperature, seed: as in vLLM's ``SamplingParams``.
        plain: tokens are drawn from q* itself: no other sampling parameter acts, and no logprobs are wanted.
        penalised: a penalty acts, which counts the tokens of a prompt.
    """

    options: PairOptions
    temperature: float
    seed: int
    plain: bool
    penalised: bool

    @classmethod
    def of(cls, params: Any, *, plain: bool = True) -> SampledRequest:
        """Return the options in vLLM's ``SamplingParams``; ``plain=False``: the engine has something else that acts on q*."""
        acting = [name for name, inactive in _ACTING.items() if getattr(params, name) not in inactive]
        return cls(
            options=PairOptions.of(params),
            temperature=params.temperature,
            seed=params.seed or 0,
            plain=plain and not acting,
            penalised=any(name in acting for name in _PENALTIES),
        )


@dataclass(frozen=True, kw_only=True)
class PairPrompt:
    """Token ids that each side reads before the completion."""

    teacher_token_ids: list[int]
    student_token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class PairCompletion:
    """The result of one request.

    Attributes:
        token_ids: the completion, including the token that ended it.
        text: its text without special tokens; empty with ``detokenize=False``.
        finish_reason: "stop", "length", "abort" or "error".
        stop_reason: the stop string or id that ended it, if one did.
        error: the reason of an error ("NaN in the student's logits"), or None.
        record: one row per token, or None if it was not asked for.
        weights_version: the student weights that sampled it, or its last token.
        teacher_prompt_tokens, student_prompt_tokens: prompt lengths.
        teacher_cached_tokens, student_cached_tokens: how much of each prompt was in that side's prefix cache.
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
class SideLimits:
    """One model's limits: ids below ``vocab_size``, sequences up to ``max_model_len`` tokens."""

    vocab_size: int
    max_model_len: int


def check_topk(k: int, vocab_size: int, name: str = "topk") -> None:
    """Raise a ValueError unless so many log-probabilities can be kept of a vocabulary; ``name`` of the option."""
    if not 1 <= k <= vocab_size:
        raise ValueError(f"{name}={k} is out of range: both models share {vocab_size} token ids; use 1 to {vocab_size}")


def check_request(
    prompt: PairPrompt, params: Any, limits: Mapping[str, SideLimits], *, options: PairOptions = _DEFAULT, name: str = ""
) -> None:
    """Raise unless both models can take a request; ``n`` is the caller's to check.

    Args:
        params: vLLM's ``SamplingParams``.
        limits: of "teacher" and "student".
        options: the pair's own of this request.
        name: of the prompt, which messages about it begin with.

    Raises:
        ValueError: naming the prompt or the parameter, its value and the fix.
    """
    if params.max_tokens is None:
        raise ValueError("sampling max_tokens is None; give the longest completion you want, in tokens")
    for parameter in ("prompt_logprobs", "trace_decode_token_ids"):
        if getattr(params, parameter) is not None:
            raise ValueError(f"sampling {parameter} is not supported by the paired engine; remove it")
    if options.topk:
        check_topk(options.topk, min(side.vocab_size for side in limits.values()))
    prompts = {"teacher": prompt.teacher_token_ids, "student": prompt.student_token_ids}
    for side, ids in prompts.items():
        if options.teacher_only and side == "student":
            continue
        vocab_size, longest = limits[side].vocab_size, limits[side].max_model_len
        if not ids:
            raise ValueError(f"{name}the {side}'s prompt is empty; give it at least one token")
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(i for i in ids if not 0 <= i < vocab_size)
            raise ValueError(f"{name}token id {wrong} is not one of the {side}'s {vocab_size} ids")
        if len(ids) + params.max_tokens > longest:
            raise ValueError(
                f"{name}the {side}'s prompt has {len(ids)} tokens, and with max_tokens={params.max_tokens} that "
                f"is over its max_model_len={longest}; shorten one or raise max_model_len (of a server: --max-model-len)"
            )


def draw_seeds(given: Sequence[int | None], own: int) -> list[int]:
    """Return a seed per request: the given one; for None, a number from torch's random state XOR the engine's own seed.

    A trainer saves and restores torch's random state with its checkpoints; the own seed differs between processes. One number
    is taken from that state for every request, whatever is given.
    """
    import torch  # the commands that check settings do without

    drawn = torch.randint(2**63 - 1, (len(given),)).tolist()
    return [seed ^ own if asked is None else asked for asked, seed in zip(given, drawn, strict=True)]


def one_each(name: str, given: Any, count: int) -> list[Any]:
    """Return one value per prompt, from one for all of them or from a sequence.

    Raises:
        ValueError: a sequence of another length.
    """
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{name} has {len(given)} entries for {count} prompts; give one each, or one for all")
    return list(given)
