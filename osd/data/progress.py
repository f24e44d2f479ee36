"""The progress bar of `osd generate`."""

from __future__ import annotations

import math
import sys
import time

from tqdm import tqdm

from osd.data.writer import Counts


class Progress:
    """Samples done, tokens per second, mean α, what was kept, removed and rejected, and the time left.

    Args:
        total: samples of this process.
        counts: of the shards that an earlier run finished.
        done: how many samples those were.
    """

    def __init__(self, total: int, counts: Counts, done: int) -> None:
        self.committed, self.counts = counts, counts
        self.bar = tqdm(
            total=total,
            initial=done,
            unit="sample",
            file=sys.stderr,
            bar_format="{n_fmt}/{total_fmt} samples |{bar}| {desc} | {elapsed} passed, {remaining} left",
            desc="loading the models",
            smoothing=0,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file needs no animation
            dynamic_ncols=True,
        )
        self._drawn_tokens = self._ahead = 0
        self._start: float | None = None

    def tokens(self, count: int) -> None:
        """A completion of that many tokens has finished."""
        if self._start is None:  # loading the models says nothing about the time left
            self._start = time.perf_counter()
            self.bar.start_t = self.bar.last_print_t = time.time()
        self._drawn_tokens += count
        self._ahead += 1
        self._describe()
        self.bar.update()

    def batch(self, samples: int, counts: Counts) -> None:
        """A batch of that many samples is done; `counts` are those of its shard so far."""
        self.counts = self.committed + counts
        self._describe()
        self.bar.update(samples - self._ahead)  # those that were rejected never reached the engine
        self._ahead = 0

    def shard(self, counts: Counts) -> None:
        """A shard with these counts is done."""
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

    def __exit__(self, *exc_info: object) -> None:
        self.bar.refresh()
        self.bar.close()
