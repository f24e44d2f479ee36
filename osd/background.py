"""Batches of completions from the engine of a live student: sampled at once, or in the background while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from osd.engine.remote import RemoteEngine, ServerLost
from osd.engine.remote_batch import Batch
from osd.weight_sync import LiveStudent

if TYPE_CHECKING:
    from osd.core import MixingConfig
    from osd.engine.engine import PairCompletion, PairPrompt


class BackgroundSampling(LiveStudent):
    """A live student whose engine samples batches, some of them in the background if the engine is a server.

    Attributes:
        max_staleness: the most updates between the weights that draw a token and those of the call that returns it.
    """

    max_staleness: int
    _begun: tuple[Batch, ...] = ()

    def begin(
        self,
        prompts: list[list[int]],
        teacher_prompts: list[list[int]] | None = None,
        *,
        alpha: float | Sequence[float | None] | None = None,
        mixing: MixingConfig | None = None,
    ) -> None:
        """Start to sample a batch in the background, from the weights of the last sync. Needs a server.

        A `generate` call in `teacher_reads(..., begun=True)` takes it. Until then `sync_weights` and other `generate` calls
        first wait for the batch, and keep it; a batch that was begun before and not taken is dropped. Set `updates` before
        every sync: the age of a completion is counted in them.

        With `async_weight_updates="running"`, nothing waits for the batch: after a sync its requests go on with the new
        weights. Several batches can be begun, and are taken in that order.

        Args:
            prompts, teacher_prompts: of the student and of the teacher, as token ids; None: the teacher reads the student's.
            alpha: as in `teacher_reads`.
            mixing: of this batch alone; None: the engine's.

        Raises:
            RuntimeError: no sync succeeded yet, or the last one failed.
            TypeError: the engine is in this process, and would work when training does.
        """
        if not isinstance(self.engine, RemoteEngine):
            raise TypeError("begin() needs an engine in another process; give OSDGeneration the ServedPair of an `osd serve`")
        self._check_synced()
        if not self.engine.running:
            self.drop()
        pair_prompts = paired(prompts if teacher_prompts is None else teacher_prompts, prompts)
        batch = self.engine.begin(pair_prompts, alpha=alpha, mixing=mixing or self.engine.mixing, **self._options())
        self._begun = *self._begun, batch

    def drop(self) -> None:
        """End the batches that were begun and not taken, if there are any."""
        self._begun = ()
        if isinstance(self.engine, RemoteEngine):
            self.engine.drop()

    def _options(self) -> dict[str, Any]:
        """Return the options of `RemoteEngine.begin` that are the same for every batch."""
        raise NotImplementedError

    def _check_synced(self) -> None:
        if not self._synced:
            raise RuntimeError("the student's engine does not have the trainer's weights; call sync_weights() first")

    def _take_begun(self, prompts: list[PairPrompt]) -> Batch:
        if not self._begun or self._begun[0].prompts != prompts:
            self.drop()
            raise RuntimeError("teacher_reads(begun=True) without a batch that was begun with these prompts")
        begun, *rest = self._begun
        self._begun = tuple(rest)
        return begun

    def _sampled(self, prompts: list[PairPrompt], begun: Batch | None, **options: Any) -> list[PairCompletion]:
        """Return the engine's completions; a server that lost the student gets it again, and goes on with the rest."""
        batch: Any = begun
        while True:
            try:
                return self.engine.generate(prompts, **options) if batch is None else self.engine.finish(batch)  # type: ignore
            except ServerLost as error:
                batch = error.batch
            self.sync_weights()

    def _staleness(self, begun: Batch | None, completions: list[PairCompletion]) -> tuple[list[int], list[torch.Tensor]]:
        """Return the optimizer updates since the oldest token of each completion was drawn, and since each of its tokens was.

        Raises:
            RuntimeError: they are too many to train on.
        """
        lengths = [len(completion.token_ids) for completion in completions]
        if begun is None or not isinstance(self.engine, RemoteEngine):
            return [0] * len(completions), [torch.zeros(length, dtype=torch.int64) for length in lengths]
        ages = [{version: self.updates - at for version, at in of.items()} for of in self.engine.updates_of(begun)]
        oldest = [max(age.values()) for age in ages]
        if max(oldest, default=0) > self.max_staleness:
            raise RuntimeError(
                f"a token was drawn from weights of {max(oldest)} optimizer updates ago, and max_staleness="
                f"{self.max_staleness}: take a batch sooner after begin(), or raise max_staleness"
            )
        versions = [None if c.record is None else c.record.version_T for c in completions]
        by_token = [
            torch.full((length,), old) if version_T is None else torch.tensor([age[v] for v in version_T.tolist()])
            for length, old, age, version_T in zip(lengths, oldest, ages, versions, strict=True)
        ]
        return oldest, by_token


def paired(teacher: list[list[int]], student: list[list[int]]) -> list[PairPrompt]:
    """Return the prompts of both sides as the engine takes them."""
    from osd.engine.engine import PairPrompt

    return [PairPrompt(teacher_token_ids=list(t), student_token_ids=list(s)) for t, s in zip(teacher, student, strict=True)]
