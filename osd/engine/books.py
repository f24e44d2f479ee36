"""What vLLM's runners note of a step's samples, for the rows that are sampled and for a whole batch at once.

B rows of a runner's batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch


@contextmanager
def only_rows(runner: Any, ready_mask: np.ndarray) -> Iterator[None]:
    """Let a runner keep the samples of ``ready_mask``'s rows only, [B] bool.

    The other rows' random generators are hidden meanwhile: a discarded draw must not advance a seeded request, and vLLM
    would wind them back by a CUDA generator's offset.
    """
    runner.discard_request_mask.np[: len(ready_mask)] = ~ready_mask
    generators = runner.input_batch.generators
    hidden = {row: generators.pop(row) for row in list(generators) if not ready_mask[row]}
    try:
        yield
    finally:
        generators.update(hidden)


def note_samples(runner: Any, ready_mask: np.ndarray) -> None:
    """vLLM's bookkeeping of one sampled token for each of ``ready_mask``'s rows [B], whose ids only the device knows yet."""
    batch = runner.input_batch
    rows = np.flatnonzero(ready_mask)
    ends = batch.num_tokens_no_spec[rows]
    batch.token_ids_cpu[rows, ends] = -1
    batch.is_token_ids[rows, ends] = True
    batch.num_tokens_no_spec[rows] = ends + 1
    for row in rows.tolist():
        runner.requests[batch.req_ids[row]].output_token_ids.append(-1)


def feed(runner: Any, token_B: torch.Tensor, fed: dict[str, int], again: torch.Tensor | None) -> None:
    """Leave the next step's input tokens on the device, where async scheduling looks for them.

    Args:
        token_B: what each row of the runner's batch sampled, int32 [B].
        fed: the rows that have such a token, by request id.
        again: rows that were ahead, int64, or None: they are fed what they were fed in this step, once more.
    """
    if again is not None:
        last_input = runner.query_start_loc.gpu[again + 1].long() - 1
        token_B = token_B.index_copy(0, again, runner.input_ids.gpu[last_input])
    runner.input_batch.prev_sampled_token_ids = token_B.unsqueeze(-1)
    runner.input_batch.prev_req_id_to_index = dict(fed)


def fill_in_ids(batch: Any) -> None:
    """In a batch whose penalties or bad words read output ids, put the last step's in the place of their placeholders.

    vLLM's own takes a row's placeholders of earlier steps, when nobody read them, for tokens that were not accepted and drops
    them: from then on everything that counts a row's tokens is behind. A pair samples one token per row and step.
    """
    output_token_ids = batch.sampling_metadata.output_token_ids
    if batch.sampled_token_ids_cpu is None or not output_token_ids:
        return
    batch.async_copy_ready_event.synchronize()
    sampled = batch.sampled_token_ids_cpu.tolist()
    for request_id, ids in zip(batch.req_ids, output_token_ids, strict=True):
        row = batch.prev_req_id_to_index.get(request_id)
        if row is not None and ids and ids[-1] == -1:
            ids[-1] = max(sampled[row][0], 0)  # a row that failed has no token; it ends when its step is read


def keep_async_books(runner: Any) -> None:
    """Give an async runner our ways of noting its samples: :func:`note_samples` and :func:`fill_in_ids`.

    vLLM's ``_bookkeeping_sync`` goes through the batch row by row, 0.5 ms at 128 rows. It is called with no rows for everything
    else it does.
    """
    stock = runner._bookkeeping_sync
    if not runner.use_async_scheduling:
        return

    def bookkeeping(scheduler_output: Any, sampler_output: Any, *args: Any) -> Any:
        sampled = sampler_output.sampled_token_ids
        result = stock(scheduler_output, dataclasses.replace(sampler_output, sampled_token_ids=sampled[:0]), *args)
        note_samples(runner, ~runner.discard_request_mask.np[: len(sampled)])
        return result

    runner._bookkeeping_sync = bookkeeping
    runner.input_batch.update_async_output_token_ids = partial(fill_in_ids, runner.input_batch)
