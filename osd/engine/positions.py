"""Alignment of a cycle: the positions that the teacher scores, and those that the student drafted, by request id and place.

B rows of the teacher's batch, S rows of the student's first pass, N logits rows of the teacher (those of a request are
adjacent), M logits rows of all the student's passes, one pass after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from osd.engine.alignment import Aligner, Alignment
from osd.engine.mixture import GREEDY_BELOW
from osd.engine.request import SampledRequest
from osd.engine.speculation import Layout

_NO_LIMIT = 1 << 62


@dataclass(frozen=True, kw_only=True)
class CycleAlignment:
    """The positions that a cycle samples, and how; :class:`osd.engine.alignment.Alignment` is that of one position per request.

    Attributes:
        requests: the alignment of the requests; of its rows, B are the teacher's and S the student's.
        positions: the alignment of the positions; of its rows, N are the teacher's and M the student's.
        layout: which positions belong to which request.
        student_N: the student's row of each position, int64 (any row where ``has_draft_N`` is False).
        has_draft_N: whether the student has a part in a position, bool; None: in all that are sampled.
        drafts_S: how many drafts follow the first position of each of the student's rows, int32.
        mix_limit_N: the number of tokens after which a position's request is sampled from the student alone, int64; None: no
            request has a limit.
        recorded_ids: the request of each recorded position.
        greedy: some request takes the most likely token.
    """

    requests: Alignment
    positions: Alignment
    layout: Layout
    student_N: torch.Tensor
    has_draft_N: torch.Tensor | None
    drafts_S: torch.Tensor
    mix_limit_N: torch.Tensor | None
    recorded_ids: list[str]
    greedy: bool


class CycleAligner(Aligner):
    """Builds a cycle's :class:`CycleAlignment`, and keeps it while neither batch changes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._cycle_key: tuple | None = None
        self._cycle: CycleAlignment | None = None

    def align_cycle(
        self,
        teacher_ids: list[str],
        drafts: dict[str, int],
        student_ids: Sequence[list[str]],
        ready: set[str],
        requests: dict[str, SampledRequest],
    ) -> CycleAlignment:
        """Align the positions of both sides.

        Args:
            teacher_ids: the request of each row of the teacher's batch.
            drafts: how many drafts a request has in this cycle; those that are not named have none.
            student_ids: the requests of the student's passes, one list each.
            ready, requests: as in :meth:`Aligner.align`.
        """
        key = (teacher_ids, drafts, list(student_ids), ready)
        if self._cycle is None or key != self._cycle_key:
            self._cycle, self._cycle_key = self._build_cycle(*key, requests), key
        return self._cycle

    def _build_cycle(
        self,
        teacher_ids: list[str],
        drafts: dict[str, int],
        student_ids: list[list[str]],
        ready: set[str],
        requests: dict[str, SampledRequest],
    ) -> CycleAlignment:
        first = student_ids[0] if student_ids else []
        counts = [drafts.get(i, 0) for i in teacher_ids]
        teacher = [(i, place) for i, count in zip(teacher_ids, counts, strict=True) for place in range(count + 1)]
        student = [(i, place) for place, ids in enumerate(student_ids) for i in ids]
        row_of = {position: row for row, position in enumerate(student)}
        drafted = [position in row_of or position[0] not in ready for position in teacher]
        limits = [requests[i].options.mix_tokens for i, _ in teacher]
        positions = self._build(
            teacher,
            student,
            {position for position in teacher if position[0] in ready},
            set(),
            {position: requests[position[0]] for position in teacher},
        )
        return CycleAlignment(
            requests=self._build(teacher_ids, first, ready, set(), requests),
            positions=positions,
            layout=Layout.of(counts, self.device),
            student_N=self._tensor([row_of.get(position, 0) for position in teacher], torch.int64),
            has_draft_N=None if all(drafted) else self._tensor(drafted, torch.bool),
            drafts_S=self._tensor([drafts.get(i, 0) for i in first], torch.int32),
            mix_limit_N=None
            if all(limit is None for limit in limits)
            else self._tensor([_NO_LIMIT if limit is None else limit for limit in limits], torch.int64),
            recorded_ids=[request_id for request_id, _ in positions.recorded_ids],
            greedy=any(requests[i].temperature < GREEDY_BELOW for i in teacher_ids),
        )
