"""Layout and functions shared by the three kernel passes: row state, tile loads, and the reduction over tiles.

    meet     moments of the gap at alpha = 1/2, both normalisers, the mean gap at both ends   -> a guess of alpha
    refine   moments at that alpha, for rows without a guess                                  -> the converged alpha
    draw     q and its sums at that alpha, log q on request                                   -> token and record, or
                                                                                                 a rejected guess

Then refine and draw run once more for the rows whose guess was rejected by the sums of draw (very rare). Each pass is one
kernel and reads both logits once. A program holds one tile of one row in registers at a time. meet and draw start one program
per tile. Passes that few rows need start fewer programs, each for several tiles. Programs store their sums in `parts`. The
last program of a row to finish combines the tiles in float64 and writes the `state` of the row.

Coordinates are those of osd.log_partition, relative to the row's peak, the likeliest token under alpha = 1/2. The peak has gap
0 and weight exactly 1 and is excluded from the sums, so a row with a mass of 1e-9 off its peak keeps its digits.
delta = alpha - 1/2.

Shape suffixes: P rows, T tiles, N tokens of a tile. Logarithms are natural.
"""

import triton
import triton.language as tl

# Columns of state_P, float64.
ALPHA: tl.constexpr = tl.constexpr(0)
STATUS: tl.constexpr = tl.constexpr(1)
LEVEL: tl.constexpr = tl.constexpr(2)  # log q = score - level: K(delta), or the policy's lse in a pure row
MID_PEAK: tl.constexpr = tl.constexpr(3)
GAP_PEAK: tl.constexpr = tl.constexpr(4)
PEAK: tl.constexpr = tl.constexpr(5)
LSE_THETA: tl.constexpr = tl.constexpr(6)
LSE_TEACHER: tl.constexpr = tl.constexpr(7)
AT_THETA: tl.constexpr = tl.constexpr(8)  # lse_theta minus the student's logit of the peak
AT_TEACHER: tl.constexpr = tl.constexpr(9)  # the same for the teacher
PURE: tl.constexpr = tl.constexpr(10)  # 1: q is the student over its full support, 2: the teacher, 0: a mixture
LOST_THETA: tl.constexpr = tl.constexpr(11)
LOST_TEACHER: tl.constexpr = tl.constexpr(12)
BAD: tl.constexpr = tl.constexpr(13)  # osd.mixing.Mixture.bad_side_B
REST: tl.constexpr = tl.constexpr(14)  # the larger of the two off-peak masses
LOG_SUM: tl.constexpr = tl.constexpr(15)  # log of the sum of e^(score - level): 0 up to rounding
AGAIN: tl.constexpr = tl.constexpr(16)  # 1: the row was drawn from a rejected guess
STATE: tl.constexpr = tl.constexpr(17)  # number of columns of state_P
PARTS: tl.constexpr = tl.constexpr(16)  # number of columns of parts_PT, float32; each kernel assigns them itself

# Values of STATUS.
OPEN: tl.constexpr = tl.constexpr(0)
SETTLED: tl.constexpr = tl.constexpr(1)
PINNED: tl.constexpr = tl.constexpr(2)  # alpha is given, the level is unknown
GUESSED: tl.constexpr = tl.constexpr(3)  # alpha and level are guesses on which two interpolants agree
LEVEL_GUESSED: tl.constexpr = tl.constexpr(4)  # alpha is given, the level is such a guess

INF: tl.constexpr = tl.constexpr(float("inf"))
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_GREEDY_BELOW: tl.constexpr = tl.constexpr(1e-5)  # vLLM's threshold for "temperature 0"
NO_TOKEN: tl.constexpr = tl.constexpr(1 << 30)


@triton.jit
def row_of(rows, index, GATHER: tl.constexpr):
    """Return the row of a model's batch that belongs to a mixed row."""
    return tl.load(rows + index) if GATHER else index.to(tl.int64)


@triton.jit
def scale_of(temperature, row, TEMPERED: tl.constexpr):
    """Return (1 / temperature, True if the row is greedy). The scale of a greedy row is 1."""
    if TEMPERED:
        t = tl.load(temperature + row)
        greedy = t < _GREEDY_BELOW
        scale = tl.where(greedy, 1.0, 1.0 / tl.where(greedy, 1.0, t))
    else:
        scale = 1.0
        greedy = False
    return scale, greedy


@triton.jit
def load(theta, teacher, token_N, scale, vocab):
    """Load the tempered logits of a tile, float32, -inf beyond the vocabulary."""
    theta_N = tl.load(theta + token_N, mask=token_N < vocab, other=-INF).to(tl.float32) * scale
    teacher_N = tl.load(teacher + token_N, mask=token_N < vocab, other=-INF).to(tl.float32) * scale
    return theta_N, teacher_N


@triton.jit
def exp(values_N):
    """Return e^x in float32 in two instructions. tl.exp takes five to cover results below 1e-38, which are 0 here."""
    return tl.exp2(values_N * _LOG2_E)


@triton.jit
def gap_of(theta_N, teacher_N, gap_peak):
    """Return z_t - z_theta relative to the peak, and 0 outside the shared support, where the difference is not finite."""
    gap_N = teacher_N - theta_N - gap_peak
    return tl.where(tl.abs(gap_N) < INF, gap_N, 0.0)


@triton.jit
def minus(values_N, top):
    """Return values - top, with a top of -inf treated as 0."""
    return values_N - tl.where(top == -INF, 0.0, top)


@triton.jit
def column_of(parts, column, tile_T, tiles, TILES: tl.constexpr, other):
    """Load one column of the parts of a row, [T] float32, `other` beyond the last tile."""
    return tl.load(parts + column * TILES + tile_T, mask=tile_T < tiles, other=other, cache_modifier=".cg")


@triton.jit
def sums_of(parts, column, tile_T, tiles, TILES: tl.constexpr):
    """Load one column of the parts of a row, [T] float64, 0 beyond the last tile."""
    return column_of(parts, column, tile_T, tiles, TILES, 0.0).to(tl.float64)


@triton.jit
def last_to_arrive(count, programs):
    """Return True in the last program of a row to finish. The stores of the row's other programs are then visible."""
    tl.debug_barrier()  # one thread executes the atomic, so all threads must have stored before
    arrived = tl.atomic_add(count, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return arrived == programs - 1


# Reductions of several values at once. A reduction costs one or two barriers, independent of the number of values.


@triton.jit
def add5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def add6(a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4, b5):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5


@triton.jit
def add8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def write_choice(state, alpha, level, status, empty, lse_theta, lse_teacher):
    """Store alpha, level and status. Mark a row as pure if alpha is 0 or 1.

    A row whose supports share no token is pure too: q is the student unless alpha is 1.
    """
    known = (status != OPEN) & (status != GUESSED)
    student = known & ((alpha == 0) | (empty & (alpha < 1)))
    teacher = known & (alpha == 1)
    tl.store(state + ALPHA, alpha)
    tl.store(state + LEVEL, tl.where(student, lse_theta, tl.where(teacher, lse_teacher, level)))
    tl.store(state + STATUS, tl.where(student | teacher, SETTLED, status).to(tl.float64))
    tl.store(state + PURE, tl.where(student, 1.0, tl.where(teacher, 2.0, 0.0)))
