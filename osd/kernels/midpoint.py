"""First pass: computes the moments of the gap at alpha = 1/2 and guesses alpha from them. See osd.kernels.common."""

import triton
import triton.language as tl

from osd.kernels.common import (
    AT_TEACHER,
    AT_THETA,
    BAD,
    GAP_PEAK,
    GUESSED,
    INF,
    LEVEL_GUESSED,
    LOST_TEACHER,
    LOST_THETA,
    LSE_TEACHER,
    LSE_THETA,
    MID_PEAK,
    NO_TOKEN,
    OPEN,
    PARTS,
    PEAK,
    PINNED,
    REST,
    SETTLED,
    STATE,
    add8,
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
from osd.kernels.scalar_solver import log1p, lse_at_peak, solve_interpolated

# If all gaps are within this of their mean, the third-order expansion is the solution.
_NARROW: tl.constexpr = tl.constexpr(0.25)


@triton.jit
def _extremes(mid, token, max_theta, max_teacher, lowest, highest, mid_, token_, m_, n_, l_, h_):
    """Combine two partial results: the first token with the highest mid, two maxima, a minimum and a maximum.

    NaN never wins. The function is commutative, also on ties: a warp combines in both orders, and its threads must agree.
    """
    take = (mid_ > mid) | ((mid_ == mid) & (token_ < token))
    return (
        tl.where(take, mid_, mid),
        tl.where(take, token_, token),
        tl.maximum(max_theta, m_),
        tl.maximum(max_teacher, n_),
        tl.minimum(lowest, l_),
        tl.maximum(highest, h_),
    )


@triton.jit
def meet_kernel(
    theta,
    theta_stride,
    teacher,
    teacher_stride,
    rows_theta,
    rows_teacher,
    temperature,
    alpha,
    parts,
    count,
    state,
    vocab,
    low,
    high,
    fixed,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    GATHER_THETA: tl.constexpr,
    GATHER_TEACHER: tl.constexpr,
    TEMPERED: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Store the moments of one tile; the last program of a row chooses its alpha. Grid (tiles, P).

    fixed: alpha of the method "fixed", NaN for kl_symmetry.
    """
    tile, row = tl.program_id(0), tl.program_id(1)
    tiles = tl.num_programs(0)
    row_teacher = row_of(rows_teacher, row, GATHER_TEACHER)
    theta += row_of(rows_theta, row, GATHER_THETA) * theta_stride
    teacher += row_teacher * teacher_stride
    scale, _ = scale_of(temperature, row_teacher, TEMPERED)
    token_N = tile * TILE + tl.arange(0, TILE)
    theta_N, teacher_N = load(theta, teacher, token_N, scale, vocab)

    mid_N = 0.5 * theta_N + 0.5 * teacher_N
    # Infinite where only one policy reaches the token, NaN where neither does.
    difference_N = teacher_N - theta_N
    rank_N = tl.maximum(mid_N, -INF)  # replaces NaN, so that bad rows have a peak too
    top, peak, max_theta, max_teacher, lowest, highest = tl.reduce(
        (rank_N, token_N, theta_N, teacher_N, difference_N, difference_N), 0, _extremes
    )
    shared = top > -INF
    at_theta = tl.load(theta + peak, mask=shared, other=0.0).to(tl.float32) * scale
    at_teacher = tl.load(teacher + peak, mask=shared, other=0.0).to(tl.float32) * scale
    here_N = token_N == tl.where(shared, peak, -1)
    gap_N = gap_of(theta_N, teacher_N, at_teacher - at_theta)
    weight_N = tl.where(here_N, 0.0, exp(minus(mid_N, top)))
    first_N = weight_N * gap_N
    second_N = first_N * gap_N
    exp_theta_N = tl.where(here_N, 0.0, exp(minus(theta_N, max_theta)))
    exp_teacher_N = tl.where(here_N, 0.0, exp(minus(teacher_N, max_teacher)))
    sums = tl.reduce(
        (
            weight_N,
            first_N,
            second_N,
            second_N * gap_N,
            exp_theta_N,
            exp_theta_N * gap_N,
            exp_teacher_N,
            exp_teacher_N * gap_N,
        ),
        0,
        add8,
    )
    parts += row.to(tl.int64) * PARTS * TILES
    out = parts + tile
    tl.store(out, top)
    tl.store(out + TILES, peak.to(tl.float32))
    tl.store(out + 2 * TILES, at_theta)
    tl.store(out + 3 * TILES, at_teacher)
    tl.store(out + 4 * TILES, max_theta)
    tl.store(out + 5 * TILES, max_teacher)
    tl.store(out + 6 * TILES, lowest)
    tl.store(out + 7 * TILES, highest)
    for i in tl.static_range(8):
        tl.store(out + (8 + i) * TILES, sums[i])
    if last_to_arrive(count + row, tiles):
        pinned = tl.full([], fixed, tl.float64)  # in the interpreter `fixed` is a Python float
        if GIVEN:
            given = tl.load(alpha + row).to(tl.float64)
            pinned = tl.where(given == given, given, pinned)
        lower, upper = tl.full([], low, tl.float64), tl.full([], high, tl.float64)
        _choose_alpha(parts, state + row.to(tl.int64) * STATE, tiles, lower, upper, pinned, TILES)


@triton.jit
def _side(top, total, first, at_peak):
    """Combine the sums of one policy over its full support.

    top: the policy's maximum. total, first: sum of the weights and of weight times gap, relative to top, without the
    row's peak. at_peak: the policy's logit of the row's peak.
    Returns (log sum exp minus at_peak, mass off the peak, mean gap).
    """
    share = 1 / (total + tl.exp(tl.minimum(at_peak - top, 0.0)))
    # In float64: at a low temperature the row's peak may be hundreds of nats below the policy's maximum.
    return lse_at_peak(total, top.to(tl.float64) - at_peak.to(tl.float64)), total * share, first * share


@triton.jit
def _finite_or_zero(x):
    return tl.where((x > -INF) & (x < INF), x, 0.0)


@triton.jit
def _choose_alpha(parts, state, tiles, low, high, pinned, TILES: tl.constexpr):
    """Combine the tiles' moments at alpha = 1/2 and write the row's state."""
    tile_T = tl.arange(0, TILES)
    top_T = column_of(parts, 0, tile_T, tiles, TILES, -INF)
    peak_T = column_of(parts, 1, tile_T, tiles, TILES, NO_TOKEN)
    peak_theta_T = column_of(parts, 2, tile_T, tiles, TILES, 0.0)
    peak_teacher_T = column_of(parts, 3, tile_T, tiles, TILES, 0.0)
    max_theta_T = column_of(parts, 4, tile_T, tiles, TILES, -INF)
    max_teacher_T = column_of(parts, 5, tile_T, tiles, TILES, -INF)
    lowest_T = column_of(parts, 6, tile_T, tiles, TILES, INF)
    highest_T = column_of(parts, 7, tile_T, tiles, TILES, -INF)
    top, peak, max_theta, max_teacher, lowest, highest = tl.reduce(
        (top_T, peak_T, max_theta_T, max_teacher_T, lowest_T, highest_T), 0, _extremes
    )
    empty = (top > -INF) == 0
    at_theta = tl.where(empty, 0.0, tl.max(tl.where(peak_T == peak, peak_theta_T, -INF), 0))
    at_teacher = tl.where(empty, 0.0, tl.max(tl.where(peak_T == peak, peak_teacher_T, -INF), 0))
    gap_peak = (at_teacher - at_theta).to(tl.float64)
    # Every tile excluded its own peak from its sums. Add all of them back except the row's peak.
    other_T = (top_T > -INF) & (peak_T != peak)
    own_T = tl.where(other_T, 1.0, 0.0).to(tl.float64)
    shift_T = tl.where(other_T, (peak_teacher_T - peak_theta_T).to(tl.float64) - gap_peak, 0.0)
    scale_T = exp(tl.where(top_T > -INF, top_T - _finite_or_zero(top), -INF))
    sum_T = sums_of(parts, 8, tile_T, tiles, TILES) + own_T
    first_T = sums_of(parts, 9, tile_T, tiles, TILES)
    second_T = sums_of(parts, 10, tile_T, tiles, TILES)
    third_T = sums_of(parts, 11, tile_T, tiles, TILES)

    best_theta, best_teacher = _finite_or_zero(max_theta), _finite_or_zero(max_teacher)
    scale_theta_T = exp(tl.where(max_theta_T > -INF, max_theta_T - best_theta, -INF))
    scale_teacher_T = exp(tl.where(max_teacher_T > -INF, max_teacher_T - best_teacher, -INF))
    own_theta_T = tl.where(other_T, exp(peak_theta_T - best_theta), 0.0)
    own_teacher_T = tl.where(other_T, exp(peak_teacher_T - best_teacher), 0.0)
    sum_theta_T = scale_theta_T * sums_of(parts, 12, tile_T, tiles, TILES) + own_theta_T
    sum_teacher_T = scale_teacher_T * sums_of(parts, 14, tile_T, tiles, TILES) + own_teacher_T
    first_theta_T = scale_theta_T * sums_of(parts, 13, tile_T, tiles, TILES) + shift_T * sum_theta_T
    first_teacher_T = scale_teacher_T * sums_of(parts, 15, tile_T, tiles, TILES) + shift_T * sum_teacher_T
    m3_T = third_T + shift_T * (3 * second_T + shift_T * (3 * first_T + shift_T * sum_T))
    rest, m1, m2, m3, sum_theta, first_theta, sum_teacher, first_teacher = tl.reduce(
        (
            scale_T * sum_T,
            scale_T * (first_T + shift_T * sum_T),
            scale_T * (second_T + shift_T * (2 * first_T + shift_T * sum_T)),
            scale_T * m3_T,
            sum_theta_T,
            first_theta_T,
            sum_teacher_T,
            first_teacher_T,
        ),
        0,
        add8,
    )
    share = 1 / (1 + rest)
    m1, m2, m3 = m1 * share, m2 * share, m3 * share
    k2 = m2 - m1 * m1
    k3 = m3 - 3 * m1 * m2 + 2 * m1 * m1 * m1
    theta_low, rest_theta, mean_theta = _side(best_theta, sum_theta, first_theta, at_theta)
    teacher_high, rest_teacher, mean_teacher = _side(best_teacher, sum_teacher, first_teacher, at_teacher)
    lost_theta, lost_teacher = lowest == -INF, highest == INF
    lse_theta, lse_teacher = at_theta + theta_low, at_teacher + teacher_high
    if empty:
        lse_theta, lse_teacher = best_theta + tl.log(sum_theta), best_teacher + tl.log(sum_teacher)
    # A row is a distribution exactly if its maximum is finite and its sum is not NaN.
    fine_theta = (max_theta > -INF) & (max_theta < INF) & (sum_theta == sum_theta)
    fine_teacher = (max_teacher > -INF) & (max_teacher < INF) & (sum_teacher == sum_teacher)
    bad = tl.where(fine_theta, 0.0, 1.0) + tl.where(fine_teacher, 0.0, 2.0)

    target = teacher_high - theta_low
    lost = lost_theta | lost_teacher
    free = pinned != pinned
    center = gap_peak + m1
    narrow = (highest - center < _NARROW) & (center - lowest < _NARROW) & (lost == 0)
    per_k2 = 1 / tl.where(k2 > 0, k2, 1.0)
    expansion = 0.5 + tl.where(k2 > 0, k3 * per_k2 * (1 / 24), 0.0)
    aim = tl.where(narrow & free, tl.minimum(tl.maximum(expansion, low), high), pinned)
    choice, level, agree = solve_interpolated(
        log1p(rest), m1, k2, k3, theta_low, teacher_high, mean_theta, mean_teacher, target, aim, low, high
    )
    # If the supports differ, K at -1/2 and 1/2 is not the normalisers of the policies: no interpolation, one Newton step.
    newton = 0.5 + tl.minimum(tl.maximum((target - m1) * per_k2, -0.3), 0.3)
    choice = tl.where(lost & free, tl.minimum(tl.maximum(newton, low), high), choice)
    choice = tl.where(empty & free, low, choice)
    guess = agree & (lost == 0)
    unknown = tl.where(free, tl.where(guess, GUESSED, OPEN), tl.where(guess, LEVEL_GUESSED, PINNED))
    status = tl.where((narrow & free) | empty | (bad > 0), SETTLED, unknown)
    tl.store(state + MID_PEAK, top)
    tl.store(state + GAP_PEAK, gap_peak)
    tl.store(state + PEAK, peak)
    tl.store(state + LSE_THETA, lse_theta)
    tl.store(state + LSE_TEACHER, lse_teacher)
    tl.store(state + AT_THETA, theta_low)
    tl.store(state + AT_TEACHER, teacher_high)
    tl.store(state + REST, tl.maximum(rest_theta, rest_teacher))
    tl.store(state + LOST_THETA, lost_theta.to(tl.float64))
    tl.store(state + LOST_TEACHER, lost_teacher.to(tl.float64))
    tl.store(state + BAD, bad)
    choice = tl.where(bad > 0, float("nan"), choice)
    write_choice(state, choice, tl.where(bad > 0, float("nan"), level), status, empty, lse_theta, lse_teacher)
