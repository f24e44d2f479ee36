"""SpeculativeSampler: decides which of the student's drafts stay, and draws the token after them.

The target at a position is what :class:`osd.engine.backend.sampler.PairSampler` would draw from there: log q*, and then a
grammar, penalties, top-k and whatever else acts on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from osd.core import RECORD_FIELDS, MixingConfig
from osd.engine import speculation
from osd.engine.alignment import Alignment
from osd.engine.backend.sampler import PairSampler, StepInputs, StepOutputs
from osd.engine.mixture import (
    GREEDY_BELOW,
    NO_TOKEN,
    KernelDraw,
    KernelMixture,
    MixtureInputs,
    ReferenceMixture,
    as_index,
    draw,
    take,
    uniform,
    use_kernels,
)
from osd.engine.positions import CycleAlignment
from osd.engine.speculation import ACCEPT, CORRECT, DRAFT, stream

# B requests, S rows of a pass of the student, N positions of all requests, M drafts, V vocabulary, R record fields.

_LOGP_THETA = RECORD_FIELDS.index("logp_theta")
_FROM_THETA = MixingConfig(alpha_method="fixed", fixed_alpha=1.0)  # of the student twice: π_θ


@dataclass(frozen=True, kw_only=True)
class CycleOutputs:
    """One cycle's tokens and their record.

    Attributes:
        positions: the tokens of all positions, kept or not; ``bad_side_B`` has one entry per request: of its last kept token.
        verdict: which of them are kept.
    """

    positions: StepOutputs
    verdict: speculation.Verdict


class SpeculativeSampler(PairSampler):
    """Draws the drafts of the student, and one to W tokens per ready request."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._draft_draws: dict[int, KernelDraw] = {}  # one per pass: each pass has logits at addresses of its own

    def warm_up(self, teacher: torch.Tensor, student: torch.Tensor) -> None:
        super().warm_up(teacher, student)
        if not use_kernels(self.mixing, teacher.device):
            return
        count = torch.arange(len(teacher), device=teacher.device)
        for inputs in self._warm_up_inputs(teacher, student):
            KernelMixture(inputs, self.mixing).record(count, count.float())
        self.draft(student, torch.ones(len(student), device=student.device), count, count.int(), place=0)

    def draft(
        self, logits_SV: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, length_S: torch.Tensor, place: int
    ) -> torch.Tensor:
        """Draw a token of π_θ for every row of a pass of the student, int64 [S]; any valid id where π_θ is no distribution."""
        seed_S = stream(seed_S, DRAFT)
        if use_kernels(_FROM_THETA, logits_SV.device):
            inputs = MixtureInputs(
                student=logits_SV,
                teacher=logits_SV,
                temperature_B=temperature_S,
                vocab_size=self.vocab_size,
                solo=True,
            )
            return self._draft_draws.setdefault(place, KernelDraw())(inputs, _FROM_THETA, seed_S, length_S)[0].long()
        logp_SV = self._tempered(logits_SV, None, temperature_S)
        token_S = draw(logp_SV, uniform(seed_S, length_S))[0]
        return torch.where(temperature_S < GREEDY_BELOW, logp_SV.argmax(dim=-1), token_S)

    def verify(self, inputs: StepInputs, alignment: CycleAlignment, draft_M: torch.Tensor | None) -> CycleOutputs:
        """Decide a cycle: ``inputs`` of its positions, and the student's drafts (None: no student ran)."""
        rows = alignment.positions
        length_N = inputs.batch.positions[inputs.batch.logits_indices] + 1
        if alignment.mix_limit_N is not None:
            rows = replace(rows, alpha=self._limited_alpha(inputs.batch, rows, length_N, alignment.mix_limit_N))
            inputs = replace(inputs, alignment=rows)
        mixture = KernelMixture if use_kernels(self.mixing, inputs.teacher.device) else ReferenceMixture
        parts: list[Any] = [mixture(part, self.mixing) for part in self._parts(inputs)]
        logq_NV = self._scatter(inputs.teacher, parts)
        target_NV = self._process(logq_NV, inputs)
        lse_N = 0.0 if target_NV is logq_NV else target_NV.logsumexp(dim=-1)
        draft_N = torch.zeros_like(alignment.student_N) if draft_M is None else draft_M[alignment.student_N]
        greedy_N = rows.temperature_B < GREEDY_BELOW

        def logp_target(token_N: torch.Tensor) -> torch.Tensor:
            return target_NV.gather(-1, token_N[:, None])[:, 0] - lse_N

        logp_draft_N = logp_target(draft_N)
        logp_theta_N = self._record(inputs.teacher, parts, draft_N, logp_draft_N)[:, _LOGP_THETA]
        accepted_N = speculation.accept(logp_draft_N, logp_theta_N, uniform(stream(rows.seed_B, ACCEPT), length_N))
        if alignment.greedy:
            likely_N = target_NV.argmax(dim=-1)
            accepted_N = torch.where(greedy_N, draft_N == likely_N, accepted_N)
        if alignment.has_draft_N is not None:
            accepted_N = accepted_N & alignment.has_draft_N

        def correct(final_B: torch.Tensor) -> torch.Tensor:
            has_draft_B = None if alignment.has_draft_N is None else alignment.has_draft_N[final_B]
            token_B = speculation.draw_residual(
                target_NV[final_B],
                self._theta(inputs, alignment, final_B),
                has_draft_B,
                uniform(stream(rows.seed_B[final_B], CORRECT), length_N[final_B]),
            )
            if alignment.greedy:
                token_B = torch.where(greedy_N[final_B], likely_N[final_B], token_B)
            return token_B.masked_fill(~target_NV[final_B].amax(dim=-1).isfinite(), 0)  # an id that both models can embed

        verdict = speculation.verify(alignment.layout, draft_N=draft_N, accepted_N=accepted_N, correct=correct)
        logp_draw_N = torch.where(greedy_N, 0.0, logp_target(verdict.token_N))
        values_NR = self._record(inputs.teacher, parts, verdict.token_N, logp_draw_N)
        bad_side_B = self._bad_side(parts, target_NV, verdict.final_B)
        logprobs = None if rows.plain else self._logprobs(logq_NV, target_NV, verdict.token_N, inputs.batch)
        positions = StepOutputs(
            token_B=verdict.token_N,
            values_BR=values_NR,
            bad_side_B=bad_side_B,
            logprobs=logprobs,
            origin_B=verdict.origin_N,
            topk_BX=self._topk(inputs),
        )
        return CycleOutputs(positions=positions, verdict=verdict)

    def _limited_alpha(self, batch: InputBatch, rows: Alignment, length_N: torch.Tensor, limit_N: torch.Tensor) -> torch.Tensor:
        """Return the given α of the mixed positions, float32 [P]: 0 after the request's ``mix_tokens``."""
        prompt_N = self.stock.req_states.prompt_len.gpu[batch.expanded_idx_mapping]
        beyond_P = take(length_N - prompt_N >= limit_N, rows.paired)
        alpha_P = torch.full_like(beyond_P, float("nan"), dtype=torch.float32) if rows.alpha is None else rows.alpha
        return torch.where(beyond_P, 0.0, alpha_P)

    def nothing(self, teacher: torch.Tensor, alignment: CycleAlignment) -> CycleOutputs:
        """Return the outputs of a step that samples no request."""
        positions, layout = self._empty(teacher), alignment.layout
        none_N = torch.zeros_like(positions.token_B, dtype=torch.bool)
        verdict = speculation.verify(
            layout, draft_N=positions.token_B, accepted_N=none_N, correct=lambda final_B: positions.token_B[final_B]
        )
        return CycleOutputs(positions=replace(positions, bad_side_B=positions.bad_side_B[layout.first_B]), verdict=verdict)

    def _bad_side(self, parts: list[Any], target_NV: torch.Tensor, final_B: torch.Tensor) -> torch.Tensor:
        """Return each request's sides whose logits are not numbers, at its last kept token: no draft is accepted there."""
        bad_side_N = torch.zeros(len(target_NV), dtype=torch.int32, device=target_NV.device)
        for part in parts:
            bad_side_N[as_index(part.rows)] = part.bad_side_P.int()
        bad_side_B = bad_side_N[final_B]
        dead_B = ~target_NV[final_B].amax(dim=-1).isfinite()
        return bad_side_B.masked_fill(dead_B & (bad_side_B == 0), NO_TOKEN)

    def _theta(self, inputs: StepInputs, alignment: CycleAlignment, final_B: torch.Tensor) -> torch.Tensor | None:
        """Return log π_θ, not normalised, at some positions, in the teacher's vocabulary; None if no student ran."""
        if inputs.student is None:
            return None
        temperature_B = alignment.positions.temperature_B[final_B]
        theta_BV = self._tempered(inputs.student, alignment.student_N[final_B], temperature_B)
        beyond = inputs.teacher.shape[1] - self.vocab_size
        return torch.nn.functional.pad(theta_BV, (0, beyond), value=float("-inf")) if beyond else theta_BV

    def _tempered(self, logits: torch.Tensor, rows: torch.Tensor | None, temperature_B: torch.Tensor) -> torch.Tensor:
        """Return rows of the logits over the shared vocabulary, divided by the temperature of rows that are not greedy."""
        divisor_B = torch.where(temperature_B < GREEDY_BELOW, 1.0, temperature_B)
        return take(logits, rows)[:, : self.vocab_size].float() / divisor_B[:, None]
