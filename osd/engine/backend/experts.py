"""Mixtures of experts: new weights for layers whose weights vLLM has rearranged for its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload import finalize_layerwise_processing, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform


@contextmanager
def loading_experts(model: torch.nn.Module, model_config: Any, *, partial: bool) -> Iterator[None]:
    """Let the body load weights into a model that ran already; with ``partial``, a layer of experts may get none.

    vLLM's layerwise reload gathers the weights of a layer, rearranges them and copies them to where its kernels read them.

    Raises:
        ValueError: a layer of experts that did not get all of its weights.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RoutedExperts)}
    kernels = {name: _forget_kernel(layer.quant_method) for name, layer in layers.items()}
    for layer in layers.values():
        initialize_layerwise_reload(layer)
    try:
        yield
        for name, layer in layers.items():
            info = get_layerwise_info(layer)  # reset once the layer is whole
            if info.can_load() and (info.load_numel or not partial):
                raise ValueError(
                    f"the weight sync has {info.load_numel} of the {info.load_numel_total} weights of {name}; push every expert"
                )
    finally:
        for name, layer in layers.items():
            finalize_layerwise_processing(layer, model_config)
            if layer.quant_method.moe_kernel is None:  # it got no weights
                layer.quant_method.moe_kernel = kernels[name]


def _forget_kernel(method: Any) -> Any:
    """Make vLLM rearrange a layer's weights as at the first time, on a CPU; return the layer's kernel.

    Symptom: wrong logits after a reload. Cause: vLLM packs experts for the CPU where it makes their kernel, and at a reload it
    keeps the kernel. Versions: 0.32. To be removed when `UnquantizedFusedMoEMethod` packs them again.
    """
    kernel = method.moe_kernel
    if current_platform.is_cpu():
        method.moe_kernel = None
    return kernel
