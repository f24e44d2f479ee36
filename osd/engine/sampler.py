"""Sampling from q*: the teacher's sampler mixes both sides' logits, the student's is handed the tokens.

Both replace ``runner.sampler``, the one seam between a vLLM forward pass and its bookkeeping. Order of operations: both
policies are tempered, mixed into log q*, and then allowed tokens, bad words, logit bias, penalties, min-p, top-k and top-p
act on log q* as vLLM defines them on logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from osd.core import RECORD_FIELDS, MixingConfig
from osd.engine.parts import GREEDY_BELOW, Draw, FusedPart, PartInputs, TorchPart, as_index, fused, take, uniform

# B rows of the teacher's batch, P rows where both sides are ready, V vocabulary, R record fields.


@dataclass
class PairRows:
    """Which rows of a step are sampled, and from what.

    Attributes:
        paired: rows of the teacher's batch sampled from q*, [P] int64 on the device; None means all of them, in order.
        student: the student's row for each of those, [P] int64; None means the same rows.
        solo: rows sampled from the teacher alone, [S] int64, or None.
        alpha: the teacher's weight where a request fixes it, NaN where α is solved, [P] float32; None if no request does.
    """

    paired: torch.Tensor | None
    student: torch.Tensor | None
    solo: torch.Tensor | None
    alpha: torch.Tensor | None


class PairSampler(Sampler):
    """vLLM's sampler over log q* instead of one model's logits.

    The worker sets ``rows``, ``student_logits_BV`` and ``constrain`` before each step; then ``token_B`` holds the drawn
    ids and ``values_BR`` the record of every row (NaN in rows that were not sampled). Without ``rows`` (vLLM's warm-up) it
    is vLLM's sampler.

    Where nothing acts on q* between mixing and drawing, and on a GPU, the kernels do both and log q* is never written.
    """

    def __init__(self, mixing: MixingConfig, vocab_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mixing = mixing
        self.vocab_size = vocab_size
        self.rows: PairRows | None = None
        self.student_logits_BV: torch.Tensor | None = None
        self.constrain: Callable[[torch.Tensor], None] | None = None
        self.values_BR: torch.Tensor | None = None
        self.token_B: torch.Tensor | None = None
        self._logp_draw_B: torch.Tensor | None = None
        self._drawing: Draw | None = None

    def forward(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> SamplerOutput:
        if self.rows is None:
            return super().forward(logits, sampling_metadata, *args, **kwargs)
        inputs = self._inputs(logits, sampling_metadata)
        if not fused(self.mixing, logits.device):
            parts: list[Any] = [TorchPart(part, self.mixing) for part in inputs]
        elif self.constrain is None and _nothing_acts_on_q(sampling_metadata):
            return self._draw(logits, inputs, sampling_metadata.generators)
        else:
            parts = [FusedPart(part, self.mixing) for part in inputs]
        # vLLM's processors write into what they are given, and the record still needs log q* as it was.
        logq_BV = self._scatter(logits, parts).clone()
        if self.constrain is not None:
            self.constrain(logq_BV)
        output = super().forward(logq_BV, sampling_metadata, *args, **kwargs)
        self.token_B = output.sampled_token_ids[:, 0].clone()
        self.values_BR = self._record(parts, self.token_B.long())
        output.sampled_token_ids = self._with_failures(parts)
        return output

    def _inputs(self, logits: torch.Tensor, metadata: SamplingMetadata) -> list[PartInputs]:
        rows, temperature_B = self.rows, metadata.temperature
        assert rows is not None
        if temperature_B is None:  # every request is greedy
            temperature_B = logits.new_zeros(logits.shape[0], dtype=torch.float32)
        mixed = partial(PartInputs, teacher=logits, temperature_B=temperature_B, vocab_size=self.vocab_size)
        inputs = []
        if rows.paired is None or len(rows.paired):
            assert self.student_logits_BV is not None
            inputs.append(
                mixed(student=self.student_logits_BV, student_rows=rows.student, rows=rows.paired, alpha=rows.alpha, solo=False)
            )
        if rows.solo is not None:
            ones = torch.ones(len(rows.solo), device=logits.device)
            inputs.append(mixed(student=logits, student_rows=rows.solo, rows=rows.solo, alpha=ones, solo=True))
        return inputs

    def _draw(self, logits: torch.Tensor, inputs: list[PartInputs], generators: dict[int, torch.Generator]) -> SamplerOutput:
        """A step whose tokens the kernels draw."""
        self._drawing = self._drawing or Draw()
        uniform_B = self._drawing.uniform(len(logits), logits.device, generators)
        drawn = [self._drawing(part, self.mixing, uniform_B) for part in inputs]
        if len(inputs) == 1 and inputs[0].rows is None:
            sampled_B, self.values_BR = drawn[0]
        else:
            sampled_B = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
            self.values_BR = torch.full((len(logits), len(RECORD_FIELDS)), float("nan"), device=logits.device)
            for part, (token_P, values_PR) in zip(inputs, drawn, strict=True):
                sampled_B[as_index(part.rows)] = token_P
                self.values_BR[as_index(part.rows)] = _without_student(values_PR) if part.solo else values_PR
        self.token_B = sampled_B.clamp(min=0)  # a negative id is a failure, see FAILED_TOKEN
        return SamplerOutput(sampled_token_ids=sampled_B.unsqueeze(-1), logprobs_tensors=None)

    def warm_up(self, teacher_logits: torch.Tensor, student_logits: torch.Tensor) -> None:
        """Compile the kernels for logits like these, [B, V] with any values, before the first step needs them."""
        ones = torch.ones(len(teacher_logits), device=teacher_logits.device)
        in_order = torch.arange(len(teacher_logits), device=teacher_logits.device)
        draw = Draw()
        for rows in (None, in_order):
            part = PartInputs(
                student=student_logits,
                teacher=teacher_logits,
                student_rows=rows,
                rows=rows,
                temperature_B=ones,
                alpha=None,
                vocab_size=self.vocab_size,
                solo=False,
            )
            draw(part, self.mixing, draw.uniform(len(ones), ones.device, {}))

    def _with_failures(self, parts: list[Any]) -> torch.Tensor:
        """The sampled ids [B, 1]; a negative one tells the scheduler whose logits were not numbers, by FAILED_TOKEN.

        It rides on the copy to the host that vLLM makes anyway; ``token_B`` stays clean, for the next step's input.
        """
        assert self.token_B is not None
        bad_B = torch.zeros_like(self.token_B)
        for part in parts:
            bad_B[as_index(part.rows)] = part.bad_side_P.int()
        return torch.where(bad_B > 0, -1 - bad_B, self.token_B).unsqueeze(-1)

    def _scatter(self, logits: torch.Tensor, parts: list[Any]) -> torch.Tensor:
        """log q* in the shape vLLM expects: the teacher's rows and vocabulary, [B, V] float32."""
        first = parts[0] if parts else None
        if first is not None and first.rows is None and first.logq_PV.shape == logits.shape:
            return first.logq_PV
        # Rows nobody samples stay uniform; ids beyond the shared vocabulary can never be drawn.
        out = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
        out[:, self.vocab_size :] = float("-inf")
        for part in parts:
            out[as_index(part.rows), : self.vocab_size] = part.logq_PV
        return out

    def _record(self, parts: list[Any], token_B: torch.Tensor) -> torch.Tensor:
        assert self._logp_draw_B is not None
        values = torch.full((len(token_B), len(RECORD_FIELDS)), float("nan"), device=token_B.device)
        for part in parts:
            recorded = part.record(take(token_B, part.rows), take(self._logp_draw_B, part.rows))
            values[as_index(part.rows)] = _without_student(recorded) if part.solo else recorded
        return values

    @staticmethod
    def apply_temperature(logits: torch.Tensor, temp: torch.Tensor, all_random: bool) -> torch.Tensor:
        return logits  # both policies were tempered before they were mixed

    def sample(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, logprobs_mode_override: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw from softmax(logits) and remember the log-probability with which each token was drawn."""
        if self.rows is None:
            return super().sample(logits, sampling_metadata, logprobs_mode_override)
        mode = logprobs_mode_override or self.logprobs_mode
        if sampling_metadata.all_greedy:
            self._logp_draw_B = logits.new_zeros(len(logits))
            return logits.argmax(dim=-1), _processed(logits, mode)
        for processor in sampling_metadata.logitsprocs.argmax_invariant:
            logits = processor.apply(logits)
        logits = apply_top_k_top_p(logits, sampling_metadata.top_k, sampling_metadata.top_p)
        token, self._logp_draw_B = draw(logits, sampling_metadata.generators)
        if not sampling_metadata.all_random:
            is_greedy = sampling_metadata.temperature < GREEDY_BELOW
            token = torch.where(is_greedy, logits.argmax(dim=-1), token)  # truncation keeps the peak
            self._logp_draw_B = torch.where(is_greedy, 0.0, self._logp_draw_B)
        return token, _processed(logits, mode)


class FedSampler(Sampler):
    """The student's sampler: returns the tokens that the teacher's side drew.

    ``tokens_B`` is set by the worker before each step, int32 [B'] in the order of the student's rows.
    """

    tokens_B: torch.Tensor | None = None

    def forward(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> SamplerOutput:
        if self.tokens_B is None:
            return super().forward(logits, sampling_metadata, *args, **kwargs)
        return SamplerOutput(sampled_token_ids=self.tokens_B.unsqueeze(-1), logprobs_tensors=None)


_STUDENT_COLUMNS = [RECORD_FIELDS.index(name) for name in ("logp_theta", "kl_theta", "ess_theta")]


def _without_student(values_PR: torch.Tensor) -> torch.Tensor:
    """A record of rows that the student had no part in."""
    return values_PR.index_fill(1, torch.tensor(_STUDENT_COLUMNS, device=values_PR.device), float("nan"))


def _nothing_acts_on_q(metadata: SamplingMetadata) -> bool:
    """Whether every token of a step is drawn from q* as it is, and nothing but the token is wanted."""
    return (
        metadata.top_k is None
        and metadata.top_p is None
        and metadata.no_penalties
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and all(map(_is_idle, metadata.logitsprocs.all))
        and (metadata.thinking_budget_state_holder is None or not metadata.thinking_budget_state_holder.has_tracked_requests())
    )


def _is_idle(processor: LogitsProcessor) -> bool:
    """Whether a logits processor leaves every row alone; one that we do not know may not."""
    if isinstance(processor, MinPLogitsProcessor):
        return not processor.min_p_count
    if isinstance(processor, LogitBiasLogitsProcessor):
        return not processor.biases
    return isinstance(processor, MinTokensLogitsProcessor) and not processor.min_toks


def draw(logits_BV: torch.Tensor, generators: dict[int, torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """One draw per row by inverting the cumulative distribution; returns ids [B] int64 and their log-probabilities [B].

    The cumulative sum is float64: in float32, 150k terms of one row lose the tail.
    """
    peak = logits_BV.amax(dim=-1, keepdim=True)
    cdf = (logits_BV - peak).exp_().cumsum(dim=-1, dtype=torch.float64)
    total = cdf[:, -1:]
    uniform_B1 = uniform(torch.empty(len(cdf), dtype=torch.float64, device=cdf.device), generators).unsqueeze(-1)
    # The first id whose cumulative weight exceeds the target: an id of weight zero can never be it.
    token = torch.searchsorted(cdf, uniform_B1 * total, right=True).clamp_(max=cdf.shape[-1] - 1)
    logp = logits_BV.gather(-1, token) - peak - total.log().to(logits_BV.dtype)
    return token[:, 0], logp[:, 0]


def _processed(logits: torch.Tensor, mode: str) -> torch.Tensor | None:
    if mode == "processed_logits":
        return logits
    return logits.log_softmax(dim=-1) if mode == "processed_logprobs" else None
