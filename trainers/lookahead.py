"""Sampling ahead: the rows of coming steps, read from the epoch's data loader, and their completions in the background."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING, Any

from osd.train.alpha_schedule import unmixed

if TYPE_CHECKING:
    from osd.train.config import OSDConfig
    from osd.train.trainer import OSDTrainer


class Lookahead:
    """Batches of one epoch, in order. What is read ahead is kept for its own step.

    accelerate's data loader sets `end_of_dataloader` when it gives its last batch, and its iterator takes the loader out of
    accelerate's state when it is asked for more. So the flag is set here when the last batch is taken, and nothing is read
    after the last one.

    Args:
        batches: the iterator of the epoch, which others read no more.
        gradient_state: accelerate's, whose active data loader is the one of `batches`.
    """

    def __init__(self, batches: Iterator[Any], gradient_state: Any) -> None:
        self.batches, self._state = batches, gradient_state
        self._read: deque[Any] = deque()
        self._ended = False

    def take(self, count: int) -> list[Any]:
        """Return the next `count` batches, or fewer at the end."""
        taken = [self._read.popleft() for _ in range(count) if self._reaches(1)]
        self._mark(self._ended and not self._read)
        return taken

    def peek(self, place: int) -> Any | None:
        """Return the batch `place` (from 0) after those that were taken, or None where the epoch has ended before it."""
        found = self._read[place] if self._reaches(place + 1) else None
        self._mark(self._ended and not self._read)
        return found

    def _reaches(self, count: int) -> bool:
        """Read until `count` batches wait; return whether they do."""
        while len(self._read) < count and not self._ended:
            try:
                self._read.append(next(self.batches))
            except StopIteration:
                self._ended = True
            else:
                loader = self._state.active_dataloader
                self._ended = loader is not None and loader.end_of_dataloader
        return len(self._read) >= count

    def _mark(self, ended: bool) -> None:
        loader = self._state.active_dataloader
        if loader is not None and self._ended:
            loader.end_of_dataloader = ended


def warn_without_overlap(args: OSDConfig, dataset: Any) -> None:
    """Warn if no epoch has a second batch, which could be sampled during the first."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.async_generation and isinstance(dataset, Sized) and len(dataset) < 2 * batch:
        warnings.warn(
            f"async_generation=True has no effect: the first batch of an epoch is not sampled ahead, and {len(dataset)} rows "
            f"are one batch of {batch} completions; use more rows or smaller batches",
            stacklevel=3,
        )


class SampledAhead:
    """The completions of a trainer's coming sampling steps, drawn while it trains on the present ones (`async_generation`).

    TRL samples for every `num_iterations` optimizer steps. Its data loader repeats a batch of rows for each of their passes.
    One sampling step is ahead, or as many as `max_staleness` allows where weights are updated under running requests.
    """

    def __init__(self, trainer: OSDTrainer) -> None:
        self.trainer = trainer
        self._loader: Lookahead | None = None  # of the epoch
        self._taken = 0  # batches for the passes of the present step
        self._rows: deque[Any] = deque()  # whose completions are sampled, by sampling step
        self._most = trainer.args.steps_ahead()

    def batches(self, epoch_iterator: Iterator[Any], count: int) -> list[Any]:
        """Return the data loader's batches for the passes of an optimizer step."""
        if self._loader is None or self._loader.batches is not epoch_iterator:
            self._loader = Lookahead(epoch_iterator, self.trainer.accelerator.gradient_state)
        batches = self._loader.take(count)
        self._taken = len(batches)
        return batches

    def take(self, rows: Any) -> bool:
        """Return whether completions of these rows, as the data loader gave them, are sampled next; they count as taken."""
        if not self._rows or rows is not self._rows[0]:
            return False
        self._rows.popleft()
        return True

    def begin(self) -> None:
        """Start to sample for the coming sampling steps, each with its own mixing.

        Does nothing without `async_generation`, in the last sampling step, and where the epoch ends before the next one.
        """
        trainer, args, state = self.trainer, self.trainer.args, self.trainer.state
        if self._loader is None:
            return
        while len(self._rows) < self._most:
            steps = args.num_iterations * (1 + len(self._rows)) - state.global_step % args.num_iterations
            step = state.global_step + steps
            if step >= state.max_steps:
                return
            rows = self._loader.peek(steps * args.gradient_accumulation_steps - self._taken)
            if rows is None:
                return
            trainer.vllm_generation.begin(
                trainer._renderer.student_ids([trainer._renderer.student_prompt(row) for row in rows]),
                trainer._renderer.teacher_ids(rows),
                alpha=unmixed(rows, args.mix_fraction, seed=trainer._seed_of(step)),
                mixing=trainer._schedule.at(step, state.max_steps),
            )
            self._rows.append(rows)

    def drop(self) -> None:
        """End the sampling, if there is any."""
        self._rows.clear()
        self.trainer.vllm_generation.drop()

    def end(self) -> None:
        """Forget the epoch, and end the sampling."""
        self._loader = None
        self.drop()
