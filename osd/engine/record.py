"""The per-token record, kept on the device while sampling and fetched once per ``generate`` call."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

# B rows of a step, R record fields (osd.core.RECORD_FIELDS), H teacher hidden size, T tokens of a completion, S steps of a run,
# X either R or H.


@dataclass
class RequestRecord:
    """What a worker knows of one request.

    Attributes:
        values_TR: float32 [T, R], one row per sampled token, columns as in ``osd.core.RECORD_FIELDS``.
        hidden_TH: the teacher's final hidden state before each sampled token, [T, H] in the engine's dtype, or None.
        weights_version: the student weights that sampled it.
        teacher_cached_tokens, student_cached_tokens: prompt tokens found in each side's prefix cache.
    """

    values_TR: torch.Tensor
    hidden_TH: torch.Tensor | None
    weights_version: int
    teacher_cached_tokens: int = 0
    student_cached_tokens: int = 0


@dataclass
class _Step:
    """The rows of one step that somebody asked to record, in the order of ``request_ids``."""

    request_ids: list[str]
    values_BR: torch.Tensor
    hidden_BH: torch.Tensor | None


@dataclass
class RecordLog:
    """An append-only log of steps: no index tensors, no capacity to guess, and no copy to the host per token."""

    weights_version: int = 0
    _steps: list[_Step] = field(default_factory=list)
    _cached: dict[str, dict[str, int]] = field(default_factory=dict)

    def admitted(self, side: str, request_id: str, cached_tokens: int) -> None:
        """Note how much of a request's prompt was in ``side``'s prefix cache when it was first scheduled."""
        self._cached.setdefault(request_id, {})[f"{side}_cached_tokens"] = cached_tokens

    def append(self, request_ids: Sequence[str], values_BR: torch.Tensor, hidden_BH: torch.Tensor | None) -> None:
        self._steps.append(_Step(list(request_ids), values_BR, hidden_BH))

    def take(self) -> dict[str, RequestRecord]:
        """Every record since the last call, by request id, on the host; the log is empty afterwards."""
        steps, self._steps = self._steps, []
        cached, self._cached = self._cached, {}
        values = _by_request([(step.request_ids, step.values_BR) for step in steps])
        hidden = _by_request([(step.request_ids, step.hidden_BH) for step in steps if step.hidden_BH is not None])
        empty = torch.empty(0)
        return {
            request_id: RequestRecord(
                values_TR=values.get(request_id, empty),
                hidden_TH=hidden.get(request_id),
                weights_version=self.weights_version,
                **cached.get(request_id, {}),
            )
            for request_id in {**cached, **values}
        }


def _by_request(steps: list[tuple[Sequence[str], torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The steps' rows by request, on the host: views of one copy.

    Most steps have the rows of the step before; such a run is one block, whatever its length.
    """
    pieces: dict[str, list[torch.Tensor]] = {}
    for _, run in itertools.groupby(steps, key=lambda step: tuple(step[0])):
        (request_ids, first), *others = run
        rows_SBX = torch.stack([first, *(rows for _, rows in others)]).cpu()
        for request_id, rows_SX in zip(request_ids, rows_SBX.transpose(0, 1).contiguous(), strict=True):
            pieces.setdefault(request_id, []).append(rows_SX)
    return {request_id: found[0] if len(found) == 1 else torch.cat(found) for request_id, found in pieces.items()}


def dump_records(records: dict[str, RequestRecord]) -> bytes:
    """Records as bytes, to cross the processes of a vLLM engine."""
    buffer = io.BytesIO()
    torch.save({request_id: vars(record) for request_id, record in records.items()}, buffer)
    return buffer.getvalue()


def load_records(data: bytes) -> dict[str, RequestRecord]:
    """The inverse of :func:`dump_records`."""
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    return {request_id: RequestRecord(**fields) for request_id, fields in loaded.items()}
