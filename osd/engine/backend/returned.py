"""Transport of the per-token record beside the tokens: worker, scheduler, vLLM's front end.

From worker to scheduler it travels as further columns of the step's logprobs, which vLLM copies to the host without a wait.
From there to the front end it travels as a request's ``routed_experts``: vLLM collects that array over the tokens of a
completion, and `PairConfig` refuses the flag that uses it for experts. So it needs no call of its own, ends with its request,
and works with several front ends, data parallel replicas and n > 1.

`osd.engine.wire.split_rows` says what a row is.

B rows of a step, R record fields, H hidden size, W columns of a row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors

from osd.engine import topk
from osd.engine.request import PairOptions
from osd.engine.wire import CACHED_COLUMN, FIRST_SIGNAL_COLUMN


@dataclass
class Returned:
    """A request whose record is returned: the columns of its rows, and the cached tokens of its student's prompt once known."""

    width: int
    cached: int | None = None


def row_width(model_config: Any, options: PairOptions) -> int:
    """Return W for a request of this teacher."""
    if options.topk:
        return FIRST_SIGNAL_COLUMN + topk.columns(options.topk)
    words = -(-model_config.get_hidden_size() * model_config.dtype.itemsize // 4)
    return FIRST_SIGNAL_COLUMN + (words if options.hidden else 0)


def append_record(
    logprobs: LogprobsTensors | None,
    values_BR: torch.Tensor,
    version: int,
    signal_BX: torch.Tensor | None,
    origin_B: torch.Tensor | None = None,
) -> LogprobsTensors:
    """Return a step's logprobs (None: nobody asked for them) with the rows of the record as their last columns.

    ``signal_BX``: the teacher's hidden states or its largest log-probabilities, or None. Without drafts ``origin_B`` is None.
    """
    own_B3 = values_BR.new_tensor([[version, 0, 0]]).repeat(len(values_BR), 1)  # the last is known to the scheduler
    if origin_B is not None:
        own_B3[:, 1] = origin_B
    parts = [values_BR, own_B3]
    if signal_BX is not None:
        odd = signal_BX.shape[1] * signal_BX.element_size() % 4 != 0
        parts.append((torch.nn.functional.pad(signal_BX, (0, 1)) if odd else signal_BX.contiguous()).view(torch.float32))
    rows_BW = torch.cat(parts, 1)
    if logprobs is None:
        ids_B1 = torch.zeros(len(rows_BW), 1, dtype=torch.int32, device=rows_BW.device)
        return LogprobsTensors(ids_B1, rows_BW, ids_B1[:, 0].contiguous())
    return logprobs._replace(logprobs=torch.cat([logprobs.logprobs, rows_BW], 1))


def take_record(output: Any, returned: Collection[Returned]) -> tuple[np.ndarray, Any] | None:
    """Take the record out of vLLM's ``ModelRunnerOutput``; None for a step that sampled nothing.

    Returns:
        The rows, float32 [B, W], and the first row of each request where a request can have several, or None.
    """
    logprobs = output.logprobs
    if logprobs is None:
        return None
    width = max(request.width for request in returned)  # that of `append_record`
    ids, values, *rest = logprobs
    output.logprobs = type(logprobs)(ids, values[:, :-width], *rest) if values.shape[1] > width else None
    return values[:, -width:], rest[-1]


def return_record(
    outputs: Any, returned: Mapping[str, Returned], places: dict[str, int], record: tuple[np.ndarray, Any]
) -> None:
    """Add the record to the tokens of a step.

    Args:
        outputs: vLLM's ``EngineCoreOutputs``.
        returned: the requests that want their record.
        places: the place of each request in the batch.
        record: the return value of `take_record`.
    """
    values_BW, first = record
    for emitted in (emitted for of_client in outputs.values() for emitted in of_client.outputs):
        if (request := returned.get(emitted.request_id)) is not None and emitted.new_token_ids:
            place = places[emitted.request_id]
            start = place if first is None else first[place]
            rows_TW = values_BW[start : start + len(emitted.new_token_ids), : request.width].copy()
            rows_TW[:, CACHED_COLUMN] = request.cached or 0
            emitted.routed_experts = rows_TW
