"""Aligning the two batches of a step by request id."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from osd.engine.options import PairOptions
from osd.engine.sampler import PairRows


@dataclass
class RowPlan:
    """Which rows of the two runners' batches are sampled in a step, and what is recorded of them.

    Attributes:
        rows: the alignment as the sampler wants it (device tensors).
        ready_mask, student_ready_mask: the same as bool [B] on the host, one entry per row of each runner's batch.
        recorded_ids, recorded_rows: requests whose record is kept, and their rows (None: all, in order).
        hidden: some recorded request wants the teacher's hidden state.
    """

    rows: PairRows
    ready_mask: np.ndarray
    student_ready_mask: np.ndarray
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

    def plan(self, teacher: Any, student: Any, ready: set[str]) -> RowPlan:
        """Align the rows of both runners' persistent batches for the requests in ``ready``."""
        teacher_ids, student_ids = list(teacher.input_batch.req_ids), list(student.input_batch.req_ids)
        key = (teacher_ids, student_ids, ready)
        if self._plan is None or key != self._key or self._someone_is_past(teacher):
            options = {i: PairOptions.of(teacher.requests[i].sampling_params) for i in teacher_ids}
            limits = {i: o.mix_tokens for i, o in options.items() if o.mix_tokens is not None}
            self._still_mixed = {i: limit for i, limit in limits.items() if _num_sampled(teacher, i) < limit}
            options |= {i: replace(options[i], alpha=0.0) for i in limits.keys() - self._still_mixed.keys()}
            self._plan = self._build(teacher_ids, student_ids, ready, options)
            self._key = key
        return self._plan

    def _someone_is_past(self, teacher: Any) -> bool:
        return any(_num_sampled(teacher, i) >= limit for i, limit in self._still_mixed.items())

    def _build(
        self, teacher_ids: list[str], student_ids: list[str], ready: set[str], options: dict[str, PairOptions]
    ) -> RowPlan:
        student_row = {request_id: row for row, request_id in enumerate(student_ids)}
        sampled = [(row, i) for row, i in enumerate(teacher_ids) if i in ready]
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
            recorded_ids=[i for _, i in recorded],
            recorded_rows=self._index([row for row, _ in recorded], len(teacher_ids)),
            hidden=any(options[i].hidden for _, i in recorded),
        )

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
