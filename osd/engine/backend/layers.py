"""Facts of a model before it loads, by vLLM: dtype, context, and the cache of each layer on one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from vllm import ModelRegistry, envs
from vllm.config import CacheConfig, ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from osd.engine.backend.configuration import refusal, refusals
from osd.engine.backend.language_model import as_text
from osd.engine.config import PairConfig

# Names of layer types in configurations of transformers.
_FULL = ("full_attention", "attention")
_STATES = ("linear_attention", "mamba", "conv")
_NONE = ("mlp", "moe")
# vLLM imports torchvision with Qwen3.5; the states of this class are the same.
_GATED_DELTA_NET = "Qwen3NextForCausalLM"


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """The cache of one layer on one GPU.

    Attributes:
        kind: "full attention", "sliding window", "chunked attention", "latent attention" or "recurrent state".
        size: bytes per token; of a recurrent state, bytes per request.
        tokens: the most tokens of a request that are kept; None keeps all.
    """

    kind: str
    size: int
    tokens: int | None = None

    def request_bytes(self, length: int) -> int:
        """Return the bytes of a request of ``length`` tokens, without vLLM's rounding to whole blocks."""
        if self.kind == "recurrent state":
            return self.size
        return self.size * min(length, self.tokens or length)


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts of one side, by vLLM's reading of its configuration.

    Attributes:
        dtype: the name of its weights' type, such as "bfloat16".
        itemsize: bytes of a weight that is not quantized.
        context: the longest sequence in tokens.
        quantization: vLLM's name of the method, or None.
        refused_here: why the platform of this machine does not run that method; empty if it does.
        no_drafts: why it cannot take part in speculation; empty if it can.
        layers: one entry per cache; those of layers that share another's cache are left out. None: unknown.
        unknown: why `layers` is None.
    """

    dtype: str
    itemsize: int
    context: int
    quantization: str | None
    refused_here: str
    no_drafts: str
    layers: list[LayerCache] | None
    unknown: str = ""


def model_facts(config: PairConfig, side: str, gpus: int) -> ModelFacts:
    """Describe "teacher" or "student" under tensor parallelism over ``gpus``; loads no weights.

    The quantization may be one that this machine cannot run, as the pair may run on another one.

    Raises:
        ValueError: a configuration that vLLM refuses.
    """
    model = _model_config(config, side)
    layers, unknown = None, ""
    try:
        layers = list(_layers(model, gpus))
    except Exception as error:  # of vLLM's model classes, which read what they need from configurations of every kind
        unknown = refusal(error)
    return ModelFacts(
        dtype=str(model.dtype).removeprefix("torch."),
        itemsize=model.dtype.itemsize,
        context=model.max_model_len,
        quantization=model.quantization,
        refused_here=_refused_here(model.quantization),
        no_drafts=no_drafts(side, model),
        layers=layers,
        unknown=unknown,
    )


def no_drafts(side: str, model: ModelConfig) -> str:
    """Return why "teacher" or "student" cannot take part in speculation; empty if it can."""
    reason = ""
    if model.has_inner_state and side == "teacher":
        reason = "recurrent layers (Mamba, linear attention, convolutions), whose state cannot go back by a rejected draft"
    elif side == "teacher" and model.use_mla and current_platform.is_cpu() and not torch.cpu._is_amx_tile_supported():
        reason = "latent attention (MLA), whose kernel on this CPU cannot verify several drafts at once"
    return f"the {side} {model.model!r} has {reason}; use num_speculative_tokens=0" if reason else ""


def without_cached_states(config: PairConfig) -> PairConfig:
    """Return a pair whose prefix caches hold no recurrent states that must not be cached.

    These are all on a CPU, where vLLM 0.32 ends the engine at some of them, and those of a student that drafts, because cached
    states move between blocks.

    Raises:
        ValueError: a prefix cache that was asked for and must be off; a side that cannot take part in speculation.
    """
    for side in ("teacher", "student"):
        model, kwargs = _model_config(config, side), config.side_kwargs(side)
        drafts = config.num_speculative_tokens != 0
        if drafts and (reason := no_drafts(side, model)):
            raise ValueError(f"num_speculative_tokens: {reason}")
        goes_back = drafts and side == "student"
        if not model.has_inner_state or not (goes_back or current_platform.is_cpu()):
            continue
        own = f"{side}_kwargs"
        if kwargs.get("enable_prefix_caching"):
            field = own if "enable_prefix_caching" in getattr(config, own) else "engine_kwargs"
            why = "go back by a rejected draft (num_speculative_tokens)" if goes_back else "vLLM cannot cache on a CPU"
            raise ValueError(
                f"the {side} {model.model!r} has recurrent layers (Mamba, linear attention), whose states {why}; "
                f"set {field}['enable_prefix_caching']=False"
            )
        quiet = {**getattr(config, own), "enable_prefix_caching": False}
        config = replace(config, teacher_kwargs=quiet) if side == "teacher" else replace(config, student_kwargs=quiet)
    return config


def _model_config(config: PairConfig, side: str) -> ModelConfig:
    arguments = as_text({**config.side_kwargs(side), "model": getattr(config, side), "max_model_len": None})
    with (
        mock.patch.object(envs, "VLLM_ENABLE_V1_MULTIPROCESSING", True, create=True),  # no engine: no warning about its seed
        mock.patch.object(type(current_platform), "verify_quantization"),
        refusals(),
    ):
        return EngineArgs(**arguments).create_model_config()


def _refused_here(quantization: str | None) -> str:
    try:
        if quantization:
            current_platform.verify_quantization(quantization)
    except ValueError as error:
        return str(error)
    return ""


def _layers(model: ModelConfig, gpus: int) -> Iterator[LayerCache]:
    text = model.hf_text_config
    kinds = _kinds(model)
    owners = len(kinds) - (getattr(text, "num_kv_shared_layers", None) or 0)
    # In Falcon-H1 every layer has attention and a state.
    stateful = model.is_hybrid and not any(kind in _STATES for kind in kinds)
    for index, kind in enumerate(kinds[:owners]):
        if kind in _STATES or kind == "hybrid" or stateful:
            yield LayerCache(kind="recurrent state", size=_state_bytes(model, gpus))
        if kind in _STATES or kind in _NONE:
            continue
        arch = model.model_arch_config[index]
        heads = 1 if model.use_mla else max(1, arch.total_num_kv_heads // gpus)
        size = (1 if model.use_mla else 2) * heads * arch.head_size * model.dtype.itemsize
        if kind == "sliding_attention":
            yield LayerCache(kind="sliding window", size=size, tokens=model.get_sliding_window())
        elif kind == "chunked_attention":
            yield LayerCache(kind="chunked attention", size=size, tokens=text.attention_chunk_size)
        elif kind in _FULL or kind == "hybrid":
            yield LayerCache(kind="latent attention" if model.use_mla else "full attention", size=size)
        else:
            raise ValueError(f"the cache of a layer of type {kind!r} is not known")


def _kinds(model: ModelConfig) -> list[str]:
    """Return the type of each layer, as configurations name it."""
    text, count = model.hf_text_config, model.get_total_num_hidden_layers()
    if model.is_attention_free:
        return ["mamba"] * count
    named = getattr(text, "layers_block_type", None) or getattr(text, "layer_types", None)
    if named is not None:
        return list(named)
    return ["sliding_attention" if model.get_sliding_window() else "full_attention"] * count


def _state_bytes(model: ModelConfig, gpus: int) -> int:
    """Return the bytes of one layer's state of one request, by vLLM's class of the model."""
    text: Any = model.hf_text_config
    declared = getattr(text, "mamba_ssm_dtype", None) or getattr(text, "mamba_ssm_cache_dtype", None) or "auto"
    same_states = [_GATED_DELTA_NET] if hasattr(text, "linear_num_value_heads") else []
    model_class: Any = ModelRegistry.resolve_model_cls([*model.architectures, *same_states], model)[0]
    given = SimpleNamespace(
        model_config=model,
        cache_config=CacheConfig(mamba_ssm_cache_dtype=declared),
        parallel_config=SimpleNamespace(tensor_parallel_size=gpus),
        num_speculative_tokens=0,
        speculative_config=None,
    )
    shapes = model_class.get_mamba_state_shape_from_config(given)
    dtypes = model_class.get_mamba_state_dtype_from_config(given)
    return sum(prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
