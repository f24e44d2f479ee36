"""Engine arguments for TRL's generator `VLLMGeneration` that TRL has no option for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from trl.generation import vllm_generation

PACK = "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm"


@contextmanager
def engine_arguments(**kwargs: Any) -> Iterator[None]:
    """Pass these arguments to the `LLM` that TRL creates in this block. Arguments that TRL sets take precedence.

    Also keeps vLLM from packing weights on a CPU, because TRL's weight sync fails on packed weights.
    """

    def plain_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    packing = nullcontext() if torch.cuda.is_available() else mock.patch(PACK, plain_linear)
    with mock.patch.object(vllm_generation, "LLM", functools.partial(vllm_generation.LLM, **kwargs)), packing:
        yield
