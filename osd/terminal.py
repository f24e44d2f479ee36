"""Terminal output of the commands: a display of what loads, and the libraries' known noise silenced."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tqdm import tqdm

STEADY = 30  # seconds between lines where stderr is a file


class Loading(AbstractContextManager["Loading"]):
    """Display on stderr of what is loading and for how long; a line says how long it took.

    On a terminal one line is updated every second. In a log file a line is written at the start and every 30 seconds.

    Args:
        what: the things that load, for example from `models`.
        quiet: display nothing.
    """

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        self.what, self.quiet = what, quiet
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Loading:
        self._start = time.perf_counter()
        if not self.quiet:
            self._say(f"loading {self.what}")
            self._thread.start()
        return self

    def __exit__(self, kind: Any, *exc_info: object) -> None:
        if self.quiet:
            return
        self._done.set()
        self._thread.join()
        if kind is None:
            self._say(f"loaded in {self._seconds():.0f} s")

    def _tick(self) -> None:
        animated = sys.stderr.isatty()
        bar = tqdm(desc="loading", bar_format="{desc}: {elapsed} elapsed", file=sys.stderr, leave=False, disable=not animated)
        while not self._done.wait(1 if animated else STEADY):
            if animated:
                bar.refresh()
            else:
                self._say(f"still loading after {self._seconds():.0f} s")
        bar.close()

    def _seconds(self) -> float:
        return time.perf_counter() - self._start

    @staticmethod
    def _say(line: str) -> None:
        tqdm.write(line, file=sys.stderr)


def models(**paths: str) -> str:
    """Name models and, where they are local folders, the size of their weights: "teacher t (6.2 GB), student s"."""
    return ", ".join(f"{name.replace('_', ' ')} {path}{_size(Path(path))}" for name, path in paths.items())


def _size(folder: Path) -> str:
    weights = [file for pattern in ("*.safetensors", "*.bin", "*.gguf") for file in folder.glob(pattern)]
    total = sum(file.stat().st_size for file in weights)
    return f" ({total / 1e9:.1f} GB)" if total >= 5e7 else ""


def silence_libraries() -> None:
    """Silence log lines and warnings that the libraries print in every run and that need no action. Call before vLLM's import.

    The environment reaches the engine's processes too. A variable that is set already is left alone, so that
    VLLM_LOGGING_LEVEL=INFO shows vLLM's log.
    """
    for name, value in {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",  # it warns of every fork
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # the NUMA binding of vLLM's CPU build
    }.items():
        os.environ.setdefault(name, value)
    ignored = ("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:multiprocessing.resource_tracker")
    os.environ.setdefault("PYTHONWARNINGS", ",".join(ignored))
    # vLLM logs about Triton before it sets up its logger.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
