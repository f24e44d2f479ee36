"""Replay of `mix_and_draw` as CUDA graphs, one per set of input addresses.

Launching six kernels with about twenty arguments each takes the host longer than the kernels take the GPU. In steady
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
from osd.kernels.uniform import uniform

_KEPT = 32  # graphs; one is a few kilobytes of device memory

# A graph with its output tensors. It holds no reference to its inputs: the allocator could not reuse their addresses.
_Captured = tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]


class ReplayedDraw:
    """Draws tokens from raw logits, with their record; captures a CUDA graph when a set of addresses comes back.

    Attributes:
        replayed: how many calls were replays.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Any, _Captured | None] = OrderedDict()
        self._pool: GraphPool | None = None
        self.replayed = 0

    @torch.no_grad()
    def __call__(
        self, logits_theta: Tensor, logits_teacher: Tensor, config: MixingConfig, *, vocab_size: int, **tensors: Any
    ) -> tuple[Tensor, Tensor]:
        """Draw one token per row.

        tensors: ``rows_theta``, ``rows_teacher``, ``temperature`` and ``alpha`` as in `mix_and_draw`; ``seed`` and
        ``length`` as in `osd.kernels.uniform.uniform`, for the rows that are mixed.

        Returns (drawn_2P, values_PR), in memory of their own: ids >= 0 and bad sides, int32 [2, P], and the record, float32.
        """

        def run() -> tuple[Tensor, Tensor]:
            return _draw(logits_theta, logits_teacher, config, vocab_size=vocab_size, **tensors)

        key = (config, vocab_size, _address(logits_theta), _address(logits_teacher), *map(_address, tensors.values()))
        if key not in self._graphs:
            # Capture only addresses that come back: launch on the first call, capture on the second.
            self._keep(key, None)
            return run()
        captured = self._graphs[key]
        if captured is None:
            self._pool = self._pool or GraphPool()
            captured = self._pool.capture(run)
            self._keep(key, captured)
        self._graphs.move_to_end(key)
        graph, (drawn_2P, values_PR) = captured
        graph.replay()
        self.replayed += 1
        return drawn_2P.clone(), values_PR.clone()

    def _keep(self, key: Any, captured: _Captured | None) -> None:
        self._graphs[key] = captured
        if len(self._graphs) > _KEPT:
            self._graphs.popitem(last=False)


def _draw(
    logits_theta: Tensor, logits_teacher: Tensor, config: MixingConfig, *, seed: Tensor, length: Tensor, **arguments: Any
) -> tuple[Tensor, Tensor]:
    mixed = mix_and_draw(logits_theta, logits_teacher, config, uniform=uniform(seed, length), **arguments)
    assert mixed.token_P is not None
    return torch.stack((mixed.token_P, -1 - mixed.token_P)).clamp_(min=0), mixed.values_PR


def _address(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
