"""Stopwatch for nested parts of a step. Every second is counted once, to the innermost running part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OTHER = "other"
PARTS = ("sync", "generate", "teacher", "student", "optimizer", OTHER)  # of a training step


class Stopwatch:
    """Timer of the parts of a step, which may be nested.

    When on, it drains the device at the start and end of each part, so that device work is counted to the part that
    launched it. When off, it does nothing.

    Args:
        drain: waits until the device has finished all launched work.
    """

    def __init__(self, drain: Callable[[], None]) -> None:
        self.drain = drain
        self.on = False
        self._seconds: dict[str, float] = {}
        self._running: list[str] = [OTHER]
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        self._count()
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def around(self, owner: Any, method: str, name: str | Callable[..., str | None]) -> None:
        """Count the calls of a method to the part ``name``.

        If ``name`` is a function, it returns the part for the arguments of a call, or None to leave the call uncounted.
        """
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            part = name if isinstance(name, str) else name(*args, **kwargs)
            if part is None:
                return call(*args, **kwargs)
            with self.part(part):
                return call(*args, **kwargs)

        setattr(owner, method, timed)

    def start(self) -> None:
        """Turn the stopwatch on and begin the first step, with the device drained."""
        self.drain()
        self.on, self._since = True, time.perf_counter()

    def lap(self) -> dict[str, float]:
        """Return the seconds of each part since the last lap. They add up to the elapsed time."""
        self._count()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _count(self) -> None:
        self.drain()
        now = time.perf_counter()
        name = self._running[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
