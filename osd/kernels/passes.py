"""The three Triton kernels of `osd.kernels.fused`, each one pass over both logits.

A program holds one tile of one row in registers and reads it once; what it sums goes to `parts`, and the row's last
program to arrive combines the tiles in float64 and writes the row's `state`:

    meet_kernel     moments of the gap at alpha = 1/2, both normalisers and both ends' means   -> alpha
    refine_kernel   moments at that alpha; rows whose alpha is already known return at once    -> alpha, surely
    draw_kernel     q and its sums at that alpha, log q when asked for                         -> token and record

Coordinates are osd.curve's, relative to the likeliest token under alpha = 1/2, the row's peak: its gap is 0 and its
weight exactly 1, apart from the sums, so that a row with 1e-9 off its peak keeps its digits. delta = alpha - 1/2.

Shape suffixes: P rows, T tiles, N tokens of a tile. Logarithms are natural.
"""

import triton
import triton.language as tl

from osd.kernels.rows import log1p, lse_at_peak, newton_step, rounding_of, solve_interpolated

# Columns of state_P, float64.
ALPHA: tl.constexpr = tl.constexpr(0)
STATUS: tl.constexpr = tl.constexpr(1)
LEVEL: tl.constexpr = tl.constexpr(2)  # what scores lose to become log q; K(delta), but for a pure row its policy's lse
MID_PEAK: tl.constexpr = tl.constexpr(3)
GAP_PEAK: tl.constexpr = tl.constexpr(4)
PEAK: tl.constexpr = tl.constexpr(5)
LSE_THETA: tl.constexpr = tl.constexpr(6)
LSE_TEACHER: tl.constexpr = tl.constexpr(7)
AT_THETA: tl.constexpr = tl.constexpr(8)  # lse_theta less the peak's logit, and the teacher's
AT_TEACHER: tl.constexpr = tl.constexpr(9)
PURE: tl.constexpr = tl.constexpr(10)  # 1 q is the student over its full support, 2 the teacher, 0 neither
LOST_THETA: tl.constexpr = tl.constexpr(11)
LOST_TEACHER: tl.constexpr = tl.constexpr(12)
BAD: tl.constexpr = tl.constexpr(13)  # osd.mixing.Mixture.bad_side_B
REST: tl.constexpr = tl.constexpr(14)  # the larger of both policies' off-peak masses
LOG_SUM: tl.constexpr = tl.constexpr(15)  # log of the sum of e^(score - level): 0 but for rounding
STATE: tl.constexpr = tl.constexpr(16)
PARTS: tl.constexpr = tl.constexpr(16)  # columns of parts_PT, float32, whatever a kernel keeps in them

# Values of STATUS.
OPEN: tl.constexpr = tl.constexpr(0)
SETTLED: tl.constexpr = tl.constexpr(1)
PINNED: tl.constexpr = tl.constexpr(2)  # alpha is given, the level is not known

RECORD: tl.constexpr = tl.constexpr(10)  # columns of the record, in the order of osd.core.RECORD_FIELDS

_INF: tl.constexpr = tl.constexpr(float("inf"))
_NARROW: tl.constexpr = tl.constexpr(0.25)  # gaps within this of their mean: the third-order expansion is the solution
_GREEDY_BELOW: tl.constexpr = tl.constexpr(1e-5)  # vLLM's threshold for "temperature 0"
_NO_TOKEN: tl.constexpr = tl.constexpr(1 << 30)


@triton.jit
def _row_of(rows, index, GATHER: tl.constexpr):
    return tl.load(rows + index) if GATHER else index.to(tl.int64)


@triton.jit
def _scale_of(temperature, row, TEMPERED: tl.constexpr):
    """1 / temperature (1 for a greedy row), and whether the row is greedy."""
    if TEMPERED:
        t = tl.load(temperature + row)
        greedy = t < _GREEDY_BELOW
        scale = tl.where(greedy, 1.0, 1.0 / tl.where(greedy, 1.0, t))
    else:
        scale = 1.0
        greedy = False
    return scale, greedy


@triton.jit
def _load(theta, teacher, token_N, scale, vocab):
    """Tempered logits of a tile, float32, -inf beyond the vocabulary."""
    theta_N = tl.load(theta + token_N, mask=token_N < vocab, other=-_INF).to(tl.float32) * scale
    teacher_N = tl.load(teacher + token_N, mask=token_N < vocab, other=-_INF).to(tl.float32) * scale
    return theta_N, teacher_N


@triton.jit
def _last_to_arrive(count, tiles):
    """Whether all other programs of this row are done; what they stored is then visible to this one."""
    tl.debug_barrier()  # the atomic is one thread's: every thread must have stored
    arrived = tl.atomic_add(count, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return arrived == tiles - 1


# Reductions of several values at once: each costs a barrier or two, however many values it takes.


@triton.jit
def _add5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def _add8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def _extremes(
    mid, token, theta, teacher, max_theta, max_teacher, lowest, highest, mid_, token_, theta_, teacher_, m_, n_, l_, h_
):
    """The peak, which is the first token of the highest mid, with its logits; two maxima, a minimum and a maximum."""
    take = (mid_ > mid) | ((mid_ == mid) & (token_ < token))
    return (
        tl.where(take, mid_, mid),
        tl.where(take, token_, token),
        tl.where(take, theta_, theta),
        tl.where(take, teacher_, teacher),
        tl.maximum(max_theta, m_),
        tl.maximum(max_teacher, n_),
        tl.minimum(lowest, l_),
        tl.maximum(highest, h_),
    )


@triton.jit
def _peak_at(values_N, token_N):
    """(maximum, first token that has it); (-inf, no token) where there is none."""
    top = tl.max(values_N, 0)
    return top, tl.min(tl.where((values_N == top) & (values_N > -_INF), token_N, _NO_TOKEN), 0)


@triton.jit
def _minus(values_N, top):
    """values - top, where a top of -inf stands for 0."""
    return values_N - tl.where(top == -_INF, 0.0, top)


@triton.jit
def _gap(theta_N, teacher_N, gap_peak):
    """z_t - z_theta relative to the peak's, and 0 outside the shared support."""
    shared_N = (theta_N > -_INF) & (teacher_N > -_INF)
    return tl.where(shared_N, teacher_N - theta_N - gap_peak, 0.0)


@triton.jit
def _column(parts, column, tile_T, tiles, TILES: tl.constexpr, other):
    """One column of a row's parts, [T] float64, `other` beyond the last tile."""
    values_T = tl.load(parts + column * TILES + tile_T, mask=tile_T < tiles, other=other, cache_modifier=".cg")
    return values_T.to(tl.float64)


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
    """Grid (tiles, P). fixed: alpha of the method "fixed", NaN for kl_symmetry."""
    tile, row = tl.program_id(0), tl.program_id(1)
    tiles = tl.num_programs(0)
    row_teacher = _row_of(rows_teacher, row, GATHER_TEACHER)
    theta += _row_of(rows_theta, row, GATHER_THETA) * theta_stride
    teacher += row_teacher * teacher_stride
    scale, _ = _scale_of(temperature, row_teacher, TEMPERED)
    token_N = tile * TILE + tl.arange(0, TILE)
    theta_N, teacher_N = _load(theta, teacher, token_N, scale, vocab)

    mid_N = 0.5 * theta_N + 0.5 * teacher_N
    # An infinite difference says that a policy reaches a token that the other does not.
    difference_N = teacher_N - theta_N
    top, peak, at_theta, at_teacher, max_theta, max_teacher, lowest, highest = tl.reduce(
        (
            mid_N,
            token_N,
            theta_N,
            teacher_N,
            theta_N,
            teacher_N,
            tl.where(theta_N > -_INF, difference_N, _INF),
            tl.where(teacher_N > -_INF, difference_N, -_INF),
        ),
        0,
        _extremes,
    )
    here_N = token_N == tl.where(top > -_INF, peak, -1)
    gap_N = tl.where(here_N, 0.0, _gap(theta_N, teacher_N, at_teacher - at_theta))
    weight_N = tl.where(here_N, 0.0, tl.exp(_minus(mid_N, top)))
    first_N = weight_N * gap_N
    second_N = first_N * gap_N
    exp_theta_N = tl.where(here_N, 0.0, tl.exp(_minus(theta_N, max_theta)))
    exp_teacher_N = tl.where(here_N, 0.0, tl.exp(_minus(teacher_N, max_teacher)))
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
        _add8,
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
    if _last_to_arrive(count + row, tiles):
        pinned = tl.full([], fixed, tl.float64)  # an argument is a float, in the interpreter a Python one
        if GIVEN:
            given = tl.load(alpha + row).to(tl.float64)
            pinned = tl.where(given == given, given, pinned)
        lower, upper = tl.full([], low, tl.float64), tl.full([], high, tl.float64)
        _choose_alpha(parts, state + row.to(tl.int64) * STATE, tiles, lower, upper, pinned, TILES)


@triton.jit
def _side(top, total, first, at_peak):
    """One policy over its full support, from its maximum, the others' weights relative to that and their weighted gaps.

    Returns (log sum exp less its logit at the row's peak, the share off the peak, mean gap, log sum exp without a peak).
    """
    peak = tl.exp(tl.minimum(at_peak - top, 0.0))
    return lse_at_peak(total, top - at_peak), total / (total + peak), first / (total + peak), top + tl.log(total)


@triton.jit
def _finite_or_zero(x):
    return tl.where((x > -_INF) & (x < _INF), x, 0.0)


@triton.jit
def _choose_alpha(parts, state, tiles, low, high, pinned, TILES: tl.constexpr):
    """Combine the tiles' moments at alpha = 1/2 and write the row's state."""
    tile_T = tl.arange(0, TILES)
    top_T = _column(parts, 0, tile_T, tiles, TILES, -_INF)
    peak_T = _column(parts, 1, tile_T, tiles, TILES, _NO_TOKEN)
    peak_theta_T = _column(parts, 2, tile_T, tiles, TILES, 0.0)
    peak_teacher_T = _column(parts, 3, tile_T, tiles, TILES, 0.0)
    max_theta_T = _column(parts, 4, tile_T, tiles, TILES, -_INF)
    max_teacher_T = _column(parts, 5, tile_T, tiles, TILES, -_INF)
    lowest_T = _column(parts, 6, tile_T, tiles, TILES, _INF)
    highest_T = _column(parts, 7, tile_T, tiles, TILES, -_INF)
    top, peak, at_theta, at_teacher, max_theta, max_teacher, lowest, highest = tl.reduce(
        (top_T, peak_T, peak_theta_T, peak_teacher_T, max_theta_T, max_teacher_T, lowest_T, highest_T), 0, _extremes
    )
    empty = (top > -_INF) == 0
    at_theta, at_teacher = tl.where(empty, 0.0, at_theta), tl.where(empty, 0.0, at_teacher)
    gap_peak = (at_teacher - at_theta).to(tl.float32).to(tl.float64)
    # Every tile left its own peak out of its sums; all but the row's are put back.
    other_T = (top_T > -_INF) & (peak_T != peak)
    own_T = tl.where(other_T, 1.0, 0.0)
    shift_T = tl.where(other_T, (peak_teacher_T - peak_theta_T).to(tl.float32).to(tl.float64) - gap_peak, 0.0)
    scale_T = tl.exp(tl.where(top_T > -_INF, top_T - _finite_or_zero(top), -_INF))
    sum_T = _column(parts, 8, tile_T, tiles, TILES, 0.0) + own_T
    first_T = _column(parts, 9, tile_T, tiles, TILES, 0.0)
    second_T = _column(parts, 10, tile_T, tiles, TILES, 0.0)
    third_T = _column(parts, 11, tile_T, tiles, TILES, 0.0)

    best_theta, best_teacher = _finite_or_zero(max_theta), _finite_or_zero(max_teacher)
    scale_theta_T = tl.exp(tl.where(max_theta_T > -_INF, max_theta_T - best_theta, -_INF))
    scale_teacher_T = tl.exp(tl.where(max_teacher_T > -_INF, max_teacher_T - best_teacher, -_INF))
    own_theta_T = own_T * tl.exp(tl.where(other_T, peak_theta_T - best_theta, 0.0))
    own_teacher_T = own_T * tl.exp(tl.where(other_T, peak_teacher_T - best_teacher, 0.0))
    sum_theta_T = scale_theta_T * _column(parts, 12, tile_T, tiles, TILES, 0.0) + own_theta_T
    sum_teacher_T = scale_teacher_T * _column(parts, 14, tile_T, tiles, TILES, 0.0) + own_teacher_T
    first_theta_T = scale_theta_T * _column(parts, 13, tile_T, tiles, TILES, 0.0) + shift_T * sum_theta_T
    first_teacher_T = scale_teacher_T * _column(parts, 15, tile_T, tiles, TILES, 0.0) + shift_T * sum_teacher_T
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
        _add8,
    )
    total = 1.0 + rest
    m1, m2, m3 = m1 / total, m2 / total, m3 / total
    k2 = m2 - m1 * m1
    k3 = m3 - 3 * m1 * m2 + 2 * m1 * m1 * m1
    theta_low, rest_theta, mean_theta, lse_theta = _side(best_theta, sum_theta, first_theta, at_theta)
    teacher_high, rest_teacher, mean_teacher, lse_teacher = _side(best_teacher, sum_teacher, first_teacher, at_teacher)
    lost_theta, lost_teacher = lowest == -_INF, highest == _INF
    lse_theta = tl.where(empty, lse_theta, at_theta + theta_low)
    lse_teacher = tl.where(empty, lse_teacher, at_teacher + teacher_high)
    # A maximum is finite, and the sum a number, exactly where the row is a distribution.
    fine_theta = (max_theta > -_INF) & (max_theta < _INF) & (sum_theta == sum_theta)
    fine_teacher = (max_teacher > -_INF) & (max_teacher < _INF) & (sum_teacher == sum_teacher)
    bad = tl.where(fine_theta, 0.0, 1.0) + tl.where(fine_teacher, 0.0, 2.0)

    target = teacher_high - theta_low
    lost = lost_theta | lost_teacher
    free = pinned != pinned
    center = gap_peak + m1
    narrow = (highest - center < _NARROW) & (center - lowest < _NARROW) & (lost == 0)
    expansion = 0.5 + tl.where(k2 > 0, k3 / tl.where(k2 > 0, k2, 1.0) / 24, 0.0)
    aim = tl.where(narrow & free, tl.minimum(tl.maximum(expansion, low), high), pinned)
    choice, level, known = solve_interpolated(
        log1p(rest), m1, k2, k3, theta_low, teacher_high, mean_theta, mean_teacher, target, aim, low, high
    )
    # Where supports differ, K's ends are not the policies' normalisers, and there is nothing to interpolate.
    newton = 0.5 + tl.minimum(tl.maximum((target - m1) / tl.where(k2 > 0, k2, 1.0), -0.3), 0.3)
    choice = tl.where(lost & free, tl.minimum(tl.maximum(newton, low), high), choice)
    choice = tl.where(empty & free, low, choice)
    status = tl.where((known & (lost == 0)) | empty | (bad > 0), SETTLED, tl.where(free, OPEN, PINNED))
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
    _write_choice(state, choice, tl.where(bad > 0, float("nan"), level), status, empty, lse_theta, lse_teacher)


@triton.jit
def _write_choice(state, alpha, level, status, empty, lse_theta, lse_teacher):
    """alpha = 0 and alpha = 1 are the policies themselves, and so is the student where the supports share nothing."""
    known = status != OPEN
    student = known & ((alpha == 0) | (empty & (alpha < 1)))
    teacher = known & (alpha == 1)
    tl.store(state + ALPHA, alpha)
    tl.store(state + LEVEL, tl.where(student, lse_theta, tl.where(teacher, lse_teacher, level)))
    tl.store(state + STATUS, tl.where(student | teacher, SETTLED, status).to(tl.float64))
    tl.store(state + PURE, tl.where(student, 1.0, tl.where(teacher, 2.0, 0.0)))


@triton.jit
def _moments(theta, teacher, token_N, scale, vocab, mid_peak, gap_peak, peak, delta):
    """(top, sum, and sums weighted with the gap's powers 1 to 4) of e^(mid + delta gap - top) over a tile, peak excluded."""
    theta_N, teacher_N = _load(theta, teacher, token_N, scale, vocab)
    gap_N = _gap(theta_N, teacher_N, gap_peak)
    y_N = 0.5 * theta_N + 0.5 * teacher_N - mid_peak + delta * gap_N
    y_N = tl.where(token_N == peak, -_INF, y_N)
    top = tl.max(y_N, 0)
    weight_N = tl.exp(_minus(y_N, top))
    first_N = weight_N * gap_N
    second_N = first_N * gap_N
    third_N = second_N * gap_N
    sums = tl.reduce((weight_N, first_N, second_N, third_N, third_N * gap_N), 0, _add5)
    return top, sums[0], sums[1], sums[2], sums[3], sums[4]


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
    """Grid (tiles, P). One more step for rows that are not settled, by all their programs; the last one goes on alone."""
    # Backwards: the rows read last are those that the cache still has.
    tile, row = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    tiles = tl.num_programs(0)
    state += row.to(tl.int64) * STATE
    if tl.load(state + STATUS) == SETTLED:
        return
    row_teacher = _row_of(rows_teacher, row, GATHER_TEACHER)
    theta += _row_of(rows_theta, row, GATHER_THETA) * theta_stride
    teacher += row_teacher * teacher_stride
    scale, _ = _scale_of(temperature, row_teacher, TEMPERED)
    mid_peak = tl.load(state + MID_PEAK).to(tl.float32)
    gap_peak = tl.load(state + GAP_PEAK).to(tl.float32)
    peak = tl.load(state + PEAK).to(tl.int32)
    alpha = tl.load(state + ALPHA)
    token_N = tl.arange(0, TILE)
    top, s0, s1, s2, s3, s4 = _moments(
        theta, teacher, tile * TILE + token_N, scale, vocab, mid_peak, gap_peak, peak, (alpha - 0.5).to(tl.float32)
    )
    parts += row.to(tl.int64) * PARTS * TILES
    out = parts + tile
    tl.store(out, top)
    tl.store(out + TILES, s0)
    tl.store(out + 2 * TILES, s1)
    tl.store(out + 3 * TILES, s2)
    tl.store(out + 4 * TILES, s3)
    tl.store(out + 5 * TILES, s4)
    if _last_to_arrive(count + row, tiles):
        tile_T = tl.arange(0, TILES)
        top_T = _column(parts, 0, tile_T, tiles, TILES, -_INF)
        origin = tl.maximum(tl.max(top_T, 0), 0.0)
        scale_T = tl.exp(top_T - origin)
        t0, t1, t2, t3, t4 = tl.reduce(
            (
                scale_T * _column(parts, 1, tile_T, tiles, TILES, 0.0),
                scale_T * _column(parts, 2, tile_T, tiles, TILES, 0.0),
                scale_T * _column(parts, 3, tile_T, tiles, TILES, 0.0),
                scale_T * _column(parts, 4, tile_T, tiles, TILES, 0.0),
                scale_T * _column(parts, 5, tile_T, tiles, TILES, 0.0),
            ),
            0,
            _add5,
        )
        lower, upper = tl.full([], low, tl.float64), tl.full([], high, tl.float64)
        target = tl.load(state + AT_TEACHER) - tl.load(state + AT_THETA)
        rest_ends = tl.load(state + REST)
        pinned = tl.load(state + STATUS) == PINNED
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
        _write_choice(state, alpha, level, SETTLED, False, tl.load(state + LSE_THETA), tl.load(state + LSE_TEACHER))


@triton.jit
def _row_moments(theta, teacher, tiles, scale, vocab, mid_peak, gap_peak, peak, delta, TILE: tl.constexpr):
    """`_moments` of a whole row, float64, relative to the larger of their maximum and the peak."""
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


@triton.jit
def _scores(theta_N, teacher_N, gap_N, pure, mid_peak, delta):
    """What q is the softmax of: float32, -inf outside its support."""
    mixed_N = 0.5 * theta_N + 0.5 * teacher_N - mid_peak + delta * gap_N
    return tl.where(pure == 0, mixed_N, tl.where(pure == 1, theta_N, teacher_N))


@triton.jit
def draw_kernel(
    theta,
    theta_stride,
    teacher,
    teacher_stride,
    rows_theta,
    rows_teacher,
    temperature,
    uniform,
    parts,
    count,
    state,
    logq,
    token,
    record,
    bad_side,
    vocab,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    GATHER_THETA: tl.constexpr,
    GATHER_TEACHER: tl.constexpr,
    TEMPERED: tl.constexpr,
    WRITE: tl.constexpr,
    DRAW: tl.constexpr,
):
    """Grid (tiles, P). Writes log q [P, V] if WRITE, token [P] if DRAW, record [P, RECORD] and bad_side [P]."""
    tile, row = tl.program_id(0), tl.program_id(1)
    tiles = tl.num_programs(0)
    row_teacher = _row_of(rows_teacher, row, GATHER_TEACHER)
    theta += _row_of(rows_theta, row, GATHER_THETA) * theta_stride
    teacher += row_teacher * teacher_stride
    scale, greedy = _scale_of(temperature, row_teacher, TEMPERED)
    state += row.to(tl.int64) * STATE
    level = tl.load(state + LEVEL).to(tl.float32)
    mid_peak = tl.load(state + MID_PEAK).to(tl.float32)
    gap_peak = tl.load(state + GAP_PEAK).to(tl.float32)
    delta = (tl.load(state + ALPHA) - 0.5).to(tl.float32)
    pure = tl.load(state + PURE)
    lse_theta, lse_teacher = tl.load(state + LSE_THETA).to(tl.float32), tl.load(state + LSE_TEACHER).to(tl.float32)
    token_N = tile * TILE + tl.arange(0, TILE)
    theta_N, teacher_N = _load(theta, teacher, token_N, scale, vocab)

    gap_N = _gap(theta_N, teacher_N, gap_peak)
    score_N = _scores(theta_N, teacher_N, gap_N, pure, mid_peak, delta)
    logq_N = score_N - level
    weight_N = tl.exp(logq_N)
    inside_N = logq_N > -_INF
    parts += row.to(tl.int64) * PARTS * TILES
    out = parts + tile
    sums = tl.reduce(
        (
            weight_N,
            tl.where(inside_N, weight_N * logq_N, 0.0),
            weight_N * gap_N,
            tl.where(inside_N, tl.exp(2 * (theta_N - lse_theta) - logq_N), 0.0),
            tl.where(inside_N, tl.exp(2 * (teacher_N - lse_teacher) - logq_N), 0.0),
        ),
        0,
        _add5,
    )
    for i in tl.static_range(5):
        tl.store(out + i * TILES, sums[i])
    if WRITE:
        tl.store(logq + row.to(tl.int64) * vocab + token_N, logq_N, mask=token_N < vocab)
    if greedy | (WRITE & (pure > 0)):
        top, index = _peak_at(score_N, token_N)
        tl.store(out + 5 * TILES, top)
        tl.store(out + 6 * TILES, index.to(tl.float32))
    if _last_to_arrive(count + row, tiles):
        record += row * RECORD
        total = _finish(parts, state, record, bad_side + row, tiles, TILES)
        tile_T = tl.arange(0, TILES)
        chosen = 0
        if greedy | (WRITE & (pure > 0)):
            top_T = _column(parts, 5, tile_T, tiles, TILES, -_INF)
            index_T = _column(parts, 6, tile_T, tiles, TILES, 0.0)
            first = tl.min(tl.where(top_T == tl.max(top_T, 0), index_T, vocab), 0)
            chosen = tl.minimum(first, vocab - 1.0).to(tl.int32)
            if WRITE & (pure > 0):
                # Where rounding makes the policy's favourite tie with another token, greedy decoding would differ.
                place = logq + row.to(tl.int64) * vocab + chosen
                value = tl.load(place)
                bits = value.to(tl.int32, bitcast=True)
                tl.store(place, tl.where(value < 0, (bits - 1).to(tl.float32, bitcast=True), value))
        if DRAW:
            if greedy == 0:
                target = tl.load(uniform + row).to(tl.float64) * total
                chosen = _invert(
                    theta, teacher, scale, vocab, gap_peak, pure, mid_peak, delta, level, parts, tiles, target, TILE, TILES
                )
            if tl.load(state + BAD) > 0:
                chosen = 0
            tl.store(token + row, chosen)
            columns = _token_columns(theta, teacher, scale, state, chosen)
            _write_token(record, columns, tl.where(greedy, 0.0, columns[0]))


@triton.jit
def _finish(parts, state, record, bad_side, tiles, TILES: tl.constexpr):
    """Write what the record keeps of a row whatever its token, and LOG_SUM; returns the sum of the weights."""
    tile_T = tl.arange(0, TILES)
    total, mean_log, mean, square_theta, square_teacher = tl.reduce(
        (
            _column(parts, 0, tile_T, tiles, TILES, 0.0),
            _column(parts, 1, tile_T, tiles, TILES, 0.0),
            _column(parts, 2, tile_T, tiles, TILES, 0.0),
            _column(parts, 3, tile_T, tiles, TILES, 0.0),
            _column(parts, 4, tile_T, tiles, TILES, 0.0),
        ),
        0,
        _add5,
    )
    log_sum = tl.log(total)
    entropy, mean = log_sum - mean_log / total, mean / total
    square_theta, square_teacher = square_theta * total, square_teacher * total
    alpha, level, pure = tl.load(state + ALPHA), tl.load(state + LEVEL), tl.load(state + PURE)
    at_theta, at_teacher = tl.load(state + AT_THETA), tl.load(state + AT_TEACHER)
    lost_theta, lost_teacher = tl.load(state + LOST_THETA) > 0, tl.load(state + LOST_TEACHER) > 0
    f = mean - (at_teacher - at_theta)
    log_z = tl.where(
        pure == 0, level.to(tl.float32).to(tl.float64) + log_sum - (1 - alpha) * at_theta - alpha * at_teacher, 0.0
    )
    kl_theta = tl.maximum(tl.where(pure == 1, 0.0, alpha * f - log_z), 0.0)
    kl_teacher = tl.maximum(tl.where(pure == 2, 0.0, (alpha - 1) * f - log_z), 0.0)
    kl_theta = tl.where((pure == 2) & lost_teacher, _INF, kl_theta)
    kl_teacher = tl.where((pure == 1) & lost_theta, _INF, kl_teacher)
    ess_theta = tl.where(lost_theta & (pure != 1), 0.0, 1 / tl.maximum(square_theta, 1.0))
    ess_teacher = tl.where(lost_teacher & (pure != 2), 0.0, 1 / tl.maximum(square_teacher, 1.0))
    bad = tl.load(state + BAD)
    spoil = tl.where(bad > 0, float("nan"), 0.0)
    tl.store(state + LOG_SUM, log_sum)
    tl.store(bad_side, bad.to(tl.int8))
    tl.store(record, (alpha + spoil).to(tl.float32))
    tl.store(record + 4, (kl_theta + spoil).to(tl.float32))
    tl.store(record + 5, (kl_teacher + spoil).to(tl.float32))
    tl.store(record + 6, (entropy + spoil).to(tl.float32))
    tl.store(record + 7, (ess_theta + spoil).to(tl.float32))
    tl.store(record + 8, (ess_teacher + spoil).to(tl.float32))
    return total


@triton.jit
def _invert(
    theta,
    teacher,
    scale,
    vocab,
    gap_peak,
    pure,
    mid_peak,
    delta,
    level,
    parts,
    tiles,
    target,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """The first token at which the cumulative weight exceeds target: the tile by the tiles' sums, then within it.

    Where rounding leaves none, the last token that has weight.
    """
    tile_T = tl.arange(0, TILES)
    mass_T = _column(parts, 0, tile_T, tiles, TILES, 0.0)
    cumulative_T = tl.cumsum(mass_T, 0)
    last = tl.max(tl.where(mass_T > 0, tile_T, 0), 0)
    tile = tl.minimum(tl.min(tl.where((cumulative_T > target) & (mass_T > 0), tile_T, TILES), 0), last)
    before = tl.sum(tl.where(tile_T < tile, mass_T, 0.0), 0)
    token_N = tile * TILE + tl.arange(0, TILE)
    theta_N, teacher_N = _load(theta, teacher, token_N, scale, vocab)
    score_N = _scores(theta_N, teacher_N, _gap(theta_N, teacher_N, gap_peak), pure, mid_peak, delta)
    weight_N = tl.exp(score_N - level)
    above_N = (before + tl.cumsum(weight_N.to(tl.float64), 0) > target) & (weight_N > 0)
    return tl.minimum(tl.min(tl.where(above_N, token_N, _NO_TOKEN), 0), tl.max(tl.where(weight_N > 0, token_N, 0), 0))


@triton.jit
def _token_columns(theta, teacher, scale, state, token):
    """(log q, log pi_theta, log pi_t) of a row's token, float32."""
    theta_1 = tl.load(theta + token).to(tl.float32) * scale
    teacher_1 = tl.load(teacher + token).to(tl.float32) * scale
    mid_peak, gap_peak = tl.load(state + MID_PEAK).to(tl.float32), tl.load(state + GAP_PEAK).to(tl.float32)
    delta = (tl.load(state + ALPHA) - 0.5).to(tl.float32)
    score = _scores(theta_1, teacher_1, _gap(theta_1, teacher_1, gap_peak), tl.load(state + PURE), mid_peak, delta)
    spoil = tl.where(tl.load(state + BAD) > 0, float("nan"), 0.0)
    logq = score - tl.load(state + LEVEL).to(tl.float32) - tl.load(state + LOG_SUM)
    return (
        (logq + spoil).to(tl.float32),
        (theta_1 - tl.load(state + LSE_THETA) + spoil).to(tl.float32),
        (teacher_1 - tl.load(state + LSE_TEACHER) + spoil).to(tl.float32),
    )


@triton.jit
def _write_token(record, columns, logp_draw):
    tl.store(record + 1, columns[0])
    tl.store(record + 2, columns[1])
    tl.store(record + 3, columns[2])
    tl.store(record + 9, logp_draw)


@triton.jit
def record_kernel(
    theta,
    theta_stride,
    teacher,
    teacher_stride,
    rows_theta,
    rows_teacher,
    temperature,
    state,
    token,
    logp_draw,
    record,
    GATHER_THETA: tl.constexpr,
    GATHER_TEACHER: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    """Grid (P,). The record's columns that depend on the token, for tokens drawn elsewhere."""
    row = tl.program_id(0)
    row_teacher = _row_of(rows_teacher, row, GATHER_TEACHER)
    theta += _row_of(rows_theta, row, GATHER_THETA) * theta_stride
    teacher += row_teacher * teacher_stride
    scale, _ = _scale_of(temperature, row_teacher, TEMPERED)
    columns = _token_columns(theta, teacher, scale, state + row.to(tl.int64) * STATE, tl.load(token + row))
    _write_token(record + row * RECORD, columns, tl.load(logp_draw + row))
