"""Sampling from q*: the teacher's sampler mixes both sides' logits, the student's is handed the tokens.

Both replace ``runner.sampler``, the one seam between a vLLM forward pass and its bookkeeping. Order of operations: both
policies are tempered, mixed into log q*, and then allowed tokens, bad words, logit bias, penalties, min-p, top-k and top-p
act on log q* as vLLM defines them on logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from osd.core import RECORD_FIELDS, MixingConfig
from osd.mixing import mix, record_rows

# B rows of the teacher's batch, P rows where both sides are ready, V vocabulary, R record fields.

_GREEDY_BELOW = 1e-5  # vLLM's own threshold for "temperature 0"


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

    def forward(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> SamplerOutput:
        if self.rows is None:
            return super().forward(logits, sampling_metadata, *args, **kwargs)
        parts = self._mix_parts(logits, sampling_metadata)
        # vLLM's processors write into what they are given, and the record still needs log q* as it was.
        logq_BV = self._scatter(logits, parts).clone()
        bad_B = _bad_rows(logits, parts)
        if self.constrain is not None:
            self.constrain(logq_BV)
        output = super().forward(logq_BV, sampling_metadata, *args, **kwargs)
        token_B = output.sampled_token_ids[:, 0]
        self.token_B = token_B.clone()
        self.values_BR = self._record(parts, token_B.long())
        # A negative id tells the scheduler which side's logits were not numbers, on the copy that vLLM makes anyway.
        token_B.copy_(torch.where(bad_B > 0, -1 - bad_B.to(token_B.dtype), token_B))
        return output

    def _mix_parts(self, logits: torch.Tensor, metadata: SamplingMetadata) -> list[_Part]:
        rows = self.rows
        assert rows is not None
        temperature_B = metadata.temperature
        if temperature_B is None:  # every request is greedy
            temperature_B = logits.new_zeros(logits.shape[0], dtype=torch.float32)
        temperature_B = torch.where(temperature_B < _GREEDY_BELOW, 0.0, temperature_B)
        parts = []
        if rows.paired is None or len(rows.paired):
            parts.append(self._part(logits, temperature_B, rows.paired, rows.student, rows.alpha))
        if rows.solo is not None:
            parts.append(self._part(logits, temperature_B, rows.solo, None, None, solo=True))
        return parts

    def _part(
        self,
        logits: torch.Tensor,
        temperature_B: torch.Tensor,
        rows: torch.Tensor | None,
        student_rows: torch.Tensor | None,
        alpha: torch.Tensor | None,
        *,
        solo: bool = False,
    ) -> _Part:
        teacher = take(logits, rows)[:, : self.vocab_size]
        temperature = take(temperature_B, rows)
        if solo:
            student, alpha = teacher, torch.ones_like(temperature)
        else:
            assert self.student_logits_BV is not None
            student = take(self.student_logits_BV, student_rows)[:, : self.vocab_size]
        mixture = mix(student, teacher, self.mixing, temperature_B=temperature, alpha_B=alpha)
        return _Part(rows, student, teacher, temperature, mixture, solo)

    def _scatter(self, logits: torch.Tensor, parts: list[_Part]) -> torch.Tensor:
        """log q* in the shape vLLM expects: the teacher's rows and vocabulary, [B, V] float32."""
        first = parts[0] if parts else None
        if first is not None and first.rows is None and first.mixture.logq_BV.shape == logits.shape:
            return first.mixture.logq_BV
        # Rows nobody samples stay uniform; ids beyond the shared vocabulary can never be drawn.
        out = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
        out[:, self.vocab_size :] = float("-inf")
        for part in parts:
            out[as_index(part.rows), : self.vocab_size] = part.mixture.logq_BV
        return out

    def _record(self, parts: list[_Part], token_B: torch.Tensor) -> torch.Tensor:
        assert self._logp_draw_B is not None
        values = torch.full((len(token_B), len(RECORD_FIELDS)), float("nan"), device=token_B.device)
        for part in parts:
            token, logp_draw = take(token_B, part.rows), take(self._logp_draw_B, part.rows)
            rows = record_rows(part.mixture, part.student, part.teacher, part.temperature, token, logp_draw)
            if part.solo:
                rows[:, _STUDENT_COLUMNS] = float("nan")
            values[as_index(part.rows)] = rows
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
            is_greedy = sampling_metadata.temperature < _GREEDY_BELOW
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


@dataclass
class _Part:
    """One mixture of a step and the rows of the batch that it belongs to (None: all, in order)."""

    rows: torch.Tensor | None
    student: torch.Tensor
    teacher: torch.Tensor
    temperature: torch.Tensor
    mixture: Any
    solo: bool


_STUDENT_COLUMNS = [RECORD_FIELDS.index(name) for name in ("logp_theta", "kl_theta", "ess_theta")]


def draw(logits_BV: torch.Tensor, generators: dict[int, torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """One draw per row by inverting the cumulative distribution; returns ids [B] int64 and their log-probabilities [B].

    One uniform number per row, from the row's own generator where it has one, so that a seeded request's draws depend on
    nothing but its own steps. The cumulative sum is float64: in float32, 150k terms of one row lose the tail.
    """
    peak = logits_BV.amax(dim=-1, keepdim=True)
    cdf = (logits_BV - peak).exp_().cumsum(dim=-1, dtype=torch.float64)
    total = cdf[:, -1:]
    uniform = torch.rand(len(cdf), 1, dtype=torch.float64, device=cdf.device)
    for row, generator in generators.items():
        uniform[row] = torch.rand(1, dtype=torch.float64, device=cdf.device, generator=generator)
    # The first id whose cumulative weight exceeds the target: an id of weight zero can never be it.
    token = torch.searchsorted(cdf, uniform * total, right=True).clamp_(max=cdf.shape[-1] - 1)
    logp = logits_BV.gather(-1, token) - peak - total.log().to(logits_BV.dtype)
    return token[:, 0], logp[:, 0]


def _processed(logits: torch.Tensor, mode: str) -> torch.Tensor | None:
    if mode == "processed_logits":
        return logits
    return logits.log_softmax(dim=-1) if mode == "processed_logprobs" else None


def _bad_rows(logits: torch.Tensor, parts: list[_Part]) -> torch.Tensor:
    """Which side's logits were not numbers, int8 [B] as in ``Mixture.bad_side_B``."""
    bad_B = torch.zeros(len(logits), dtype=torch.int8, device=logits.device)
    for part in parts:
        # A solo row is mixed with itself: both sides are the teacher's.
        bad = part.mixture.bad_side_B
        bad_B[as_index(part.rows)] = torch.where(bad > 0, 2, 0).to(torch.int8) if part.solo else bad
    return bad_B


def take(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return tensor if rows is None else tensor[rows]


def as_index(rows: torch.Tensor | None) -> torch.Tensor | slice:
    return slice(None) if rows is None else rows
