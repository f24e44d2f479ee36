"""The per-token record, kept on the device while sampling and fetched once per ``generate`` call."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from osd.core import RECORD_FIELDS, TokenRecord

# B rows of a step, R record fields (osd.core.RECORD_FIELDS), H teacher hidden size, T tokens of a completion, N rows of all
# steps, X columns: R, H, or those of the teacher's largest log-probabilities (osd.engine.topk).

_MOST_PINNED = 1 << 30  # bytes a call; pinned memory is nobody else's, and torch keeps it


@dataclass
class RequestRecord:
    """The record of one request, as its worker has it.

    Attributes:
        values_TR: float32 [T, R], one row per sampled token, columns as in ``osd.core.RECORD_FIELDS``.
        hidden_TH: the teacher's final hidden state before each sampled token, [T, H] in the engine's dtype, or None.
        topk_TX: its largest log-probabilities there, float32 [T, X], or None.
        weights_version: the student weights that sampled it.
        teacher_cached_tokens, student_cached_tokens: prompt tokens found in each side's prefix cache.
        origin_T1: how each token came to be, uint8 [T, 1] (`osd.core.TOKEN_ORIGINS`), or None without speculation.
    """

    values_TR: torch.Tensor
    hidden_TH: torch.Tensor | None
    weights_version: int
    teacher_cached_tokens: int = 0
    student_cached_tokens: int = 0
    topk_TX: torch.Tensor | None = None
    origin_T1: torch.Tensor | None = None

    def of_tokens(self, length: int) -> TokenRecord:
        """Return the record of a completion of ``length`` tokens."""
        # A request that ended by a stop string or an error may have more rows than tokens: the steps in flight added them.
        # Copy: the values share memory with those of the whole batch, which a kept record would keep as well.
        hidden, topk = (x[:length].clone() if x is not None and len(x) > length else x for x in (self.hidden_TH, self.topk_TX))
        values = self.values_TR[:length].clone() if self.values_TR.numel() else torch.empty(0, len(RECORD_FIELDS))
        origin = None if self.origin_T1 is None else self.origin_T1[:length, 0].clone()
        return TokenRecord(
            values_TR=values,
            teacher_hidden_TH=hidden,
            teacher_topk_TX=topk,
            weights_version=self.weights_version,
            origin_T=origin,
        )


@dataclass
class _Step:
    """The recorded rows of one step, in the order of ``request_ids``.

    Under speculation ``kept_B``, bool, says which rows are tokens, and ``origin_B1`` how each came to be.
    """

    request_ids: list[str]
    values_BR: torch.Tensor
    hidden_BH: torch.Tensor | None
    topk_BX: torch.Tensor | None = None
    kept_B: torch.Tensor | None = None
    origin_B1: torch.Tensor | None = None


@dataclass
class RecordLog:
    """Append-only log of steps. It needs no index tensors, no fixed capacity, and no copy to the host per token."""

    weights_version: int = 0
    _steps: list[_Step] = field(default_factory=list)
    _cached: dict[str, dict[str, int]] = field(default_factory=dict)

    def admitted(self, side: str, request_id: str, cached_tokens: int) -> None:
        """Note how much of a request's prompt was in ``side``'s prefix cache when it was first scheduled."""
        # A request that was preempted is admitted again.
        self._cached.setdefault(request_id, {}).setdefault(f"{side}_cached_tokens", cached_tokens)

    def append(
        self,
        request_ids: Sequence[str],
        values_BR: torch.Tensor,
        hidden_BH: torch.Tensor | None,
        topk_BX: torch.Tensor | None = None,
        **drafts: Any,
    ) -> None:
        """Add the rows of a step; ``drafts`` are the last two fields of :class:`_Step`."""
        self._steps.append(_Step(list(request_ids), values_BR, hidden_BH, topk_BX, **drafts))

    def clear(self) -> None:
        self._steps, self._cached = [], {}

    def take(self) -> dict[str, RequestRecord]:
        """Return every record since the last call, by request id, on the host, and empty the log."""
        cached, self._cached = self._cached, {}
        steps, self._steps = self._steps, []
        values = _by_request([(step, step.values_BR) for step in steps])
        origins = _by_request([(step, _origin(step)) for step in steps]) if any(s.kept_B is not None for s in steps) else {}
        hidden, topk = (_moved(steps, name) for name in ("hidden_BH", "topk_BX"))
        empty = torch.empty(0)
        return {
            request_id: RequestRecord(
                values_TR=values.get(request_id, empty),
                hidden_TH=hidden.get(request_id),
                topk_TX=topk.get(request_id),
                weights_version=self.weights_version,
                origin_T1=origins.get(request_id),
                **cached.get(request_id, {}),
            )
            for request_id in {**cached, **values}
        }


def _by_request(steps: list[tuple[_Step, torch.Tensor]], *, apart: bool = False) -> dict[str, torch.Tensor]:
    """Return the steps' rows by request, on the host: as views of one copy, or ``apart``, each request's in its own memory.

    The rows are sorted on the device: hidden states of a batch are hundreds of megabytes, which a host moves slowly. Empties
    ``steps``, so that their memory is free once the rows are in one tensor.
    """
    places: dict[str, list[np.ndarray]] = {}
    start = 0
    for request_ids, run in itertools.groupby(step.request_ids for step, _ in steps):  # most have the rows of the step before
        first = start + len(request_ids) * np.arange(sum(1 for _ in run))
        for row, request_id in enumerate(request_ids):
            places.setdefault(request_id, []).append(first + row)
        start += len(request_ids) * len(first)
    if not places:
        return {}
    kept_N = _kept([step for step, _ in steps])
    rows_NX = torch.cat([rows for _, rows in steps])
    steps.clear()
    orders = [np.concatenate(found) for found in places.values()]
    if kept_N is not None:  # a request has several rows of a step
        orders = [order[kept_N[order]] for order in map(np.sort, orders)]
    order = torch.from_numpy(np.concatenate(orders)).to(rows_NX.device)
    lengths = [len(order) for order in orders]
    host = _apart(rows_NX, order.split(lengths)) if apart else rows_NX[order].cpu().split(lengths)
    return dict(zip(places, host, strict=True))


def _moved(steps: list[_Step], name: str) -> dict[str, torch.Tensor]:
    """Return a field of the steps that have it by request, each request's in memory of its own, and take it from the steps."""
    found = [(step, tensor) for step in steps if (tensor := getattr(step, name)) is not None]
    for step in steps:  # `found` alone references them now, so `_by_request` can free each
        setattr(step, name, None)
    return _by_request(found, apart=True)


def _origin(step: _Step) -> torch.Tensor:
    """Return how the rows of a step came to be; 0, drawn, in a step without drafts."""
    if step.origin_B1 is not None:
        return step.origin_B1
    return torch.zeros(len(step.request_ids), 1, dtype=torch.uint8, device=step.values_BR.device)


def _kept(steps: list[_Step]) -> np.ndarray | None:
    """Return which rows of the steps are tokens, or None if all are."""
    if all(step.kept_B is None for step in steps):
        return None
    ones = (step.kept_B if step.kept_B is not None else torch.ones(len(step.request_ids), dtype=torch.bool) for step in steps)
    return torch.cat([kept.to(steps[0].values_BR.device) for kept in ones]).cpu().numpy()


def _apart(rows_NX: torch.Tensor, orders: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return a copy on the host for each order; from a GPU in pinned memory, which goes back to a GPU without another copy."""
    from_gpu = rows_NX.is_cuda
    pinned = from_gpu and rows_NX.nbytes <= _MOST_PINNED
    copies = [torch.empty(len(order), rows_NX.shape[1], dtype=rows_NX.dtype, pin_memory=pinned) for order in orders]
    for copy, order in zip(copies, orders, strict=True):
        copy.copy_(rows_NX[order], non_blocking=True)
    if from_gpu:
        torch.cuda.current_stream(rows_NX.device).synchronize()
    return copies


def dump_records(records: dict[str, RequestRecord]) -> bytes:
    """Return records as bytes, to cross the processes of a vLLM engine."""
    buffer = io.BytesIO()
    torch.save({request_id: vars(record) for request_id, record in records.items()}, buffer)
    return buffer.getvalue()


def load_records(data: bytes) -> dict[str, RequestRecord]:
    """Return the records of :func:`dump_records`."""
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    return {request_id: RequestRecord(**fields) for request_id, fields in loaded.items()}
