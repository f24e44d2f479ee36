"""One pair over several processes: the ranks of a tensor parallel group share their requests, and check their draws.

With vLLM's `external_launcher` every rank runs a scheduler, a sampler and its shards of both models; the ranks meet in the
collectives of the forward passes. So every rank must have the same requests with the same seeds, in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup, all_gather_object, get_rank, get_world_size

from osd.engine.request import EXTRA_ARGS_KEY, PairPrompt

Request = tuple[PairPrompt, Any]  # a prompt, and vLLM's SamplingParams with the pair's options in them


@dataclass(frozen=True)
class RankGroup:
    """The ranks that hold one pair.

    Attributes:
        group: a process group on the CPU.
    """

    group: ProcessGroup

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return get_rank(self.group)

    def share(self, requests: Callable[[], list[Request]]) -> tuple[list[Request], slice]:
        """Gather the requests of every rank, in the order of the ranks; a collective operation.

        Args:
            requests: makes the requests of this rank. If it raises on one rank, every rank raises, and none waits for another.

        Returns:
            The same requests on every rank, and which of them are this rank's own. Only those keep a record here.

        Raises:
            RuntimeError: another rank's requests are refused.
        """
        own: list[Request] = []
        failure: Exception | None = None
        try:
            own = requests()
        except Exception as error:
            failure = error
        gathered = self._gather((own, None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        for rank, (requested, refused) in enumerate(gathered):
            if refused is not None:
                raise RuntimeError(f"rank {rank} of this tensor parallel group cannot sample: {refused}")
            for _, params in requested if rank != self.rank else ():
                for kept in ("record", "hidden", "topk"):
                    params.extra_args[EXTRA_ARGS_KEY].pop(kept, None)
        start = sum(len(requested) for requested, _ in gathered[: self.rank])
        return [request for requested, _ in gathered for request in requested], slice(start, start + len(own))

    def check_same(self, completions: Sequence[Any]) -> None:
        """Raise on every rank if two of them drew different completions; a collective operation.

        Args:
            completions: vLLM's ``CompletionOutput`` of every request of the group.

        Raises:
            RuntimeError: naming a rank and a completion that differ.
        """
        digests = [hashlib.sha256(repr((list(c.token_ids), c.finish_reason)).encode()).digest() for c in completions]
        gathered = self._gather(digests)
        for rank, others in enumerate(gathered):
            if others == gathered[0]:
                continue
            first = next(i for i, (a, b) in enumerate(zip(others, gathered[0], strict=True)) if a != b)
            raise RuntimeError(
                f"ranks 0 and {rank} of a tensor parallel group drew different completions (the first is "
                f"number {first} of {len(digests)}): they do not run the same model with the same settings, and such samples "
                "follow no distribution. Give every rank the same settings, weights, package versions and kind of GPU"
            )

    def _gather(self, value: Any) -> list[Any]:
        if torch.accelerator.is_available():
            # Before and after a batch: the collectives of the trainer and of vLLM can deadlock if both run at once.
            torch.accelerator.synchronize()
        values: list[Any] = [None] * get_world_size(self.group)
        all_gather_object(values, value, group=self.group)
        return values
