"""Where the seconds of a step go: every second is counted once, to the innermost part that was running."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OTHER = "other"
PARTS = ("sync", "generate", "teacher", "student", "optimizer", OTHER)  # of a training step


class Stopwatch:
    """Times parts of a step, which may be nested.

    While it is on, the device is drained where a part begins and ends, so that its work is counted to the part that launched
    it. While it is off it does nothing.

    Args:
        drain: waits until the device has done all that was launched.
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
        """Count each call of an object's method to a part, or to the one that ``name`` makes of its arguments (None: none)."""
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            part = name if isinstance(name, str) else name(*args, **kwargs)
            if part is None:
                return call(*args, **kwargs)
            with self.part(part):
                return call(*args, **kwargs)

        setattr(owner, method, timed)

    def start(self) -> None:
        """Begin the first step, with the device drained."""
        self.drain()
        self.on, self._since = True, time.perf_counter()

    def lap(self) -> dict[str, float]:
        """The seconds of each part since the last lap; they add up to the time that has passed."""
        self._count()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _count(self) -> None:
        self.drain()
        now = time.perf_counter()
        name = self._running[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
