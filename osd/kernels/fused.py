"""Fused computation of alpha, the draw and the record from the raw logits of both models, in five kernel launches.

The definitions are those of the reference `osd.mixing.mix`; osd.kernels.common describes the passes. Shape suffixes: B rows
of a model's batch, P mixed rows, V vocabulary, R record columns. Needs Triton.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from osd.core import RECORD_FIELDS, MixingConfig
from osd.kernels import supports
from osd.kernels.common import PARTS, STATE
from osd.kernels.draw import draw_kernel, record_kernel
from osd.kernels.midpoint import meet_kernel
from osd.kernels.refine import refine_kernel


@dataclass(frozen=True)
class Cut:
    """Launch parameters of one pass.

    tile: tokens per tile, a power of two. warps: warps of 32 threads per program. registers: limit per thread, or None.
    """

    tile: int = 2048
    warps: int = 4
    registers: int | None = None

    def launch(self, vocab: int) -> tuple[int, dict[str, int]]:
        """Return the number of tiles of a row and the keyword arguments of a launch."""
        tiles = -(-vocab // self.tile)
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return tiles, dict(TILE=self.tile, TILES=_power_of_two(tiles), num_warps=self.warps, **limit)


@dataclass(frozen=True)
class Tuning:
    """Launch parameters of all passes; benchmarks/mixing.py --sweep measures candidates.

    spare: total number of programs of the passes that few rows need (refine, and the second draw), shared among up to 64
        rows. With more rows each row gets as many as with 64. The default is about the number that a GPU runs at once:
        with more, starting the programs costs more than their work.
    """

    meet: Cut = Cut()
    refine: Cut = Cut()
    draw: Cut = Cut()
    spare: int = 512

    def spare_programs(self, tiles: int, rows: int) -> int:
        """Return the number of spare programs per row: at least 1, at most one per tile."""
        return min(tiles, max(1, self.spare // max(1, min(rows, 64))))


DEFAULT = Tuning()


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedMixture:
    """Result of `mix_and_draw` for P rows.

    token_P: the drawn ids, int32, -1 - bad_side in a bad row; None without a draw.
    values_PR: float32, columns as in RECORD_FIELDS. Without a draw the columns that depend on the token are not written.
    bad_side_P: int8 as in osd.mixing.Mixture; the values of a bad row are NaN.
    logq_PV: log q, float32, or None if write_logq was False.
    """

    token_P: Tensor | None
    values_PR: Tensor
    bad_side_P: Tensor
    logq_PV: Tensor | None
    _inputs: tuple[Any, ...]
    _state_P: Tensor
    _flags: dict[str, bool]

    @property
    def alpha_P(self) -> Tensor:
        """Teacher's weight of each row, float32."""
        return self.values_PR[:, 0]

    def record_at(self, token_P: Tensor, logp_draw_P: Tensor) -> Tensor:
        """Fill in values_PR for tokens drawn elsewhere with these log-probabilities, and return it.

        The logits and temperatures passed to `mix_and_draw` must be unchanged.
        """
        grid = (len(token_P),)
        record_kernel[grid](*self._inputs, self._state_P, token_P, logp_draw_P, self.values_PR, **self._flags, num_warps=1)
        return self.values_PR


@torch.no_grad()
def mix_and_draw(
    logits_theta: Tensor,
    logits_teacher: Tensor,
    config: MixingConfig,
    *,
    vocab_size: int,
    rows_theta: Tensor | None = None,
    rows_teacher: Tensor | None = None,
    temperature: Tensor | None = None,
    alpha: Tensor | None = None,
    uniform: Tensor | None = None,
    write_logq: bool = False,
    tuning: Tuning = DEFAULT,
) -> FusedMixture:
    """Temper, choose alpha, mix, draw and record without a synchronisation. CUDA graphs can capture it.

    logits_theta, logits_teacher: [B, >= vocab_size] of any float dtype, last dimension contiguous; the two B may differ.
    vocab_size: V, the number of shared token ids. Columns beyond V are not read.
    rows_theta, rows_teacher: int64 [P], the batch rows to be mixed with each other. None: all rows, in order.
    temperature: float32, one per row of the teacher's batch, indexed by rows_teacher. A row below 1e-5 is mixed at
        temperature 1 and its token is the argmax of q. None: 1 for every row.
    alpha: float32 [P], given weights of the teacher; NaN: choose this row's alpha by config.
    uniform: float32 or float64 [P] in [0, 1), at which the draw inverts the cumulative distribution of q. None: no draw.
    write_logq: also write log q, for processing before a draw elsewhere; then use FusedMixture.record_at.

    Raises ValueError on a configuration that `supports` rejects, and on wrong shapes.
    """
    rows = _check(logits_theta, logits_teacher, config, vocab_size, rows_theta, rows_teacher, temperature, alpha, uniform)
    device = logits_theta.device
    smallest = min(tuning.meet.tile, tuning.refine.tile, tuning.draw.tile)
    parts = torch.empty(rows * PARTS.value * _power_of_two(-(-vocab_size // smallest)), device=device)
    state = torch.empty(rows * STATE.value, device=device, dtype=torch.float64)
    # Pad each row of counters to 16 bytes: Triton compiles another kernel variant for pointers without that alignment.
    count = torch.zeros(5, -(-rows // 4) * 4, device=device, dtype=torch.int32)
    values = torch.empty(rows, len(RECORD_FIELDS), device=device)
    bad_side = torch.empty(rows, device=device, dtype=torch.int8)
    token = None if uniform is None else torch.empty(rows, device=device, dtype=torch.int32)
    logq = torch.empty(rows, vocab_size, device=device) if write_logq else None

    sides = (logits_theta, logits_theta.stride(0), logits_teacher, logits_teacher.stride(0))
    inputs = (*sides, rows_theta, rows_teacher, temperature)
    flags = dict(
        GATHER_THETA=rows_theta is not None,
        GATHER_TEACHER=rows_teacher is not None,
        TEMPERED=temperature is not None,
    )
    low, high, fixed = _bounds(config)
    tiles, launch = tuning.meet.launch(vocab_size)
    meet_kernel[tiles, rows](
        *inputs, alpha, parts, count[0], state, vocab_size, low, high, fixed, GIVEN=alpha is not None, **flags, **launch
    )
    refine_tiles, refine_launch = tuning.refine.launch(vocab_size)
    draw_tiles, draw_launch = tuning.draw.launch(vocab_size)
    for second in (False, True):
        refine_count, draw_count = count[3:] if second else count[1:3]
        refine_kernel[tuning.spare_programs(refine_tiles, rows), rows](
            *inputs, parts, refine_count, state, vocab_size, low, high, **flags, **refine_launch
        )
        draw_kernel[tuning.spare_programs(draw_tiles, rows) if second else draw_tiles, rows](
            *inputs,
            uniform,
            parts,
            draw_count,
            state,
            logq,
            token,
            values,
            bad_side,
            vocab_size,
            WRITE=write_logq,
            DRAW=uniform is not None,
            SECOND=second,
            **flags,
            **draw_launch,
        )
    return FusedMixture(
        token_P=token,
        values_PR=values,
        bad_side_P=bad_side,
        logq_PV=logq,
        _inputs=inputs,
        _state_P=state,
        _flags=flags,
    )


def _bounds(config: MixingConfig) -> tuple[float, float, float]:
    """Return (alpha_min, alpha_max, the fixed alpha, or NaN if alpha is to be solved)."""
    low, high = config.alpha_min, config.alpha_max
    if config.alpha_method == "fixed":
        return low, high, config.fixed_alpha
    return low, high, low if low == high else math.nan


def _check(
    logits_theta: Tensor,
    logits_teacher: Tensor,
    config: MixingConfig,
    vocab_size: int,
    rows_theta: Tensor | None,
    rows_teacher: Tensor | None,
    temperature: Tensor | None,
    alpha: Tensor | None,
    uniform: Tensor | None,
) -> int:
    """Return P. Raises ValueError if the arguments do not fit together."""
    if not supports(config):
        raise ValueError(
            f"alpha_method={config.alpha_method!r} with mixture={config.mixture!r} has no kernel; use osd.mixing.mix"
        )
    for name, logits in (("student", logits_theta), ("teacher", logits_teacher)):
        if logits.ndim != 2 or logits.shape[1] < vocab_size or logits.stride(1) != 1:
            raise ValueError(
                f"{name} logits have shape {tuple(logits.shape)} and strides {logits.stride()}; "
                f"use [B, >= {vocab_size}], contiguous along the vocabulary"
            )
    rows = len(logits_teacher if rows_teacher is None else rows_teacher)
    given = dict(student=logits_theta if rows_theta is None else rows_theta, alpha=alpha, uniform=uniform)
    for name, values in given.items():
        if values is not None and len(values) != rows:
            raise ValueError(f"{name} has {len(values)} rows and the teacher {rows}; use one per mixed row")
    if temperature is not None and len(temperature) != len(logits_teacher):
        raise ValueError(
            f"temperature has {len(temperature)} values; use one per row of the teacher's batch, {len(logits_teacher)}"
        )
    return rows
