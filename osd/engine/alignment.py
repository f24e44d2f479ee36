"""Alignment of the two batches of a step by request id.

B rows of the teacher's batch, S rows of the student's, P rows where both are ready.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from osd.engine.request import SampledRequest


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """The rows that a step samples, and how. Tensors are on the device.

    Attributes:
        num_ready: how many requests are sampled.
        paired: the teacher's rows sampled from q*, int64 [P]; None: all rows, in order.
        student: the student's row for each of them, int64 [P]; None: the same rows.
        solo: the teacher's rows sampled from the teacher alone, int64, or None.
        alpha: the teacher's weight where a request fixes it and NaN where α is solved, float32 [P]; None: no request fixes it.
        temperature_B, seed_B: float32 and int64, one entry per row of the teacher's batch.
        plain: every token is drawn from q* itself: nothing truncates, penalises or masks it, and no logprobs are wanted.
        ready_B, ready_S: 1 where a row is sampled, else 0, int32.
        rejected_B, rejected_S: zeros, int32, where every row of a batch is sampled; None: the device counts rejected tokens.
        source_S: for each row of the student's batch the teacher's row that holds its token, int64 (any row where none is
            sampled); None: the same rows.
        recorded_ids, recorded_rows: requests whose record is kept, and their rows (None: all, in order).
        hidden: some recorded request wants the teacher's hidden state.
        topk: how many of the teacher's largest log-probabilities some requests want, or 0.
        topk_rows: their rows (None: all, in order).
    """

    num_ready: int
    paired: torch.Tensor | None
    student: torch.Tensor | None
    solo: torch.Tensor | None
    alpha: torch.Tensor | None
    temperature_B: torch.Tensor
    seed_B: torch.Tensor
    plain: bool
    ready_B: torch.Tensor
    ready_S: torch.Tensor
    rejected_B: torch.Tensor | None
    rejected_S: torch.Tensor | None
    source_S: torch.Tensor | None
    recorded_ids: list[Any]
    recorded_rows: torch.Tensor | None
    hidden: bool
    topk: int
    topk_rows: torch.Tensor | None


class Aligner:
    """Builds a step's :class:`Alignment`, and keeps it while neither batch changes: small uploads stall a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._key: tuple[list[str], list[str], set[str], set[str]] | None = None
        self._alignment: Alignment | None = None

    def align(
        self,
        teacher_ids: list[str],
        student_ids: list[str],
        ready: set[str],
        unmixed: set[str],
        requests: dict[str, SampledRequest],
    ) -> Alignment:
        """Align the rows of both batches.

        Args:
            teacher_ids, student_ids: the request of each row.
            ready: requests that are sampled in this step.
            unmixed: of those, the ones that are past their ``mix_tokens`` and are sampled from the student alone.
            requests: what is known of each request, by id.
        """
        key = (teacher_ids, student_ids, ready, unmixed)
        if self._alignment is None or key != self._key:
            self._alignment, self._key = self._build(*key, requests), key
        return self._alignment

    def _build(
        self,
        teacher_ids: list[Any],
        student_ids: list[Any],
        ready: set[Any],
        unmixed: set[Any],
        requests: dict[Any, SampledRequest],
    ) -> Alignment:
        of_row = [requests[i] for i in teacher_ids]
        student_row = {request_id: row for row, request_id in enumerate(student_ids)}
        teacher_row = {request_id: row for row, request_id in enumerate(teacher_ids)}
        sampled = [row for row, i in enumerate(teacher_ids) if i in ready]
        paired = [row for row in sampled if not of_row[row].options.teacher_only]
        solo = [row for row in sampled if of_row[row].options.teacher_only]
        recorded = [row for row in sampled if of_row[row].options.record]
        topk = [row for row in sampled if of_row[row].options.topk]
        alpha = [0.0 if teacher_ids[row] in unmixed else of_row[row].options.alpha for row in paired]
        return Alignment(
            num_ready=len(sampled),
            paired=self._index(paired, len(teacher_ids)),
            student=self._index([student_row[teacher_ids[row]] for row in paired], len(student_ids)),
            solo=self._tensor(solo, torch.int64) if solo else None,
            alpha=self._alpha(alpha),
            temperature_B=self._tensor([request.temperature for request in of_row], torch.float32),
            seed_B=self._tensor([request.seed for request in of_row], torch.int64),
            plain=all(of_row[row].plain for row in sampled),
            ready_B=self._tensor([int(i in ready) for i in teacher_ids], torch.int32),
            ready_S=self._tensor([int(i in ready) for i in student_ids], torch.int32),
            rejected_B=self._rejected(teacher_ids, ready),
            rejected_S=self._rejected(student_ids, ready),
            source_S=self._index([teacher_row.get(i, 0) for i in student_ids], len(teacher_ids)),
            recorded_ids=[teacher_ids[row] for row in recorded],
            recorded_rows=self._index(recorded, len(teacher_ids)),
            hidden=any(of_row[row].options.hidden for row in recorded),
            topk=of_row[topk[0]].options.topk if topk else 0,
            topk_rows=self._index(topk, len(teacher_ids)) if topk else None,
        )

    def _rejected(self, ids: list[Any], ready: set[Any]) -> torch.Tensor | None:
        return torch.zeros(len(ids), dtype=torch.int32, device=self.device) if ready.issuperset(ids) else None

    def _index(self, rows: list[int], size: int) -> torch.Tensor | None:
        """Return rows as an index tensor; None if they are all rows in order."""
        return None if rows == list(range(size)) else self._tensor(rows, torch.int64)

    def _alpha(self, fixed: list[float | None]) -> torch.Tensor | None:
        if all(alpha is None for alpha in fixed):
            return None
        return self._tensor([float("nan") if alpha is None else alpha for alpha in fixed], torch.float32)

    def _tensor(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)
