"""The output layer of a vLLM model, found by what the model does with a hidden state, not by an attribute's name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from osd.engine.wire import pack


@torch.inference_mode()
def output_layer(model: Any, model_config: Any) -> tuple[Any, Tensor | None]:
    """Return the layer that makes logits (`lm_head`, `embed_out`, or the input embeddings), and its bias or None.

    The model computes the logits of one probe state. vLLM's `LogitsProcessor`, which every architecture ends with, is then
    given the layer and the state.

    Raises:
        ValueError: a model whose logits are not this layer's product with the hidden state, so that recorded hidden states
            would not give its distribution; the message says what to use instead.
    """
    calls: list[tuple[Any, ...]] = []

    def note(lm_head: Any, hidden_states: Tensor, embedding_bias: Tensor | None = None, **_: Any) -> None:
        calls.append((lm_head, hidden_states, embedding_bias))

    hooks = [
        module.register_forward_pre_hook(lambda _, args, kwargs: note(*args, **kwargs), with_kwargs=True)
        for module in model.modules()
        if isinstance(module, LogitsProcessor)
    ]
    weight = next(model.parameters())
    state = torch.linspace(-1, 1, model_config.get_hidden_size(), device=weight.device, dtype=model_config.dtype)[None]
    try:
        model.compute_logits(state)
    finally:
        for hook in hooks:
            hook.remove()
    name = type(model).__name__
    if len(calls) != 1 or not isinstance(getattr(calls[0][0], "weight", None), Tensor):
        raise ValueError(f"the teacher ({name}) has no single output layer; use teacher_signal='topk' or 'recompute'")
    layer, given, bias = calls[0]
    if layer.weight.shape[1:] != state.shape[1:] or not torch.equal(given, state):
        raise ValueError(
            f"the teacher ({name}) changes its hidden state before the output layer, or has quantized it; use "
            "teacher_signal='topk' or 'recompute'"
        )
    return layer, bias  # vLLM adds no bias of the layer that it is not given


def whole_output_layer(model: Any, model_config: Any) -> tuple[Tensor, Tensor | None]:
    """Return a model's output layer, weight [V, H] and bias [V] or None: by reference, or gathered from its shards."""
    layer, bias = output_layer(model, model_config)
    weight = layer.weight
    if getattr(layer, "tp_size", 1) > 1:
        weight = tensor_model_parallel_all_gather(weight, 0)
        bias = None if bias is None else tensor_model_parallel_all_gather(bias, 0)
    vocab_size = model_config.get_vocab_size()
    return weight[:vocab_size], None if bias is None else bias[:vocab_size]


def output_layer_rows(model: Any, model_config: Any, start: int, stop: int) -> bytes:
    """Return rows ``start`` to ``stop`` of a model's output layer as bytes, or those of them that this rank has."""
    layer, bias = output_layer(model, model_config)
    shard = getattr(layer, "shard_indices", None)
    first = 0 if shard is None else shard.org_vocab_start_index
    end = model_config.get_vocab_size() if shard is None else shard.org_vocab_end_index
    low, high = max(start, first), min(stop, end)
    if low >= high:
        return b""
    tensors = {"weight": layer.weight[low - first : high - first]}
    if bias is not None:
        tensors["bias"] = bias[low - first : high - first]
    return pack({"start": low}, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
