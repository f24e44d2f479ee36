"""CUDA graphs of a few launches each, captured while other streams are at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class GraphPool:
    """What graphs that never run at the same time share: their memory, and the stream that they are captured on.

    The stream is of high priority only because such streams are not handed out to others: cuBLAS keeps a workspace for
    each stream, and two graphs that run side by side must not have captured the same one.
    """

    def __init__(self) -> None:
        self._handle = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(priority=-1)
        # torch closes a pool for good when its last graph goes, and the others may all be dropped for a while.
        self._keeps_open = self.capture(lambda: torch.zeros(1, device="cuda"))

    def capture(self, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of what ``function`` launches, and what it returned: memory that every replay writes, while it is held.

        Nothing is run. Not by torch.cuda.graph, which synchronises, collects garbage and empties the allocator's cache.
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
    """A function that reads and writes memory that stays where it is: called twice, then captured, and from then on replayed.

    Args:
        function: launches the same kernels on the same memory in every call; what it computes on the host is computed once.
        pool: where to capture it; None: it is simply called, every time.
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
            if self._pool is None or self._calls <= 2:  # kernels are compiled and loaded in the first
                return self._function()
            self._captured = self._pool.capture(self._function)
        graph, result = self._captured
        graph.replay()
        return result
