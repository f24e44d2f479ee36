"""PairSampler: draws a step's tokens from q*, instead of vLLM's sampler.

Order of operations: both policies are tempered and mixed into log q*. Then a grammar, logit bias, allowed tokens, penalties,
bad words, a thinking budget, min-p, top-k and top-p act on log q*, as vLLM defines them on logits; vLLM's own sampler keeps
their state and applies them. Where none is active, on a GPU, the kernels mix and draw at once and log q* is never written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from osd.core import RECORD_FIELDS, MixingConfig
from osd.engine.alignment import Alignment
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
from osd.engine.topk import top_k

# B rows of the teacher's batch, S rows of the student's, P rows mixed together, V vocabulary, R record fields.

_STUDENT_COLUMNS = [RECORD_FIELDS.index(name) for name in ("logp_theta", "kl_theta", "ess_theta")]


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """One step's logits and rows.

    Attributes:
        teacher, student: raw logits [B, V'] and [S, V''] in the models' own vocabularies; no student where no row is mixed.
        alignment: the rows that are sampled, and how.
        batch: the teacher's batch.
        constrain: masks log q* [B, V'] in place by the requests' grammars, or None.
    """

    teacher: torch.Tensor
    student: torch.Tensor | None
    alignment: Alignment
    batch: InputBatch
    constrain: Callable[[torch.Tensor], None] | None


@dataclass(frozen=True, kw_only=True)
class StepOutputs:
    """One step's tokens and their record.

    Attributes:
        token_B: drawn ids, int64 or int32; 0 in rows that are not sampled.
        values_BR: the record, float32; NaN in rows that are not sampled.
        bad_side_B: sides whose logits are not numbers (0: neither, 1: student, 2: teacher, 3: both), or ``NO_TOKEN``; int32.
        logprobs: the logprobs that requests asked for, of q*.
        origin_B: how each token came to be, an index into ``osd.core.TOKEN_ORIGINS``; None without drafts.
        topk_BX: the teacher's largest log-probabilities (`osd.engine.topk`) in the rows of requests that want them, or None.
    """

    token_B: torch.Tensor
    values_BR: torch.Tensor
    bad_side_B: torch.Tensor
    logprobs: LogprobsTensors | None = None
    origin_B: torch.Tensor | None = None
    topk_BX: torch.Tensor | None = None


class PairSampler:
    """Draws one token per ready row from q*.

    Args:
        mixing: how α is chosen; may be replaced between steps.
        vocab_size: the ids that both models share.
        stock: the teacher's own sampler, which holds the requests' sampling state.
    """

    def __init__(self, mixing: MixingConfig, vocab_size: int, stock: Sampler) -> None:
        self.mixing = mixing
        self.vocab_size = vocab_size
        self.stock = stock
        stock.sampling_states.apply_temperature = lambda *_: None  # both policies are tempered before they are mixed
        self._kernel_draw: KernelDraw | None = None

    def __call__(self, inputs: StepInputs) -> StepOutputs:
        if not inputs.alignment.num_ready:
            return self._empty(inputs.teacher)
        return replace(self._drawn(inputs), topk_BX=self._topk(inputs))

    def _topk(self, inputs: StepInputs) -> torch.Tensor | None:
        """Return the teacher's largest log-probabilities: of π_t itself, before anything that acts on log q*."""
        of, logits_BV = inputs.alignment, inputs.teacher[:, : self.vocab_size]
        if not of.topk:
            return None
        topk_PX = top_k(take(logits_BV, of.topk_rows), take(of.temperature_B, of.topk_rows), of.topk)
        if of.topk_rows is None:
            return topk_PX
        return topk_PX.new_zeros(len(logits_BV), topk_PX.shape[1]).index_copy_(0, of.topk_rows, topk_PX)

    def _drawn(self, inputs: StepInputs) -> StepOutputs:
        parts = self._parts(inputs)
        if not use_kernels(self.mixing, inputs.teacher.device):
            return self._processed(inputs, [ReferenceMixture(part, self.mixing) for part in parts])
        if inputs.alignment.plain and inputs.constrain is None:
            return self._plain(inputs, parts)
        return self._processed(inputs, [KernelMixture(part, self.mixing) for part in parts])

    def _parts(self, inputs: StepInputs) -> list[MixtureInputs]:
        """Split the ready rows into those mixed from both sides and those of the teacher alone."""
        rows = inputs.alignment
        shared: dict[str, Any] = dict(teacher=inputs.teacher, temperature_B=rows.temperature_B, vocab_size=self.vocab_size)
        parts = []
        if rows.paired is None or len(rows.paired):
            assert inputs.student is not None
            chosen: dict[str, Any] = dict(student_rows=rows.student, rows=rows.paired, alpha=rows.alpha)
            parts.append(MixtureInputs(student=inputs.student, **chosen, **shared))
        if rows.solo is not None:
            ones = torch.ones(len(rows.solo), device=inputs.teacher.device)
            parts.append(
                MixtureInputs(student=inputs.teacher, student_rows=rows.solo, rows=rows.solo, alpha=ones, solo=True, **shared)
            )
        return parts

    # -- tokens drawn from q* itself --------------------------------------------------------------------------------

    def _plain(self, inputs: StepInputs, parts: list[MixtureInputs]) -> StepOutputs:
        """Draw with the kernels."""
        self._kernel_draw = self._kernel_draw or KernelDraw()
        seed_B, length_B = inputs.alignment.seed_B, inputs.batch.seq_lens[: len(inputs.teacher)]
        drawn = [self._kernel_draw(part, self.mixing, seed_B, length_B) for part in parts]
        if len(parts) == 1 and parts[0].rows is None:
            token_B, bad_side_B, values_BR = drawn[0]
            return StepOutputs(token_B=token_B, bad_side_B=bad_side_B, values_BR=values_BR)
        out = self._empty(inputs.teacher)
        for part, (token_P, bad_side_P, values_PR) in zip(parts, drawn, strict=True):
            rows = as_index(part.rows)
            out.token_B[rows] = token_P.to(out.token_B.dtype)
            out.bad_side_B[rows] = bad_side_P
            out.values_BR[rows] = without_student(values_PR) if part.solo else values_PR
        return out

    def warm_up(self, teacher: torch.Tensor, student: torch.Tensor) -> None:
        """Compile the kernels for logits like these, [B, V] with any values, before the first step needs them."""
        if not use_kernels(self.mixing, teacher.device):
            return
        count = torch.arange(len(teacher), device=teacher.device)
        for inputs in self._warm_up_inputs(teacher, student):
            KernelDraw()(inputs, self.mixing, count, count.int())

    def _warm_up_inputs(self, teacher: torch.Tensor, student: torch.Tensor) -> Iterator[MixtureInputs]:
        """Yield inputs of all rows of each side, and of chosen rows: a kernel is compiled for each of the four."""
        count = torch.arange(len(teacher), device=teacher.device)
        for student_rows, rows in product((None, count), repeat=2):
            yield MixtureInputs(
                student=student,
                teacher=teacher,
                student_rows=student_rows,
                rows=rows,
                temperature_B=torch.ones(len(teacher), device=teacher.device),
                vocab_size=self.vocab_size,
            )

    # -- tokens drawn from what other sampling parameters make of q* ------------------------------------------------

    def _processed(self, inputs: StepInputs, parts: list[Any]) -> StepOutputs:
        """Apply the sampling parameters to log q*, and draw."""
        logq_BV = self._scatter(inputs.teacher, parts)
        processed_BV = self._process(logq_BV, inputs)
        rows = inputs.alignment
        token_B, logp_draw_B = draw(processed_BV, uniform(rows.seed_B, inputs.batch.seq_lens[: len(logq_BV)]))
        greedy_B = rows.temperature_B < GREEDY_BELOW
        token_B = torch.where(greedy_B, processed_BV.argmax(dim=-1), token_B)
        logp_draw_B = torch.where(greedy_B, 0.0, logp_draw_B)
        dead_B = ~processed_BV.amax(dim=-1).isfinite()  # NaN, or the sampling parameters leave no token
        token_B = token_B.masked_fill(dead_B, 0)  # any id that both models can embed; the request ends in error
        out = self._empty(inputs.teacher)
        for part in parts:
            bad_side_P = part.bad_side_P.int()
            bad_side_P = bad_side_P.masked_fill(take(dead_B, part.rows) & (bad_side_P == 0), NO_TOKEN)
            out.bad_side_B[as_index(part.rows)] = bad_side_P
        values_BR = self._record(inputs.teacher, parts, token_B, logp_draw_B)
        logprobs = self._logprobs(logq_BV, processed_BV, token_B, inputs.batch)
        return StepOutputs(token_B=token_B, values_BR=values_BR, bad_side_B=out.bad_side_B, logprobs=logprobs)

    def _record(
        self, teacher: torch.Tensor, parts: list[Any], token_B: torch.Tensor, logp_draw_B: torch.Tensor
    ) -> torch.Tensor:
        """Return the record of these tokens, float32 [B, R]; NaN in rows that are not sampled."""
        values_BR = self._empty(teacher).values_BR
        for part in parts:
            values_PR = part.record(take(token_B, part.rows), take(logp_draw_B, part.rows))
            values_BR[as_index(part.rows)] = without_student(values_PR) if part.solo else values_PR
        return values_BR

    def _process(self, logq_BV: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        """Return what the grammars and sampling parameters make of log q*, which stays as it is: in vLLM's order."""
        if inputs.constrain is not None:
            logq_BV = logq_BV.clone()
            inputs.constrain(logq_BV)
        if inputs.alignment.plain:
            return logq_BV
        batch = inputs.batch
        return self.stock.apply_sampling_params(
            logq_BV,
            batch.expanded_idx_mapping,
            batch.idx_mapping,
            batch.idx_mapping_np,
            batch.positions[batch.logits_indices],
            batch.input_ids[batch.logits_indices],
            batch.expanded_local_pos,
            batch.seq_lens_cpu_upper_bound.numpy(),
        )

    def _logprobs(
        self, logq_BV: torch.Tensor, processed_BV: torch.Tensor, token_B: torch.Tensor, batch: InputBatch
    ) -> LogprobsTensors | None:
        stock = self.stock
        dims = stock.get_logprobs_dims(batch.idx_mapping_np)
        if dims is None:
            return None
        return compute_topk_scores(
            processed_BV if stock.logprobs_mode in PROCESSED_LOGPROBS_MODES else logq_BV,
            dims[0],
            token_B,
            batch.cu_num_logits_np.tolist() if batch.num_draft_tokens else None,
            logprob_token_ids_state=stock.logprob_token_ids_state,
            expanded_idx_mapping=batch.expanded_idx_mapping,
            max_per_req_token_ids=dims[1],
            logits_mode=stock.logprobs_mode in ("raw_logits", "processed_logits"),
        )

    def _scatter(self, teacher: torch.Tensor, parts: list[Any]) -> torch.Tensor:
        """Return log q* in the teacher's rows and vocabulary, float32 [B, V']."""
        first = parts[0]
        if first.rows is None and first.logq_PV.shape == teacher.shape:
            return first.logq_PV
        # Rows that are not sampled stay uniform; ids beyond the shared vocabulary can never be drawn.
        out = torch.zeros(teacher.shape, dtype=torch.float32, device=teacher.device)
        out[:, self.vocab_size :] = float("-inf")
        for part in parts:
            out[as_index(part.rows), : self.vocab_size] = part.logq_PV
        return out

    def _empty(self, teacher: torch.Tensor) -> StepOutputs:
        rows, device = len(teacher), teacher.device
        return StepOutputs(
            token_B=torch.zeros(rows, dtype=torch.int64, device=device),
            values_BR=torch.full((rows, len(RECORD_FIELDS)), float("nan"), device=device),
            bad_side_B=torch.zeros(rows, dtype=torch.int32, device=device),
        )


def without_student(values_PR: torch.Tensor) -> torch.Tensor:
    """Blank the student's columns in the record of rows that the student has no part in."""
    return values_PR.index_fill(1, torch.tensor(_STUDENT_COLUMNS, device=values_PR.device), float("nan"))


# -- what vLLM's runners need of a sampler ----------------------------------------------------------------------------


def counts(
    states: Any, batch: InputBatch, ready_B: torch.Tensor, rejected_B: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (num_sampled, num_rejected) of each row, int32: by vLLM's own kernel.

    (1, 0) where a row is ready, (0, 0) inside a prefill. ``rejected_B``: every row is ready.
    """
    if rejected_B is not None:
        return ready_B, rejected_B
    return get_num_sampled_and_rejected(
        ready_B.clone(), batch.seq_lens, batch.cu_num_logits, batch.idx_mapping, states.prefill_len.gpu
    )


def sampler_output(outputs: StepOutputs, num_sampled: torch.Tensor, num_rejected: torch.Tensor) -> SamplerOutput:
    """Return a step's tokens as vLLM's runner takes them; failed rows travel as ``num_nans``, by request."""
    return SamplerOutput(
        sampled_token_ids=outputs.token_B.view(len(outputs.token_B), -1),
        logprobs_tensors=outputs.logprobs,
        num_nans=outputs.bad_side_B,
        num_sampled=num_sampled,
        num_rejected=num_rejected,
    )


def set_prompt_mask(stock: Sampler, slot: int, prompt_token_ids: list[int]) -> None:
    """Make a request's repetition penalty count this prompt: the student's, not the teacher's private one."""
    mask = stock.penalties_state.prompt_bin_mask
    bits = np.zeros(mask.shape[1] * 32, dtype=np.uint8)
    bits[prompt_token_ids] = 1
    packed = np.packbits(bits, bitorder="little").view(np.int32)
    mask[slot] = torch.from_numpy(packed).to(mask.device, non_blocking=True)


class NoSampler:
    """Sampler of the student, without state. vLLM's would count every token of the vocabulary for each request."""

    def __init__(self, states: Any) -> None:
        self.states = states
        self.penalties_state = _NoPenalties()

    def add_request(self, *args: Any) -> None:
        pass

    def apply_staged_writes(self) -> None:
        pass

    def __call__(self, logits: torch.Tensor, batch: InputBatch) -> SamplerOutput:
        """Return zeros as tokens, for vLLM's profile and warm-up runs."""
        rows = len(logits)
        zeros = torch.zeros(rows, dtype=torch.int32, device=logits.device)
        outputs = StepOutputs(token_B=zeros, values_BR=torch.empty(0), bad_side_B=zeros)
        return sampler_output(outputs, *counts(self.states, batch, torch.ones_like(zeros), None))


class _NoPenalties:
    output_bin_counts = None
