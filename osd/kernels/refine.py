"""Second pass: solves for alpha in rows whose guess is missing or was rejected. See osd.kernels.common."""

import triton
import triton.language as tl

from osd.kernels.common import (
    ALPHA,
    AT_TEACHER,
    AT_THETA,
    GAP_PEAK,
    INF,
    LSE_TEACHER,
    LSE_THETA,
    MID_PEAK,
    OPEN,
    PARTS,
    PEAK,
    PINNED,
    REST,
    SETTLED,
    STATE,
    STATUS,
    add5,
    column_of,
    exp,
    gap_of,
    last_to_arrive,
    load,
    minus,
    row_of,
    scale_of,
    sums_of,
    write_choice,
)
from osd.kernels.scalar_solver import lse_at_peak, newton_step, rounding_of


@triton.jit
def refine_kernel(
    theta,
    theta_stride,
    teacher,
    teacher_stride,
    rows_theta,
    rows_teacher,
    temperature,
    parts,
    count,
    state,
    vocab,
    low,
    high,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    GATHER_THETA: tl.constexpr,
    GATHER_TEACHER: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    """Solve for alpha in open rows, and for the level in pinned ones. Grid (programs, P).

    All programs of a row share the first step. The last one to finish makes the remaining steps alone.
    """
    # Reverse order: the cache still holds the rows that were read last.
    row = tl.num_programs(1) - 1 - tl.program_id(1)
    tiles, programs = tl.cdiv(vocab, TILE), tl.num_programs(0)
    state += row.to(tl.int64) * STATE
    status = tl.load(state + STATUS)
    if (status != OPEN) & (status != PINNED):
        return
    row_teacher = row_of(rows_teacher, row, GATHER_TEACHER)
    theta += row_of(rows_theta, row, GATHER_THETA) * theta_stride
    teacher += row_teacher * teacher_stride
    scale, _ = scale_of(temperature, row_teacher, TEMPERED)
    mid_peak = tl.load(state + MID_PEAK).to(tl.float32)
    gap_peak = tl.load(state + GAP_PEAK).to(tl.float32)
    peak = tl.load(state + PEAK).to(tl.int32)
    alpha = tl.load(state + ALPHA)
    delta = (alpha - 0.5).to(tl.float32)
    parts += row.to(tl.int64) * PARTS * TILES
    for tile in range(tl.program_id(0), tiles, programs):
        token_N = tile * TILE + tl.arange(0, TILE)
        top, s0, s1, s2, s3, s4 = _moments(theta, teacher, token_N, scale, vocab, mid_peak, gap_peak, peak, delta)
        out = parts + tile
        tl.store(out, top)
        tl.store(out + TILES, s0)
        tl.store(out + 2 * TILES, s1)
        tl.store(out + 3 * TILES, s2)
        tl.store(out + 4 * TILES, s3)
        tl.store(out + 5 * TILES, s4)
    if last_to_arrive(count + row, programs):
        tile_T = tl.arange(0, TILES)
        top_T = column_of(parts, 0, tile_T, tiles, TILES, -INF)
        highest = tl.maximum(tl.max(top_T, 0), 0.0)
        scale_T = exp(top_T - highest)
        origin = highest.to(tl.float64)
        t0, t1, t2, t3, t4 = tl.reduce(
            (
                scale_T * sums_of(parts, 1, tile_T, tiles, TILES),
                scale_T * sums_of(parts, 2, tile_T, tiles, TILES),
                scale_T * sums_of(parts, 3, tile_T, tiles, TILES),
                scale_T * sums_of(parts, 4, tile_T, tiles, TILES),
                scale_T * sums_of(parts, 5, tile_T, tiles, TILES),
            ),
            0,
            add5,
        )
        lower, upper = tl.full([], low, tl.float64), tl.full([], high, tl.float64)
        target = tl.load(state + AT_TEACHER) - tl.load(state + AT_THETA)
        rest_ends = tl.load(state + REST)
        pinned = status == PINNED
        left, right, last = lower - 1.0, upper + 1.0, upper - lower + 1.0
        level = origin
        settled = 0
        while settled == 0:
            at_peak = tl.exp(-origin)
            total = at_peak + t0
            level = lse_at_peak(t0, origin)
            m1, m2, m3, m4 = t1 / total, t2 / total, t3 / total, t4 / total
            k2 = m2 - m1 * m1
            k3 = m3 - 3 * m1 * m2 + 2 * m1 * m1 * m1
            k4 = m4 - 4 * m1 * m3 - 3 * m2 * m2 + 12 * m1 * m1 * m2 - 6 * m1 * m1 * m1 * m1
            noise = rounding_of(tl.maximum(rest_ends, t0 / total), m2)
            new, left, right, last, enough = newton_step(alpha, m1 - target, k2, k3, k4, noise, left, right, last, lower, upper)
            settled = (enough | pinned).to(tl.int32)
            new = tl.where(pinned, alpha, tl.where(enough, new.to(tl.float32).to(tl.float64), new))
            step = new - alpha
            level += step * (m1 + step * (k2 / 2 + step * (k3 / 6 + step * k4 / 24)))
            alpha = new
            if settled == 0:
                delta = (alpha - 0.5).to(tl.float32)
                origin, t0, t1, t2, t3, t4 = _row_moments(
                    theta, teacher, tiles, scale, vocab, mid_peak, gap_peak, peak, delta, TILE
                )
        write_choice(state, alpha, level, SETTLED, False, tl.load(state + LSE_THETA), tl.load(state + LSE_TEACHER))


@triton.jit
def _moments(theta, teacher, token_N, scale, vocab, mid_peak, gap_peak, peak, delta):
    """Return (top, sum of w, sums of w gap^k for k = 1 to 4) over a tile without the peak, w = e^(mid + delta gap - top)."""
    theta_N, teacher_N = load(theta, teacher, token_N, scale, vocab)
    gap_N = gap_of(theta_N, teacher_N, gap_peak)
    y_N = 0.5 * theta_N + 0.5 * teacher_N - mid_peak + delta * gap_N
    y_N = tl.where(token_N == peak, -INF, y_N)
    top = tl.max(y_N, 0)
    weight_N = exp(minus(y_N, top))
    first_N = weight_N * gap_N
    second_N = first_N * gap_N
    third_N = second_N * gap_N
    sums = tl.reduce((weight_N, first_N, second_N, third_N, third_N * gap_N), 0, add5)
    return top, sums[0], sums[1], sums[2], sums[3], sums[4]


@triton.jit
def _row_moments(theta, teacher, tiles, scale, vocab, mid_peak, gap_peak, peak, delta, TILE: tl.constexpr):
    """Return the `_moments` of a whole row, float64, relative to the larger of their maximum and the peak."""
    zero = tl.full([], 0.0, tl.float64)
    origin, t0, t1, t2, t3, t4 = zero, zero, zero, zero, zero, zero
    token_N = tl.arange(0, TILE)
    for tile in range(tiles):
        top, s0, s1, s2, s3, s4 = _moments(theta, teacher, tile * TILE + token_N, scale, vocab, mid_peak, gap_peak, peak, delta)
        new = tl.maximum(origin, top.to(tl.float64))
        old_scale, scale_here = tl.exp(origin - new), tl.exp(top.to(tl.float64) - new)
        t0 = t0 * old_scale + s0 * scale_here
        t1 = t1 * old_scale + s1 * scale_here
        t2 = t2 * old_scale + s2 * scale_here
        t3 = t3 * old_scale + s3 * scale_here
        t4 = t4 * old_scale + s4 * scale_here
        origin = new
    return origin, t0, t1, t2, t3, t4
