"""Batches of completions from the engine of a live student: sampled at once, or in the background while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from osd.engine.remote import RemoteEngine, ServerLost
from osd.engine.remote_batch import Batch
from osd.weight_sync import LiveStudent

if TYPE_CHECKING:
    from osd.core import MixingConfig
    from osd.engine.engine import PairCompletion, PairPrompt


class BackgroundSampling(LiveStudent):
    """A live student whose engine samples batches, one of them in the background if the engine is a server.

    Attributes:
        max_staleness: the most updates between the weights that draw a token and those of the call that returns it.
    """

    max_staleness: int
    _begun: Batch | None = None

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
        self.drop()
        pair_prompts = paired(prompts if teacher_prompts is None else teacher_prompts, prompts)
        self._begun = self.engine.begin(pair_prompts, alpha=alpha, mixing=mixing or self.engine.mixing, **self._options())

    def drop(self) -> None:
        """End a batch that was begun and not taken, if there is one."""
        if self._begun is not None and isinstance(self.engine, RemoteEngine):
            self.engine.drop()
            self._begun = None

    def _options(self) -> dict[str, Any]:
        """Return the options of `RemoteEngine.begin` that are the same for every batch."""
        raise NotImplementedError

    def _check_synced(self) -> None:
        if not self._synced:
            raise RuntimeError("the student's engine does not have the trainer's weights; call sync_weights() first")

    def _take_begun(self, prompts: list[PairPrompt]) -> Batch:
        begun, self._begun = self._begun, None
        if begun is None or begun.prompts != prompts:
            raise RuntimeError("teacher_reads(begun=True) without a batch that was begun with these prompts")
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

    def _staleness(self, begun: Batch | None, count: int) -> list[int]:
        """Return the optimizer updates since each completion was drawn; raise if they are too many to train on."""
        if begun is None:
            return [0] * count
        staleness = [self.updates - begun.updates[place] for place in range(count)]
        if max(staleness, default=0) > self.max_staleness:
            raise RuntimeError(
                f"a completion was drawn from weights of {max(staleness)} optimizer updates ago, and max_staleness="
                f"{self.max_staleness}: take a batch sooner after begin(), or raise max_staleness"
            )
        return staleness


def paired(teacher: list[list[int]], student: list[list[int]]) -> list[PairPrompt]:
    """Return the prompts of both sides as the engine takes them."""
    from osd.engine.engine import PairPrompt

    return [PairPrompt(teacher_token_ids=list(t), student_token_ids=list(s)) for t, s in zip(teacher, student, strict=True)]
