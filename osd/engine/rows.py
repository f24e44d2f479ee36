"""Aligning the two batches of a step by request id."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from osd.engine.request import PairOptions
from osd.engine.sampler import PairRows
from osd.engine.scheduler import PairStep


@dataclass
class RowPlan:
    """Which rows of the two runners' batches are sampled in a step, and what is recorded of them.

    Attributes:
        rows: the alignment as the sampler wants it (device tensors).
        ready_mask, student_ready_mask: the same as bool [B] on the host, one entry per row of each runner's batch.
        student_source: for each row of the student's batch the teacher's row that samples its token, int64 [B'] on the
            device (any row where it is not sampled); None where they are the same rows.
        fed, student_fed: rows that have an input token for the next step on the device, by request id.
        again, student_again: of those, the rows that were ahead and compute the same token again, int64, or None.
        recorded_ids, recorded_rows: requests whose record is kept, and their rows (None: all, in order).
        hidden: some recorded request wants the teacher's hidden state.
    """

    rows: PairRows
    ready_mask: np.ndarray
    student_ready_mask: np.ndarray
    student_source: torch.Tensor | None
    fed: dict[str, int]
    student_fed: dict[str, int]
    again: torch.Tensor | None
    student_again: torch.Tensor | None
    recorded_ids: list[str] = field(default_factory=list)
    recorded_rows: torch.Tensor | None = None
    hidden: bool = False


class RowPlanner:
    """Builds a step's :class:`RowPlan`, and keeps it while neither batch changes (small uploads stall a GPU)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._key: tuple[Any, ...] | None = None
        self._plan: RowPlan | None = None
        self._still_mixed: dict[str, int] = {}  # requests of the plan that are yet to reach their mix_tokens, and that number

    def plan(self, teacher: Any, student: Any, step: PairStep) -> RowPlan:
        """Align the rows of both runners' persistent batches for the requests that are ready in ``step``."""
        teacher_ids, student_ids = list(teacher.input_batch.req_ids), list(student.input_batch.req_ids)
        key = (teacher_ids, student_ids, step.ready, step.teacher_ahead, step.student_ahead)
        if self._plan is None or key != self._key or self._someone_is_past(teacher):
            options = {i: PairOptions.of(teacher.requests[i].sampling_params) for i in teacher_ids}
            limits = {i: o.mix_tokens for i, o in options.items() if o.mix_tokens is not None}
            self._still_mixed = {i: limit for i, limit in limits.items() if _num_sampled(teacher, i) < limit}
            options |= {i: replace(options[i], alpha=0.0) for i in limits.keys() - self._still_mixed.keys()}
            self._plan = self._build(teacher_ids, student_ids, step, options)
            self._key = key
        return self._plan

    def _someone_is_past(self, teacher: Any) -> bool:
        return any(_num_sampled(teacher, i) >= limit for i, limit in self._still_mixed.items())

    def _build(
        self, teacher_ids: list[str], student_ids: list[str], step: PairStep, options: dict[str, PairOptions]
    ) -> RowPlan:
        teacher_row = {request_id: row for row, request_id in enumerate(teacher_ids)}
        student_row = {request_id: row for row, request_id in enumerate(student_ids)}
        sampled = [(row, i) for row, i in enumerate(teacher_ids) if i in step.ready]
        paired = [(row, i) for row, i in sampled if not options[i].teacher_only]
        solo = [row for row, i in sampled if options[i].teacher_only]
        recorded = [(row, i) for row, i in sampled if options[i].record]
        paired_rows, student_rows = [row for row, _ in paired], [student_row[i] for _, i in paired]
        rows = PairRows(
            paired=self._index(paired_rows, len(teacher_ids)),
            student=self._index(student_rows, len(student_ids)),
            solo=self._tensor(solo) if solo else None,
            alpha=self._alpha([options[i].alpha for _, i in paired]),
        )
        return RowPlan(
            rows=rows,
            ready_mask=_mask([row for row, _ in sampled], len(teacher_ids)),
            student_ready_mask=_mask(student_rows, len(student_ids)),
            student_source=self._index([teacher_row.get(i, 0) for i in student_ids], len(teacher_ids)),
            fed={i: row for i, row in teacher_row.items() if i in step.ready or i in step.teacher_ahead},
            student_fed={i: row for i, row in student_row.items() if i in step.ready or i in step.student_ahead},
            again=self._rows_of(step.teacher_ahead, teacher_row),
            student_again=self._rows_of(step.student_ahead, student_row),
            recorded_ids=[i for _, i in recorded],
            recorded_rows=self._index([row for row, _ in recorded], len(teacher_ids)),
            hidden=any(options[i].hidden for _, i in recorded),
        )

    def _rows_of(self, request_ids: set[str], row: dict[str, int]) -> torch.Tensor | None:
        return self._tensor([row[i] for i in request_ids]) if request_ids else None

    def _index(self, rows: list[int], size: int) -> torch.Tensor | None:
        """Rows as an index tensor, or None where they are simply all of them in order."""
        return None if rows == list(range(size)) else self._tensor(rows)

    def _tensor(self, rows: list[int]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64).to(self.device, non_blocking=True)

    def _alpha(self, fixed: list[float | None]) -> torch.Tensor | None:
        if all(alpha is None for alpha in fixed):
            return None
        values = [float("nan") if alpha is None else alpha for alpha in fixed]
        return torch.tensor(values, dtype=torch.float32).to(self.device, non_blocking=True)


def _num_sampled(runner: Any, request_id: str) -> int:
    return len(runner.requests[request_id].output_token_ids)


def _mask(rows: list[int], size: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[rows] = True
    return mask
