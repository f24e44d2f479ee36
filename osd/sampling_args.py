"""Sampling arguments of every entry: one table of what is taken, translated and refused, checked before any model loads.

The names are those of ``vllm.SamplingParams``. The sampler, the trainer (`generation_kwargs`), the drop-in generator and the
data commands call :func:`checked_sampling`; none of them has rules of its own. Imports neither vLLM nor torch.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from osd.core import suggest


@dataclass(frozen=True)
class _Rule:
    """One argument that is taken: the values it accepts, in words and as a test, and their translation for vLLM."""

    wanted: str
    accepts: Callable[[Any], bool]
    translate: Callable[[Any], Any] = lambda value: value


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(wanted: str, accepts: Callable[[float], bool]) -> _Rule:
    return _Rule(
        wanted, lambda v: isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v) and accepts(float(v)), float
    )


def _whole(wanted: str, accepts: Callable[[int], bool]) -> _Rule:
    return _Rule(wanted, lambda v: _is_int(v) and accepts(int(v)), int)


def _each(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(accepts, value))


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        (_is_int(key) or str(key).isdecimal()) and isinstance(bias, Real) and bias < math.inf for key, bias in value.items()
    )


def _object(value: Any) -> bool:
    return value is not None and not isinstance(value, (str, Real, list, tuple))


_FLAG = _Rule("true or false", lambda v: isinstance(v, bool))
_PENALTY = _number("a number from -2 to 2 (0: off)", lambda v: -2 <= v <= 2)
_IDS = _Rule("a list of token ids", lambda v: _each(v, lambda i: _is_int(i) and i >= 0), lambda v: [int(i) for i in v])
# The kinds of vllm's StructuredOutputsParams; a mapping has exactly one of them.
_STRUCTURES = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")

TAKEN: dict[str, _Rule] = {
    "max_tokens": _whole("a whole number of tokens, at least 1", lambda v: v >= 1),
    "min_tokens": _whole("a whole number of tokens, at least 0", lambda v: v >= 0),
    # vLLM raises a temperature between 0 and 0.01 to 0.01, with a line in its log.
    "temperature": _number("0 (greedy) or a number from 0.01 to 2", lambda v: v == 0 or 0.01 <= v <= 2),
    "top_p": _number("a number above 0 and up to 1 (1: off)", lambda v: 0 < v <= 1),
    "top_k": _whole("a whole number, at least 1 (0 or -1: off)", lambda v: v >= -1),
    "min_p": _number("a number from 0 to 1 (0: off)", lambda v: 0 <= v <= 1),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": _number("a number above 0 (1: off)", lambda v: v > 0),
    "seed": _whole("a whole number from 0 to 2^63 - 1", lambda v: 0 <= v < 2**63),
    "n": _whole("a whole number, at least 1", lambda v: v >= 1),
    "stop": _Rule("a text or a list of texts, none of them empty", lambda v: _text(v) or _each(v, _text)),
    "stop_token_ids": _IDS,
    "ignore_eos": _FLAG,
    "include_stop_str_in_output": _FLAG,
    "detokenize": _FLAG,
    "skip_special_tokens": _FLAG,
    "spaces_between_special_tokens": _FLAG,
    "logit_bias": _Rule(
        "a mapping of token ids to numbers", _bias, lambda v: {int(key): float(bias) for key, bias in v.items()}
    ),
    "allowed_token_ids": _Rule("a list of token ids, not empty", lambda v: _IDS.accepts(v) and len(v) > 0, _IDS.translate),
    "bad_words": _Rule("a list of texts, none of them empty", lambda v: _each(v, _text), list),
    "structured_outputs": _Rule(
        f"vLLM's StructuredOutputsParams, or a mapping with exactly one of {', '.join(_STRUCTURES)}",
        lambda v: sum(key in v for key in _STRUCTURES) == 1 if isinstance(v, Mapping) else _object(v),
    ),
    "thinking_token_budget": _whole("a whole number of tokens (-1: no limit)", lambda v: v >= -1),
    "repetition_detection": _Rule("vLLM's RepetitionDetectionParams", lambda v: _object(v) and not isinstance(v, Mapping)),
    "skip_reading_prefix_cache": _FLAG,
    "extra_args": _Rule(
        "a mapping without the key 'osd', which is the pair's", lambda v: isinstance(v, Mapping) and "osd" not in v
    ),
}

_RECORD = "read the per-token record instead (logq, logp_theta, logp_teacher of every sampled token)"
_OURS = "the paired engine sets it; completions come back when they are finished"
_PROMPT = "the record covers completions only; score a prompt with the model itself"

REFUSED: dict[str, str] = {
    "logprobs": _RECORD,
    "logprob_token_ids": _RECORD,
    "flat_logprobs": _RECORD,
    "prompt_logprobs": _PROMPT,
    "prompt_logprob_token_ids": _PROMPT,
    "prompt_logprob_start": _PROMPT,
    "output_kind": _OURS,
    "stream_interval": _OURS,
    "skip_clone": _OURS,
    "output_text_buffer_length": _OURS,
    "watermarking": "the paired engine replaces the sampler that vLLM's watermark is part of",
    "routed_experts_prompt_start": "the paired engine does not return routed experts",
    "trace_decode_token_ids": "the paired engine draws every token from q*; it replays none",
    # Arguments of other samplers: transformers' `generate`, the OpenAI API, earlier versions of vLLM.
    "max_new_tokens": "vLLM calls it max_tokens",
    "max_completion_tokens": "vLLM calls it max_tokens",
    "max_length": "use max_tokens, which does not count the prompt",
    "min_new_tokens": "vLLM calls it min_tokens",
    "num_return_sequences": "vLLM calls it n",
    "do_sample": "use temperature=0 for greedy sampling, or leave it out",
    "num_beams": "q* is sampled, not searched; leave it out",
    "use_beam_search": "q* is sampled, not searched; leave it out",
    "best_of": "use n and choose among the completions",
    "length_penalty": "q* is sampled, not searched; leave it out",
    "early_stopping": "q* is sampled, not searched; leave it out",
    "no_repeat_ngram_size": "use repetition_penalty",
    "eos_token_id": "use stop_token_ids",
    "stop_strings": "vLLM calls it stop",
    "bad_words_ids": "use bad_words, which takes texts",
    "guided_decoding": "use structured_outputs",
    "guided_json": "use structured_outputs={'json': ...}",
    "guided_regex": "use structured_outputs={'regex': ...}",
    "guided_choice": "use structured_outputs={'choice': [...]}",
    "guided_grammar": "use structured_outputs={'grammar': ...}",
    "response_format": "use structured_outputs",
    "logits_processors": "no function can act on q* inside the engine; use logit_bias, allowed_token_ids or bad_words",
    "chat_template_kwargs": "it is no sampling argument; give it where prompts are rendered",
}

_SAME_NOISE = "it would give every sample the same noise"
# Sampling fields that the trainer, the drop-in generator and the data commands have beside `generation_kwargs`.
FIELDS = ("max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_HARMLESS = {"n": 1, "detokenize": True}
# Arguments that one entry refuses besides, with the reason and the fix.
TRAINING = {
    "n": "training draws one completion per row; repeat rows or raise the batch size instead",
    "seed": f"{_SAME_NOISE}; set `seed` of the configuration, which seeds the engine",
}
DROP_IN = {
    "n": "the trainer repeats prompts itself (num_generations)",
    "seed": f"{_SAME_NOISE}; start the engine with engine_kwargs={{'seed': ...}}",
}
DATA_COMMANDS = {
    "n": "set num_samples",
    "seed": f"{_SAME_NOISE}; set `seed`, from which each sample's own is derived",
    "detokenize": "the text of a completion is a column of the data",
}


def checked_sampling(
    arguments: Mapping[str, Any], *, where: str = "", refused: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Check sampling arguments and return them as vLLM takes them.

    Arguments that are None keep vLLM's default and are left out (except ``max_tokens``, which has no default here).

    Args:
        arguments: by their names in ``vllm.SamplingParams``.
        where: the setting that holds them ("generation_kwargs"), for the error text.
        refused: arguments that this entry refuses besides, each with the reason and the fix. Harmless values pass (n=1).

    Raises:
        ValueError: an unknown argument, one that the pair cannot honour, or a value out of range; naming it and the fix.
    """
    checked = {}
    for name, value in arguments.items():
        label = f"{where}[{name!r}]" if where else name
        if value is None and name in TAKEN.keys() | REFUSED.keys() and name != "max_tokens":
            continue
        if name in REFUSED:
            if value is not False:
                raise ValueError(f"{label}={value!r} is not supported: {REFUSED[name]}")
            continue
        if name not in TAKEN:
            known = suggest(name, TAKEN) or f"; those taken are {', '.join(TAKEN)}"
            raise ValueError(f"{label}={value!r} is not a sampling argument{known}")
        rule = TAKEN[name]
        if not rule.accepts(value):
            raise ValueError(f"{label}={value!r} must be {rule.wanted}")
        if refused and name in refused and value != _HARMLESS.get(name):
            raise ValueError(f"{label}={value!r} cannot be used here: {refused[name]}")
        checked[name] = rule.translate(value)
    _check_together(checked, where)
    return checked


def checked_fields(
    fields: Mapping[str, Any], generation_kwargs: Mapping[str, Any], *, refused: Mapping[str, str]
) -> dict[str, Any]:
    """Check an entry's sampling fields and its `generation_kwargs`, which win. Return `generation_kwargs` in vLLM's form.

    Args:
        fields: the values of FIELDS.
        generation_kwargs: further arguments.
        refused: as for :func:`checked_sampling`.

    Raises:
        ValueError: as :func:`checked_sampling`.
    """
    own = {_vllm_name(name): value for name, value in fields.items()}
    if not TAKEN["max_tokens"].accepts(own["max_tokens"]):
        raise ValueError(f"max_completion_length={own['max_tokens']!r} must be {TAKEN['max_tokens'].wanted}")
    extra = checked_sampling(generation_kwargs, where="generation_kwargs", refused=refused)
    _check_together({**checked_sampling(own), **extra}, "generation_kwargs")
    return extra


def as_vllm_arguments(settings: Any, generation_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry's sampling as arguments of ``vllm.SamplingParams``.

    Args:
        settings: an object with the attributes FIELDS.
        generation_kwargs: further arguments, as `checked_sampling` returns them; they win.
    """
    fields = {_vllm_name(name): getattr(settings, name) for name in FIELDS}
    return {**fields, "min_p": settings.min_p or 0.0, **generation_kwargs}


def _vllm_name(field: str) -> str:
    return "max_tokens" if field == "max_completion_length" else field


def _check_together(checked: Mapping[str, Any], where: str) -> None:
    """Refuse values that contradict each other."""
    prefix = f"{where}: " if where else ""
    shortest, longest = checked.get("min_tokens", 0), checked.get("max_tokens")
    if longest is not None and shortest > longest:
        raise ValueError(f"{prefix}min_tokens={shortest} is above max_tokens={longest}; lower it")
    if checked.get("stop") and checked.get("detokenize") is False:
        raise ValueError(f"{prefix}stop={checked['stop']!r} needs the text of the completion; leave detokenize true")
    if checked.get("n", 1) > 1 and checked.get("temperature") == 0:
        raise ValueError(f"{prefix}n={checked['n']} with temperature=0 would give equal completions; use n=1 or a temperature")


def derived_seeds(seed: int | None, prompts: Iterable[Hashable]) -> list[int | None]:
    """Give each request its own seed, so that repeated prompts get different completions.

    The first request of a prompt gets ``seed`` itself, each repetition a seed derived from it and its number. So a request's
    seed does not depend on the other prompts of the batch, and ``n=2`` samples the same as giving a prompt twice.

    Args:
        seed: of the call; None leaves every request unseeded.
        prompts: one hashable key per request, equal for equal prompts.
    """
    seen: Counter[Hashable] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(seed if seed is None or not seen[prompt] else _derived(seed, seen[prompt]))
        seen[prompt] += 1
    return seeds


def _derived(seed: int, repetition: int) -> int:
    digest = hashlib.sha256(f"{seed} {repetition}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11
