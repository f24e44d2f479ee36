"""Third pass: computes q, the token and the record, and verifies the guess of alpha. See osd.kernels.common."""

import triton
import triton.language as tl

from osd.kernels.common import (
    AGAIN,
    ALPHA,
    AT_TEACHER,
    AT_THETA,
    BAD,
    GAP_PEAK,
    GUESSED,
    INF,
    LEVEL,
    LEVEL_GUESSED,
    LOG_SUM,
    LOST_TEACHER,
    LOST_THETA,
    LSE_TEACHER,
    LSE_THETA,
    MID_PEAK,
    NO_TOKEN,
    OPEN,
    PARTS,
    PINNED,
    PURE,
    REST,
    STATE,
    STATUS,
    add6,
    column_of,
    exp,
    gap_of,
    last_to_arrive,
    load,
    row_of,
    scale_of,
    sums_of,
)
from osd.kernels.scalar_solver import refuted

_OUTSIDE: tl.constexpr = tl.constexpr(1e30)
RECORD: tl.constexpr = tl.constexpr(10)  # columns of the record, in the order of osd.core.RECORD_FIELDS


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
    SECOND: tl.constexpr,
):
    """Write log q [P, V] if WRITE, token [P] if DRAW, record [P, RECORD] and bad_side [P]. Grid (programs, P).

    SECOND: process only rows drawn from a rejected guess, several tiles per program. Otherwise one program per tile.
    """
    row = tl.program_id(1)
    tiles, programs = tl.cdiv(vocab, TILE), tl.num_programs(0)
    state += row.to(tl.int64) * STATE
    if SECOND:  # noqa: SIM102
        if tl.load(state + AGAIN) == 0:
            return
    row_teacher = row_of(rows_teacher, row, GATHER_TEACHER)
    theta += row_of(rows_theta, row, GATHER_THETA) * theta_stride
    teacher += row_teacher * teacher_stride
    scale, greedy = scale_of(temperature, row_teacher, TEMPERED)
    level = tl.load(state + LEVEL).to(tl.float32)
    mid_peak = tl.load(state + MID_PEAK).to(tl.float32)
    gap_peak = tl.load(state + GAP_PEAK).to(tl.float32)
    delta = (tl.load(state + ALPHA) - 0.5).to(tl.float32)
    pure = tl.load(state + PURE)
    lse_theta, lse_teacher = tl.load(state + LSE_THETA).to(tl.float32), tl.load(state + LSE_TEACHER).to(tl.float32)
    parts += row.to(tl.int64) * PARTS * TILES
    if WRITE:
        logq += row.to(tl.int64) * vocab
    wants_peak = greedy | (WRITE & (pure > 0))
    # Two branches instead of one loop: the first run has one tile per program, and a loop would slow down every row.
    if SECOND:
        for tile in range(tl.program_id(0), tiles, programs):
            _tile(
                theta, teacher, tile, scale, vocab, gap_peak, pure, mid_peak, delta, level, lse_theta, lse_teacher,
                wants_peak, parts + tile, logq, TILE, TILES, WRITE,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        _tile(
            theta, teacher, tile, scale, vocab, gap_peak, pure, mid_peak, delta, level, lse_theta, lse_teacher,
            wants_peak, parts + tile, logq, TILE, TILES, WRITE,
        )  # fmt: skip
    if last_to_arrive(count + row, programs):
        record += row * RECORD
        total, log_sum = _finish(parts, state, record, bad_side + row, tiles, TILES)
        tile_T = tl.arange(0, TILES)
        chosen = 0
        if wants_peak:
            top_T = column_of(parts, 6, tile_T, tiles, TILES, -INF)
            index_T = column_of(parts, 7, tile_T, tiles, TILES, 0.0)
            first = tl.min(tl.where(top_T == tl.max(top_T, 0), index_T, vocab), 0)
            chosen = tl.minimum(first, vocab - 1.0).to(tl.int32)
            # Nested conditions: without WRITE there is no logq, and this code must not be compiled.
            if WRITE:  # noqa: SIM102
                if pure > 0:
                    _lift(logq + chosen)
        if DRAW:
            if greedy == 0:
                target = tl.load(uniform + row).to(tl.float64) * total
                chosen = _invert(
                    theta, teacher, scale, vocab, gap_peak, pure, mid_peak, delta, level, parts, tiles, target, TILE, TILES
                )
            bad = tl.load(state + BAD).to(tl.int32)
            chosen = tl.where(bad > 0, 0, chosen)
            tl.store(token + row, tl.where(bad > 0, -1 - bad, chosen))
            columns = _token_columns(theta, teacher, scale, state, log_sum, chosen)
            _write_token(record, columns, tl.where(greedy, 0.0, columns[0]))


@triton.jit
def _tile(
    theta,
    teacher,
    tile,
    scale,
    vocab,
    gap_peak,
    pure,
    mid_peak,
    delta,
    level,
    lse_theta,
    lse_teacher,
    wants_peak,
    out,
    logq,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    WRITE: tl.constexpr,
):
    """Store the sums over one tile under q in the parts of the row, and the tile's log q if WRITE."""
    token_N = tile * TILE + tl.arange(0, TILE)
    theta_N, teacher_N = load(theta, teacher, token_N, scale, vocab)
    gap_N = gap_of(theta_N, teacher_N, gap_peak)
    score_N = _scores(theta_N, teacher_N, gap_N, pure, mid_peak, delta)
    logq_N = score_N - level
    weight_N = exp(logq_N)
    # Outside the support the weight is 0. A large finite number there makes the products below 0 instead of NaN.
    finite_N = tl.where(logq_N > -INF, logq_N, _OUTSIDE)
    first_N = weight_N * gap_N
    sums = tl.reduce(
        (
            weight_N,
            weight_N * finite_N,
            first_N,
            exp(2 * (theta_N - lse_theta) - finite_N),
            exp(2 * (teacher_N - lse_teacher) - finite_N),
            first_N * gap_N,
        ),
        0,
        add6,
    )
    for i in tl.static_range(6):
        tl.store(out + i * TILES, sums[i])
    if WRITE:
        tl.store(logq + token_N, logq_N, mask=token_N < vocab)
    if wants_peak:
        top, index = _peak_at(score_N, token_N)
        tl.store(out + 6 * TILES, top)
        tl.store(out + 7 * TILES, index.to(tl.float32))


@triton.jit
def _scores(theta_N, teacher_N, gap_N, pure, mid_peak, delta):
    """Return the scores whose softmax is q: float32, -inf outside its support."""
    mixed_N = 0.5 * theta_N + 0.5 * teacher_N - mid_peak + delta * gap_N
    return tl.where(pure == 0, mixed_N, tl.where(pure == 1, theta_N, teacher_N))


@triton.jit
def _peak_at(values_N, token_N):
    """Return (maximum, first token with that value), or (-inf, NO_TOKEN) if every value is -inf."""
    top = tl.max(values_N, 0)
    return top, tl.min(tl.where((values_N == top) & (values_N > -INF), token_N, NO_TOKEN), 0)


@triton.jit
def _lift(place):
    """Raise the stored value to the next float32, at most to 0.

    Rounding can make the policy's likeliest token tie with another one. Greedy decoding of log q could then pick the
    other.
    """
    value = tl.load(place, cache_modifier=".cg")
    bits = value.to(tl.int32, bitcast=True)
    tl.store(place, tl.where(value < 0, (bits - 1).to(tl.float32, bitcast=True), value))


@triton.jit
def _finish(parts, state, record, bad_side, tiles, TILES: tl.constexpr):
    """Store the record columns that do not depend on the token, LOG_SUM, and the result of verifying a guess.

    Returns the sum of the weights and its logarithm.
    """
    tile_T = tl.arange(0, TILES)
    total, mean_log, mean, square_theta, square_teacher, m2 = tl.reduce(
        (
            sums_of(parts, 0, tile_T, tiles, TILES),
            sums_of(parts, 1, tile_T, tiles, TILES),
            sums_of(parts, 2, tile_T, tiles, TILES),
            sums_of(parts, 3, tile_T, tiles, TILES),
            sums_of(parts, 4, tile_T, tiles, TILES),
            sums_of(parts, 5, tile_T, tiles, TILES),
        ),
        0,
        add6,
    )
    log_sum, share = tl.log(total), 1 / total
    entropy, mean = log_sum - mean_log * share, mean * share
    square_theta, square_teacher = square_theta * total, square_teacher * total
    alpha, level, pure = tl.load(state + ALPHA), tl.load(state + LEVEL), tl.load(state + PURE)
    at_theta, at_teacher = tl.load(state + AT_THETA), tl.load(state + AT_TEACHER)
    lost_theta, lost_teacher = tl.load(state + LOST_THETA) > 0, tl.load(state + LOST_TEACHER) > 0
    f = mean - (at_teacher - at_theta)
    status = tl.load(state + STATUS)
    alpha_guessed, level_guessed = status == GUESSED, status == LEVEL_GUESSED
    again = refuted(f, mean, m2 * share, tl.load(state + REST), log_sum, alpha_guessed, level_guessed)
    tl.store(state + AGAIN, again.to(tl.float64))
    tl.store(state + STATUS, tl.where(again, tl.where(alpha_guessed, OPEN, PINNED).to(tl.float64), status))
    log_z = tl.where(
        pure == 0, level.to(tl.float32).to(tl.float64) + log_sum - (1 - alpha) * at_theta - alpha * at_teacher, 0.0
    )
    kl_theta = tl.maximum(tl.where(pure == 1, 0.0, alpha * f - log_z), 0.0)
    kl_teacher = tl.maximum(tl.where(pure == 2, 0.0, (alpha - 1) * f - log_z), 0.0)
    kl_theta = tl.where((pure == 2) & lost_teacher, INF, kl_theta)
    kl_teacher = tl.where((pure == 1) & lost_theta, INF, kl_teacher)
    ess_theta = tl.where(lost_theta & (pure != 1), 0.0, 1 / tl.maximum(square_theta, 1.0).to(tl.float32))
    ess_teacher = tl.where(lost_teacher & (pure != 2), 0.0, 1 / tl.maximum(square_teacher, 1.0).to(tl.float32))
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
    return total, log_sum


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
    """Return the first token at which the cumulative weight exceeds target.

    Finds the tile from the sums of the tiles, then the token within it. If rounding leaves no such token, returns the
    last token with a positive weight.
    """
    tile_T = tl.arange(0, TILES)
    mass_T = sums_of(parts, 0, tile_T, tiles, TILES)
    cumulative_T = tl.cumsum(mass_T, 0)
    last = tl.max(tl.where(mass_T > 0, tile_T, 0), 0)
    tile = tl.minimum(tl.min(tl.where((cumulative_T > target) & (mass_T > 0), tile_T, TILES), 0), last)
    before = tl.sum(tl.where(tile_T < tile, mass_T, 0.0), 0)
    token_N = tile * TILE + tl.arange(0, TILE)
    theta_N, teacher_N = load(theta, teacher, token_N, scale, vocab)
    score_N = _scores(theta_N, teacher_N, gap_of(theta_N, teacher_N, gap_peak), pure, mid_peak, delta)
    weight_N = exp(score_N - level)
    above_N = (before + tl.cumsum(weight_N.to(tl.float64), 0) > target) & (weight_N > 0)
    return tl.minimum(tl.min(tl.where(above_N, token_N, NO_TOKEN), 0), tl.max(tl.where(weight_N > 0, token_N, 0), 0))


@triton.jit
def _token_columns(theta, teacher, scale, state, log_sum, token):
    """Return (log q, log pi_theta, log pi_t) of the token of a row, float32."""
    theta_1 = tl.load(theta + token).to(tl.float32) * scale
    teacher_1 = tl.load(teacher + token).to(tl.float32) * scale
    mid_peak, gap_peak = tl.load(state + MID_PEAK).to(tl.float32), tl.load(state + GAP_PEAK).to(tl.float32)
    delta = (tl.load(state + ALPHA) - 0.5).to(tl.float32)
    score = _scores(theta_1, teacher_1, gap_of(theta_1, teacher_1, gap_peak), tl.load(state + PURE), mid_peak, delta)
    spoil = tl.where(tl.load(state + BAD) > 0, float("nan"), 0.0)
    logq = score - tl.load(state + LEVEL).to(tl.float32) - log_sum
    return (
        (logq + spoil).to(tl.float32),
        (theta_1 - tl.load(state + LSE_THETA) + spoil).to(tl.float32),
        (teacher_1 - tl.load(state + LSE_TEACHER) + spoil).to(tl.float32),
    )


@triton.jit
def _write_token(record, columns, logp_draw):
    """Store the record columns that depend on the token."""
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
    """Write the record columns that depend on the token, for tokens drawn elsewhere. Grid (P,)."""
    row = tl.program_id(0)
    row_teacher = row_of(rows_teacher, row, GATHER_TEACHER)
    theta += row_of(rows_theta, row, GATHER_THETA) * theta_stride
    teacher += row_teacher * teacher_stride
    scale, _ = scale_of(temperature, row_teacher, TEMPERED)
    state += row.to(tl.int64) * STATE
    columns = _token_columns(theta, teacher, scale, state, tl.load(state + LOG_SUM), tl.load(token + row))
    _write_token(record + row * RECORD, columns, tl.load(logp_draw + row))
