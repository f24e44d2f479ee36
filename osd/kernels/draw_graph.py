"""`mix_and_draw` replayed as a CUDA graph, for a caller that gives it the same memory again and again.

Launching five kernels with some twenty arguments each takes the host longer than the kernels take the GPU. In steady decoding
the logits are written to the same memory step after step (osd.engine.forward), so a graph captured for a set of addresses
fits nearly all of them.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from osd.core import MixingConfig
from osd.kernels.fused import mix_and_draw
from osd.kernels.graph import GraphPool

_KEPT = 32  # graphs; one is a few kilobytes of device memory

# The graph, with the token and the values that it writes. Not its inputs: what is kept alive is never handed out again.
_Captured = tuple[torch.cuda.CUDAGraph, Tensor, Tensor]


class ReplayedDraw:
    """Tokens and their record from raw logits; arguments and results as in `mix_and_draw`."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Any, _Captured | None] = OrderedDict()
        self._pool: GraphPool | None = None
        self.replayed = 0  # how many calls were replays, for whoever wants to know

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
        """(token_P, values_PR), in memory of their own."""
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
            # These addresses may never come back; the second time they do.
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
