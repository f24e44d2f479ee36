"""Delivery of a Ctrl-C that arrives inside a destructor, where Python drops it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_AGAIN = 0.05  # seconds, longer than a destructor takes


@contextmanager
def kept_interrupts() -> Iterator[None]:
    """Deliver a KeyboardInterrupt again that Python dropped.

    Python cannot raise out of a destructor. It prints "Exception ignored" and goes on, so a Ctrl-C during a collection of
    garbage is lost. vLLM and the trainers collect garbage while they load models, which takes a second.
    """
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
        else:  # Send it later, and as a signal, which also ends a wait: raised here, it would be dropped again.
            timer = threading.Timer(_AGAIN, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
            timer.daemon = True
            timer.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
