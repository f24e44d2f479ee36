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


class Replayed:
    """Function that is called twice, then captured, and replayed from then on.

    Args:
        function: launches the same kernels on the same memory in every call. Its host code does not run in a replay.
        pool: the pool for the capture. None: call the function every time.
    """

    def __init__(self, function: Callable[[], Any], pool: GraphPool | None) -> None:
        self._function, self._pool = function, pool
        self._calls = 0
        self._captured: tuple[torch.cuda.CUDAGraph, Any] | None = None

    @property
    def captured(self) -> bool:
        return self._captured is not None

    def __call__(self) -> Any:
        if self._captured is None:
            self._calls += 1
            if self._pool is None or self._calls <= 2:  # the first call compiles and loads kernels
                return self._function()
            self._captured = self._pool.capture(self._function)
        graph, result = self._captured
        graph.replay()
        return result
