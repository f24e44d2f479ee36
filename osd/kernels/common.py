"""What the three passes share: the row's state, a tile's logits, and how a row's last program is known.

    meet     moments of the gap at alpha = 1/2, both normalisers and both ends' means    -> a guess of alpha
    refine   moments at that alpha, where it is not known and not even a good guess      -> alpha, surely
    draw     q and its sums at that alpha, log q when asked for                          -> token and record, or a guess refuted

and once more refine and draw, for the rows whose guess draw's sums refuted; there is hardly ever one. Each is one kernel and
one pass over both logits. A program holds one tile of one row in registers at a time, and reads it once: one for each tile in
meet and draw; in the passes that hardly any row needs fewer, which take several tiles each. What they sum goes to `parts`, and
the row's last program to arrive combines the tiles in float64 and writes the row's `state`.

Coordinates are osd.log_partition's, relative to the likeliest token under alpha = 1/2, the row's peak: its gap is 0 and its
weight exactly 1, apart from the sums, so that a row with 1e-9 off its peak keeps its digits. delta = alpha - 1/2.

Shape suffixes: P rows, T tiles, N tokens of a tile. Logarithms are natural.
"""

import triton
import triton.language as tl

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
AGAIN: tl.constexpr = tl.constexpr(16)  # 1: the row was drawn from a guess that turned out wrong
STATE: tl.constexpr = tl.constexpr(17)
PARTS: tl.constexpr = tl.constexpr(16)  # columns of parts_PT, float32, whatever a kernel keeps in them

# Values of STATUS.
OPEN: tl.constexpr = tl.constexpr(0)
SETTLED: tl.constexpr = tl.constexpr(1)
PINNED: tl.constexpr = tl.constexpr(2)  # alpha is given, the level is not known
GUESSED: tl.constexpr = tl.constexpr(3)  # alpha, and so the level, by two interpolants that agree
LEVEL_GUESSED: tl.constexpr = tl.constexpr(4)  # the level alone: alpha is given

INF: tl.constexpr = tl.constexpr(float("inf"))
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_GREEDY_BELOW: tl.constexpr = tl.constexpr(1e-5)  # vLLM's threshold for "temperature 0"
NO_TOKEN: tl.constexpr = tl.constexpr(1 << 30)


@triton.jit
def row_of(rows, index, GATHER: tl.constexpr):
    return tl.load(rows + index) if GATHER else index.to(tl.int64)


@triton.jit
def scale_of(temperature, row, TEMPERED: tl.constexpr):
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
def load(theta, teacher, token_N, scale, vocab):
    """Tempered logits of a tile, float32, -inf beyond the vocabulary."""
    theta_N = tl.load(theta + token_N, mask=token_N < vocab, other=-INF).to(tl.float32) * scale
    teacher_N = tl.load(teacher + token_N, mask=token_N < vocab, other=-INF).to(tl.float32) * scale
    return theta_N, teacher_N


@triton.jit
def exp(values_N):
    """e^x in float32: two instructions, where tl.exp has five for the sake of results below 1e-38, which are 0 here."""
    return tl.exp2(values_N * _LOG2_E)


@triton.jit
def gap_of(theta_N, teacher_N, gap_peak):
    """z_t - z_theta relative to the peak's, and 0 outside the shared support, where the difference is not a finite number."""
    gap_N = teacher_N - theta_N - gap_peak
    return tl.where(tl.abs(gap_N) < INF, gap_N, 0.0)


@triton.jit
def minus(values_N, top):
    """values - top, where a top of -inf stands for 0."""
    return values_N - tl.where(top == -INF, 0.0, top)


@triton.jit
def column_of(parts, column, tile_T, tiles, TILES: tl.constexpr, other):
    """One column of a row's parts, [T] float32, `other` beyond the last tile."""
    return tl.load(parts + column * TILES + tile_T, mask=tile_T < tiles, other=other, cache_modifier=".cg")


@triton.jit
def sums_of(parts, column, tile_T, tiles, TILES: tl.constexpr):
    """The same, float64, 0 beyond the last tile."""
    return column_of(parts, column, tile_T, tiles, TILES, 0.0).to(tl.float64)


@triton.jit
def last_to_arrive(count, programs):
    """Whether all other programs of this row are done; what they stored is then visible to this one."""
    tl.debug_barrier()  # the atomic is one thread's: every thread must have stored
    arrived = tl.atomic_add(count, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return arrived == programs - 1


# Reductions of several values at once: each costs a barrier or two, however many values it takes.


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
    """alpha = 0 and alpha = 1 are the policies themselves, and so is the student where the supports share nothing."""
    known = (status != OPEN) & (status != GUESSED)
    student = known & ((alpha == 0) | (empty & (alpha < 1)))
    teacher = known & (alpha == 1)
    tl.store(state + ALPHA, alpha)
    tl.store(state + LEVEL, tl.where(student, lse_theta, tl.where(teacher, lse_teacher, level)))
    tl.store(state + STATUS, tl.where(student | teacher, SETTLED, status).to(tl.float64))
    tl.store(state + PURE, tl.where(student, 1.0, tl.where(teacher, 2.0, 0.0)))
