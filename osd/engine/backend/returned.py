"""The per-token record on its way with the tokens: worker, scheduler, vLLM's front end.

From worker to scheduler it travels as further columns of the step's logprobs, which vLLM copies to the host without a wait.
From there to the front end it travels as a request's ``routed_experts``: vLLM collects that array over the tokens of a
completion, and `PairConfig` refuses the flag that uses it for experts. So it needs no call of its own, ends with its request,
and works with several front ends, data parallel replicas and n > 1.

B rows of a step, R record fields.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors

from osd.core import RECORD_FIELDS

_R = len(RECORD_FIELDS)


def append_record(logprobs: LogprobsTensors | None, values_BR: torch.Tensor) -> LogprobsTensors:
    """Return a step's logprobs (None: nobody asked for them) with the record as its last columns."""
    if logprobs is None:
        ids_BR = torch.zeros_like(values_BR, dtype=torch.int32)
        return LogprobsTensors(ids_BR, values_BR, ids_BR[:, 0].contiguous())
    ids, values, *rest = logprobs
    return LogprobsTensors(torch.cat([ids, ids.new_zeros(values_BR.shape)], 1), torch.cat([values, values_BR], 1), *rest)


def take_record(output: Any) -> tuple[np.ndarray, Any] | None:
    """Take the record out of vLLM's ``ModelRunnerOutput``; None for a step that sampled nothing.

    Returns:
        The rows, float32 [B, R], and the first row of each request where a request can have several, or None.
    """
    logprobs = output.logprobs
    if logprobs is None:
        return None
    ids, values, *rest = logprobs
    output.logprobs = type(logprobs)(ids[:, :-_R], values[:, :-_R], *rest) if values.shape[1] > _R else None
    return values[:, -_R:], rest[-1]


def return_record(
    outputs: Any, requests: Collection[str], places: dict[str, int], record: tuple[np.ndarray, Any], version: int
) -> None:
    """Add the record to a step's tokens of these requests, as float32 [T, R + 1]: RECORD_FIELDS, then the weights' version.

    Args:
        outputs: vLLM's ``EngineCoreOutputs``.
        places: the place of each request in the batch.
        record: the return value of `take_record`.
    """
    values_BR, first = record
    for emitted in (emitted for of_client in outputs.values() for emitted in of_client.outputs):
        if emitted.request_id in requests and emitted.new_token_ids:
            place = places[emitted.request_id]
            start = place if first is None else first[place]
            rows = values_BR[start : start + len(emitted.new_token_ids)]
            emitted.routed_experts = np.pad(rows, ((0, 0), (0, 1)), constant_values=version)
