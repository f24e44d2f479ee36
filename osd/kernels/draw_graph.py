"""Replay of `mix_and_draw` as CUDA graphs, one per set of input addresses.

Launching five kernels with about twenty arguments each takes the host longer than the kernels take the GPU. In steady
decoding the logits have the same addresses at almost every step, so a graph captured for a set of addresses serves nearly
all steps.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from osd.core import MixingConfig
from osd.kernels.fused import mix_and_draw
from osd.kernels.graph import GraphPool

_KEPT = 32  # graphs kept; each takes a few kilobytes of device memory

# The graph with its output tensors. It holds no reference to its inputs: the allocator could not reuse their addresses.
_Captured = tuple[torch.cuda.CUDAGraph, Tensor, Tensor]


class ReplayedDraw:
    """Cache of captured `mix_and_draw` graphs, keyed by configuration and input addresses.

    Arguments and results are those of `mix_and_draw`.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Any, _Captured | None] = OrderedDict()
        self._pool: GraphPool | None = None
        self.replayed = 0  # number of calls served by a replay

    @torch.no_grad()
    def __call__(
        self,
        logits_theta: Tensor,
        logits_teacher: Tensor,
        config: MixingConfig,
        *,
        vocab_size: int,
        rows_theta: Tensor | None,
        rows_teacher: Tensor | None,
        temperature: Tensor,
        alpha: Tensor | None,
        uniform: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return (token_P, values_PR) as copies that later calls do not overwrite."""
        tensors = (logits_theta, logits_teacher, rows_theta, rows_teacher, temperature, alpha, uniform)
        key = (config, vocab_size, *map(_address, tensors))
        arguments: dict[str, Any] = dict(
            vocab_size=vocab_size,
            rows_theta=rows_theta,
            rows_teacher=rows_teacher,
            temperature=temperature,
            alpha=alpha,
            uniform=uniform,
        )
        if key not in self._graphs:
            # Capture only addresses that come back: launch on the first call, capture on the second.
            self._keep(key, None)
            mixed = mix_and_draw(logits_theta, logits_teacher, config, **arguments)
            assert mixed.token_P is not None
            return mixed.token_P, mixed.values_PR
        captured = self._graphs[key]
        if captured is None:
            captured = self._capture(logits_theta, logits_teacher, config, arguments)
            self._keep(key, captured)
        self._graphs.move_to_end(key)
        graph, token_P, values_PR = captured
        graph.replay()
        self.replayed += 1
        return token_P.clone(), values_PR.clone()

    def _keep(self, key: Any, captured: _Captured | None) -> None:
        self._graphs[key] = captured
        if len(self._graphs) > _KEPT:
            self._graphs.popitem(last=False)

    def _capture(
        self, logits_theta: Tensor, logits_teacher: Tensor, config: MixingConfig, arguments: dict[str, Any]
    ) -> _Captured:
        self._pool = self._pool or GraphPool()
        graph, mixed = self._pool.capture(lambda: mix_and_draw(logits_theta, logits_teacher, config, **arguments))
        assert mixed.token_P is not None
        return graph, mixed.token_P, mixed.values_PR


def _address(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
