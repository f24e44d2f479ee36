"""One mixture of a step: some rows of the batch, mixed by the fused kernels or, where those cannot, by their reference.

B rows of the teacher's batch, P rows of one part, V the shared vocabulary, R record fields.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from osd import kernels
from osd.core import MixingConfig
from osd.mixing import mix, record_rows

GREEDY_BELOW = 1e-5  # vLLM's own threshold for "temperature 0"


@dataclass(frozen=True, kw_only=True)
class PartInputs:
    """What a part is mixed from.

    Attributes:
        student, teacher: raw logits of either batch, [B', >= V] and [B, >= V].
        student_rows, rows: the part's rows in them, [P] int64; None means all of them, in order.
        temperature_B: for every row of the teacher's batch, float32; below GREEDY_BELOW a row is greedy.
        alpha: the teacher's weight where a request fixes it, NaN where it is solved, [P] float32, or None.
        vocab_size: V.
        solo: the rows are sampled from the teacher alone.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    student_rows: torch.Tensor | None
    rows: torch.Tensor | None
    temperature_B: torch.Tensor
    alpha: torch.Tensor | None
    vocab_size: int
    solo: bool


class TorchPart:
    """A part mixed by `osd.mixing`: on any device, by any method.

    Attributes:
        rows, solo: as in :class:`PartInputs`.
        logq_PV: log q*, float32.
        bad_side_P: int8, as in ``osd.mixing.Mixture``; the teacher's where it is alone.
    """

    def __init__(self, inputs: PartInputs, config: MixingConfig) -> None:
        self.rows, self.solo = inputs.rows, inputs.solo
        student = take(inputs.student, inputs.student_rows)[:, : inputs.vocab_size]
        teacher = take(inputs.teacher, inputs.rows)[:, : inputs.vocab_size]
        temperature = take(inputs.temperature_B, inputs.rows)
        temperature = torch.where(temperature < GREEDY_BELOW, 0.0, temperature)
        self._inputs = student, teacher, temperature
        self._mixture = mix(student, teacher, config, temperature_B=temperature, alpha_B=inputs.alpha)
        self.logq_PV = self._mixture.logq_BV
        self.bad_side_P = self._mixture.bad_side_B.clamp(max=2) if self.solo else self._mixture.bad_side_B

    def record(self, token_P: torch.Tensor, logp_draw_P: torch.Tensor) -> torch.Tensor:
        """The record of tokens drawn from q* or what became of it, float32 [P, R]."""
        return record_rows(self._mixture, *self._inputs, token_P, logp_draw_P)


class FusedPart:
    """The same by the kernels, which draw as well if they are given a ``uniform`` number per row of the batch, [B].

    Attributes:
        rows, solo, logq_PV, bad_side_P: as in :class:`TorchPart`; ``logq_PV`` is None if the tokens are drawn.
        values_PR: the record, whose token is drawn or is to be.
    """

    def __init__(self, inputs: PartInputs, config: MixingConfig, uniform_B: torch.Tensor | None) -> None:
        from osd.kernels.fused import mix_and_draw  # needs Triton

        self.rows, self.solo = inputs.rows, inputs.solo
        self._mixture = mix_and_draw(
            inputs.student,
            inputs.teacher,
            config,
            vocab_size=inputs.vocab_size,
            rows_theta=inputs.student_rows,
            rows_teacher=inputs.rows,
            temperature=inputs.temperature_B,
            alpha=inputs.alpha,
            uniform=None if uniform_B is None else take(uniform_B, inputs.rows),
            write_logq=uniform_B is None,
        )
        self.logq_PV, self.values_PR = self._mixture.logq_PV, self._mixture.values_PR
        self.bad_side_P = self._mixture.bad_side_P.clamp(max=2) if self.solo else self._mixture.bad_side_P

    @property
    def token_P(self) -> torch.Tensor:
        """The drawn tokens, int32; in a bad row -1 - its side."""
        assert self._mixture.token_P is not None
        return self._mixture.token_P.clamp(min=-3) if self.solo else self._mixture.token_P

    def record(self, token_P: torch.Tensor, logp_draw_P: torch.Tensor) -> torch.Tensor:
        return self._mixture.record_at(token_P, logp_draw_P)


def fused(config: MixingConfig, device: torch.device) -> bool:
    """Whether parts are mixed by the kernels."""
    return kernels.available(device) and kernels.supports(config)


def take(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return tensor if rows is None else tensor[rows]


def as_index(rows: torch.Tensor | None) -> torch.Tensor | slice:
    return slice(None) if rows is None else rows
