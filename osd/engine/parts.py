"""One mixture of a step: some rows of the batch, mixed by the fused kernels or, where those cannot, by their reference.

B rows of the teacher's batch, P rows of one part, V the shared vocabulary, R record fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    """The same by the kernels, for what acts on log q* before a token is drawn; attributes as of :class:`TorchPart`."""

    def __init__(self, inputs: PartInputs, config: MixingConfig) -> None:
        from osd.kernels.fused import mix_and_draw  # needs Triton

        self.rows, self.solo = inputs.rows, inputs.solo
        self._mixture = mix_and_draw(inputs.student, inputs.teacher, config, **_for_kernels(inputs), write_logq=True)
        assert self._mixture.logq_PV is not None
        self.logq_PV = self._mixture.logq_PV
        self.bad_side_P = self._mixture.bad_side_P.clamp(max=2) if self.solo else self._mixture.bad_side_P

    def record(self, token_P: torch.Tensor, logp_draw_P: torch.Tensor) -> torch.Tensor:
        return self._mixture.record_at(token_P, logp_draw_P)


class Draw:
    """Draws from q* with the kernels: raw logits in, tokens and their record out."""

    def __init__(self) -> None:
        from osd.kernels.draw_graph import ReplayedDraw  # needs Triton

        self._draw = ReplayedDraw()
        self._uniform = torch.empty(0)

    def uniform(self, num_rows: int, device: torch.device, generators: dict[int, torch.Generator]) -> torch.Tensor:
        """:func:`uniform`, in memory that stays where it is."""
        if len(self._uniform) < num_rows:
            self._uniform = torch.empty(num_rows, dtype=torch.float64, device=device)
        return uniform(self._uniform[:num_rows], generators)

    def __call__(self, inputs: PartInputs, config: MixingConfig, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(token_P, values_PR): ids, int32, -1 - its side where a row is bad, and the record."""
        uniform_P = take(uniform_B, inputs.rows)
        token_P, values_PR = self._draw(inputs.student, inputs.teacher, config, **_for_kernels(inputs), uniform=uniform_P)
        return token_P.clamp(min=-3) if inputs.solo else token_P, values_PR


def _for_kernels(inputs: PartInputs) -> dict[str, Any]:
    return dict(
        vocab_size=inputs.vocab_size,
        rows_theta=inputs.student_rows,
        rows_teacher=inputs.rows,
        temperature=inputs.temperature_B,
        alpha=inputs.alpha,
    )


def uniform(out_B: torch.Tensor, generators: dict[int, torch.Generator]) -> torch.Tensor:
    """Fill with one number in [0, 1) per row, from the row's own generator where it has one.

    A seeded request's draws then depend on nothing but its own steps.
    """
    out_B.uniform_()
    for row, generator in generators.items():
        out_B[row : row + 1].uniform_(generator=generator)
    return out_B


def fused(config: MixingConfig, device: torch.device) -> bool:
    """Whether parts are mixed by the kernels."""
    return kernels.available(device) and kernels.supports(config)


def take(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return tensor if rows is None else tensor[rows]


def as_index(rows: torch.Tensor | None) -> torch.Tensor | slice:
    return slice(None) if rows is None else rows
