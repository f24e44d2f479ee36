"""Capture and replay of small CUDA graphs while other streams are running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class GraphPool:
    """Memory pool and capture stream shared by graphs that never run at the same time.

    cuBLAS keeps one workspace per stream, and graphs that run in parallel must not capture the same workspace. So the
    stream has high priority: PyTorch does not hand out such streams to other users.
    """

    def __init__(self) -> None:
        self._handle = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(priority=-1)
        # torch closes a pool permanently when its last graph is freed, so this graph keeps the pool open.
        self._keeps_open = self.capture(lambda: torch.zeros(1, device="cuda"))

    def capture(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Capture the launches of ``function`` without running them. Returns the graph and the result of ``function``.

        Every replay overwrites the tensors of that result; keep a reference to them. Does not use torch.cuda.graph, which
        synchronises, collects garbage and empties the allocator's cache.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                result = function()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, result
