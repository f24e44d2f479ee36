"""Progress bars of `osd generate` and `osd compare`."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from tqdm import tqdm

from osd.data.writer import Counts

RUNNING = "{n_fmt}/{total_fmt} samples |{bar}| {desc} | {elapsed} passed, {remaining} left"


class SampleBar(tqdm):
    """A bar of samples. It shows no times until the first sample is done: loading says nothing about the time left."""

    def __init__(self, total: int, *, done: int = 0, quiet: bool = False) -> None:
        super().__init__(
            total=total,
            initial=done,
            unit="sample",
            file=sys.stderr,
            bar_format="{n_fmt}/{total_fmt} samples: loading the models, then sampling",
            smoothing=0,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file needs no animation
            dynamic_ncols=True,
            disable=quiet,
        )

    def begin(self) -> None:
        """Measure the time from now on."""
        self.bar_format = RUNNING
        self.start_t = self.last_print_t = time.time()


class Progress:
    """Samples done, tokens per second, mean α, what was kept, removed and rejected, and the time left.

    Args:
        total: samples of this process.
        counts: of the shards that an earlier run finished.
        done: the number of samples in those shards.
        quiet: display nothing.
    """

    def __init__(self, total: int, counts: Counts, done: int, *, quiet: bool = False) -> None:
        self.committed, self.counts = counts, counts
        self.bar = SampleBar(total, done=done, quiet=quiet)
        self._drawn_tokens = self._ahead = 0
        self._start: float | None = None

    def tokens(self, count: int) -> None:
        """Count a finished completion of that many tokens."""
        if self._start is None:
            self._start = time.perf_counter()
            self.bar.begin()
        self._drawn_tokens += count
        self._ahead += 1
        self._describe()
        self.bar.update()

    def batch(self, samples: int, counts: Counts) -> None:
        """Count a finished batch of that many samples; `counts` are those of its shard so far."""
        self.counts = self.committed + counts
        self._describe()
        self.bar.update(samples - self._ahead)  # rejected ones never reached the engine
        self._ahead = 0

    def shard(self, counts: Counts) -> None:
        """Count a committed shard."""
        self.committed = self.counts = self.committed + counts

    def _describe(self) -> None:
        counts, seconds = self.counts, time.perf_counter() - (self._start or math.inf)
        speed = f"{self._drawn_tokens / seconds:,.0f} tokens/s" if seconds > 0.5 else "-- tokens/s"
        alpha = "--" if math.isnan(counts.alpha_mean) else f"{counts.alpha_mean:.2f}"
        removed = sum(counts.removed.values())
        kept = f"{counts.kept} kept, {removed} removed, {counts.rejected} rejected"
        self.bar.set_description_str(f"{speed}, α {alpha}, {kept}", refresh=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.bar.refresh()
        self.bar.close()
