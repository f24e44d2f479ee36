"""The mixture of a step's rows, and the draw from it: by the fused kernels, or by their reference in torch.

B rows of the teacher's batch, P rows that are mixed together, V the shared vocabulary, R record fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from osd import kernels
from osd.core import MixingConfig
from osd.mixing import mix, record_rows

NO_TOKEN = 4  # a `bad_side` beside 1 to 3 (the sides with NaN): the sampling parameters leave no token
GREEDY_BELOW = 1e-5  # vLLM's own threshold for temperature 0


@dataclass(frozen=True, kw_only=True)
class MixtureInputs:
    """Logits of both sides, and which of their rows belong together.

    Attributes:
        student, teacher: raw logits of either batch, [S, >= V] and [B, >= V].
        temperature_B: float32, one entry per row of the teacher's batch; a row below GREEDY_BELOW is greedy.
        vocab_size: V.
        student_rows, rows: the rows to mix, int64 [P]; None: all rows in order.
        alpha: the teacher's weight where a request fixes it and NaN where it is solved, [P] float32, or None.
        solo: the rows are sampled from the teacher alone.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    temperature_B: torch.Tensor
    vocab_size: int
    student_rows: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    alpha: torch.Tensor | None = None
    solo: bool = False


class ReferenceMixture:
    """Rows mixed by `osd.mixing`: on any device, by any method.

    Attributes:
        rows, solo: as in :class:`MixtureInputs`.
        logq_PV: log q*, float32.
        bad_side_P: int8, as in ``osd.mixing.Mixture``; only the teacher's where the rows are solo.
    """

    def __init__(self, inputs: MixtureInputs, config: MixingConfig) -> None:
        self.rows, self.solo = inputs.rows, inputs.solo
        student = take(inputs.student, inputs.student_rows)[:, : inputs.vocab_size]
        teacher = take(inputs.teacher, inputs.rows)[:, : inputs.vocab_size]
        temperature = take(inputs.temperature_B, inputs.rows)
        temperature = torch.where(temperature < GREEDY_BELOW, 0.0, temperature)
        self._inputs = student, teacher, temperature
        self._mixture = mix(student, teacher, config, temperature_B=temperature, alpha_B=inputs.alpha)
        self.logq_PV = self._mixture.logq_BV
        self.bad_side_P = _side(self._mixture.bad_side_B, inputs.solo)

    def record(self, token_P: torch.Tensor, logp_draw_P: torch.Tensor) -> torch.Tensor:
        """Return the record of the drawn tokens, float32 [P, R]."""
        return record_rows(self._mixture, *self._inputs, token_P, logp_draw_P)


class KernelMixture:
    """Rows mixed by the kernels, with log q* written out; attributes as in :class:`ReferenceMixture`."""

    def __init__(self, inputs: MixtureInputs, config: MixingConfig) -> None:
        from osd.kernels.fused import mix_and_draw  # needs Triton

        self.rows, self.solo = inputs.rows, inputs.solo
        self._mixture = mix_and_draw(inputs.student, inputs.teacher, config, **_kernel_arguments(inputs), write_logq=True)
        assert self._mixture.logq_PV is not None
        self.logq_PV = self._mixture.logq_PV
        self.bad_side_P = _side(self._mixture.bad_side_P, inputs.solo)

    def record(self, token_P: torch.Tensor, logp_draw_P: torch.Tensor) -> torch.Tensor:
        """Return the record of the drawn tokens, float32 [P, R]."""
        return self._mixture.record_at(token_P, logp_draw_P)


class KernelDraw:
    """Draws from q* with the kernels: raw logits in, tokens and their record out; replayed as a CUDA graph where it can be."""

    def __init__(self) -> None:
        from osd.kernels.draw_graph import ReplayedDraw  # needs Triton

        self._draw = ReplayedDraw()

    def __call__(
        self, inputs: MixtureInputs, config: MixingConfig, seed_B: torch.Tensor, length_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (token_P, bad_side_P, values_PR): ids >= 0 and sides, int32, and the record."""
        (token_P, bad_side_P), values_PR = self._draw(
            inputs.student,
            inputs.teacher,
            config,
            **_kernel_arguments(inputs),
            seed=take(seed_B, inputs.rows),
            length=take(length_B, inputs.rows),
        )
        return token_P, _side(bad_side_P, inputs.solo), values_PR


def _kernel_arguments(inputs: MixtureInputs) -> dict[str, Any]:
    return dict(
        vocab_size=inputs.vocab_size,
        rows_theta=inputs.student_rows,
        rows_teacher=inputs.rows,
        temperature=inputs.temperature_B,
        alpha=inputs.alpha,
    )


def _side(bad_side_P: torch.Tensor, solo: bool) -> torch.Tensor:
    """Return the sides whose logits are not numbers; solo rows have the teacher's logits on both sides: only it counts."""
    return bad_side_P.clamp(max=2) if solo else bad_side_P


def draw(logq_BV: torch.Tensor, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    The cumulative sum is float64: in float32, 150k terms of one row lose the tail.

    Args:
        logq_BV: log-weights, which need not be normalised, float [B, V].
        uniform_B: numbers in [0, 1), float64 [B].

    Returns:
        ids [B] int64 and their log-probabilities [B].
    """
    peak = logq_BV.amax(dim=-1, keepdim=True)
    cdf = (logq_BV - peak).exp_().cumsum(dim=-1, dtype=torch.float64)
    token = inverse_cdf(cdf, uniform_B)[:, None]
    logp = logq_BV.gather(-1, token) - peak - cdf[:, -1:].log().to(logq_BV.dtype)
    return token[:, 0], logp[:, 0]


def inverse_cdf(cdf_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Return the first id of each row whose cumulative weight, float64, exceeds that share of the total, int64 [B].

    An id of weight zero is never drawn.
    """
    token = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True)
    return token[:, 0].clamp_(max=cdf_BV.shape[-1] - 1)


def uniform(seed_B: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
    """Return a number in [0, 1) for each seed and length, float64 [B]: the same pair gives the same number.

    SplitMix64 of the seed, then of that plus the length times the golden ratio; the top 53 bits. A request's draws depend on
    its seed and on how many tokens come before, not on its batch, on preemptions or on the device.

    Args:
        seed_B: int64 [B].
        length_B: tokens before the one that is drawn, any integer type [B].
    """
    if kernels.available(seed_B.device):
        from osd.kernels.uniform import uniform as on_gpu  # needs Triton

        return on_gpu(seed_B, length_B)
    bits = _mix_bits(_mix_bits(seed_B) + length_B.long() * _signed(0x9E3779B97F4A7C15))
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _mix_bits(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(constant: int) -> int:
    return constant - (1 << 64)  # torch has no unsigned 64-bit arithmetic; the bits are the same


def use_kernels(config: MixingConfig, device: torch.device) -> bool:
    """Return whether the kernels mix and draw with this configuration on this device."""
    return kernels.available(device) and kernels.supports(config)


def take(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Return these rows of a tensor; all of them, without a copy, for None."""
    return tensor if rows is None else tensor[rows]


def as_index(rows: torch.Tensor | None) -> torch.Tensor | slice:
    """Return rows as an index; None becomes a whole slice."""
    return slice(None) if rows is None else rows
