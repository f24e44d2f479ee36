"""The convex curve on which two policies are mixed: what it is made of, and how it is read without losing digits.

On the shared support S (tokens finite on both sides) let

    mid = (z_theta + z_t) / 2,   gap = z_t - z_theta - m,   K(delta) = log sum_S exp(mid + delta * gap)

with m the mean of z_t - z_theta under q at alpha = 1/2. Then delta = alpha - 1/2 walks from the student (-1/2) to the
teacher (1/2), K' and K'' are the mean and variance of the gap under q, and log(pi_t / pi_theta) = gap - shift with
shift = K(1/2) - K(-1/2) when both supports are S. A token outside S has mid = -inf and drops out by itself.

Shape suffixes: B rows, V vocabulary. Logarithms are natural. Work on [B, V] is float32; numbers of shape [B] are
float64, because they are differences of nearly equal ones.
"""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

# Finite gaps are cut here: their cubes must stay finite, and beyond it a weight is 0 for any delta above 1e-4.
_MAX_GAP = 1e6
_WIDE = 50.0  # beyond it e^(3/2 gap) may overflow, though the weight that it multiplies makes the product small


def blind(values: Tensor) -> bool:
    """Whether code may not look at these values to decide what to do: while a CUDA graph is captured it cannot.

    Elsewhere a look costs a synchronisation of some 20 microseconds, and saves a dozen passes over [B, V].
    """
    return values.is_cuda and torch.cuda.is_current_stream_capturing()


def any_row(mask_B: Tensor) -> bool:
    """Whether a special case is to be handled: always where one may not look."""
    return blind(mask_B) or bool(mask_B.any())


class _Workspace(threading.local):
    """[B, V] memory kept between calls of one thread: on the CPU, touching fresh pages costs more than the arithmetic.

    A buffer belongs to whoever asked for its name last, so nothing taken from here may leave the call it was taken in.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def __call__(self, name: str, like_BV: Tensor, rows: int | None = None) -> Tensor:
        shape = (like_BV.shape[0] if rows is None else rows, like_BV.shape[1])
        if like_BV.is_cuda:  # its allocator keeps memory by itself, and apart for each stream
            return torch.empty(shape, device=like_BV.device)
        size = shape[0] * shape[1]
        if name not in self.kept or self.kept[name].numel() < size:
            with torch.inference_mode(False):  # a tensor born in inference mode could not be written outside it
                self.kept[name] = torch.empty(size)
        return self.kept[name][:size].view(shape)


workspace = _Workspace()


def dot(a_BV: Tensor, b_BV: Tensor, scratch_BV: Tensor) -> Tensor:
    """Row sums of a * b, float64 [B]; overwrites the scratch."""
    return torch.mul(a_BV, b_BV, out=scratch_BV).sum(-1).double()


def off_peak_(e_BV: Tensor) -> Tensor:
    """Row sums less 1, float64 [B], of e = exp(y - max y); zeroes the peak.

    The peak is counted and the rest summed apart (frac() drops exactly the 1s), so that log1p of the result is 1e-12
    and not 0 when the sum is 1 + 1e-12.
    """
    total_B = e_BV.sum(-1).double()
    rest_B = e_BV.frac_().sum(-1).double()
    return rest_B + ((total_B - rest_B).round() - 1)


def log_sum_exp_(y_BV: Tensor, scratch_BV: Tensor) -> tuple[Tensor, Tensor]:
    """(log sum exp y, sum exp(y - max) - 1) per row, float64 [B]; NaN where a row has NaN or +inf or is all -inf.

    y loses its max; the scratch becomes exp(y) with the peak zeroed.
    """
    top_B1 = y_BV.amax(-1, keepdim=True)
    rest_B = off_peak_(torch.exp(y_BV.sub_(top_B1), out=scratch_BV))
    return top_B1.squeeze(-1).double() + torch.log1p(rest_B), rest_B


@dataclass(frozen=True)
class Pair:
    """Two tempered policies on one vocabulary, ready to be mixed: `pair_up` builds it, nothing modifies it.

    theta_BV, teacher_BV: their logits, float32, possibly the caller's own storage.
    mid_BV, gap_BV: as in the module's docstring; mid is shifted to a maximum of 0.
    half_BV: q at alpha = 1/2.
    at_theta_B, at_teacher_B: K(-1/2) and K(1/2).
    on_theta_B, on_teacher_B: log pi_theta(S) and log pi_t(S), 0 when S is the policy's whole support.
    lse_theta_B, lse_teacher_B: log sum exp of the logits, over each one's own full support.
    rest_B: the larger of the two policies' off-peak masses. spread_B: a bound of |gap| on S.
    lost_theta_B, lost_teacher_B: this policy reaches tokens outside S. empty_B: S is empty.
    bad_side_B: int8, 1 where the student's row is not a distribution (NaN, +inf, all -inf), 2 the teacher's, 3 both.
    finite: every logit is known to be finite.
    """

    theta_BV: Tensor
    teacher_BV: Tensor
    mid_BV: Tensor
    gap_BV: Tensor
    half_BV: Tensor
    at_theta_B: Tensor
    at_teacher_B: Tensor
    on_theta_B: Tensor
    on_teacher_B: Tensor
    lse_theta_B: Tensor
    lse_teacher_B: Tensor
    rest_B: Tensor
    spread_B: Tensor
    lost_theta_B: Tensor
    lost_teacher_B: Tensor
    empty_B: Tensor
    bad_side_B: Tensor
    finite: bool


def bad_side(top_theta_B: Tensor, top_teacher_B: Tensor) -> Tensor:
    """Pair.bad_side_B from the rows' maxima: a maximum is finite exactly when the row is a distribution."""
    return (~top_theta_B.isfinite()).to(torch.int8) + 2 * (~top_teacher_B.isfinite()).to(torch.int8)


def pair_up(logits_theta_BV: Tensor, logits_teacher_BV: Tensor) -> Pair:
    """The Pair of two tempered [B, V] logits or log-probabilities of any float dtype; raises ValueError on shapes.

    It lives in the thread's workspace: it is gone with the next call.
    """
    if logits_theta_BV.ndim != 2 or logits_theta_BV.shape != logits_teacher_BV.shape:
        raise ValueError(
            f"student logits {tuple(logits_theta_BV.shape)} and teacher logits {tuple(logits_teacher_BV.shape)}; "
            f"use one [B, V] for both, cut to the shared vocabulary"
        )
    theta_BV, teacher_BV = as_float("theta", logits_theta_BV), as_float("teacher", logits_teacher_BV)
    mid_BV, gap_BV, half_BV, a_BV, b_BV = (workspace(name, theta_BV) for name in ("mid", "gap", "half", "a", "b"))

    torch.sub(teacher_BV, theta_BV, out=gap_BV)
    if any_row(~((gap_BV.amin(-1) >= -_MAX_GAP) & (gap_BV.amax(-1) <= _MAX_GAP))):
        theta_BV, teacher_BV = _reached(theta_BV), _reached(teacher_BV)
        torch.sub(teacher_BV, theta_BV, out=gap_BV)
    torch.mul(theta_BV, 0.5, out=mid_BV).add_(teacher_BV, alpha=0.5)
    top_B1 = mid_BV.amax(-1, keepdim=True)
    torch.softmax(mid_BV.sub_(top_B1), -1, out=half_BV)
    low_B, high_B, lost_theta_B, lost_teacher_B, finite = _tame(gap_BV)
    m_B = torch.zeros_like(low_B, dtype=torch.float64)
    for _ in range(2):  # once leaves a mean of 1e-7 of m, which may be more than the gap's own size
        shift_B = dot(half_BV, gap_BV, a_BV).float()
        gap_BV.sub_(shift_B[:, None])
        m_B += shift_B

    # Both ends are evaluated through mid and gap, not through the logits: what matters is their difference, and
    # roundings that the two share cancel in it.
    at_theta_B, rest_theta_B = log_sum_exp_(torch.add(mid_BV, gap_BV, alpha=-0.5, out=a_BV), b_BV)
    at_teacher_B, rest_teacher_B = log_sum_exp_(torch.add(mid_BV, gap_BV, alpha=0.5, out=a_BV), b_BV)
    top_B = top_B1.squeeze(-1).double()
    lse_theta_B, lse_teacher_B = top_B - m_B / 2 + at_theta_B, top_B + m_B / 2 + at_teacher_B
    on_theta_B = on_teacher_B = torch.zeros_like(m_B)
    empty_B, bad_side_B = torch.zeros_like(lost_theta_B), torch.zeros_like(lost_theta_B, dtype=torch.int8)
    if any_row(lost_theta_B | lost_teacher_B | ~(at_theta_B + at_teacher_B).isfinite()):
        empty_B = top_B == -torch.inf
        bad_side_B = bad_side(theta_BV.amax(-1), teacher_BV.amax(-1))
        lse_theta_B, on_theta_B = _full_support(theta_BV, teacher_BV, lse_theta_B, empty_B)
        lse_teacher_B, on_teacher_B = _full_support(teacher_BV, theta_BV, lse_teacher_B, empty_B)
    rest_B = torch.maximum(rest_theta_B / (1 + rest_theta_B), rest_teacher_B / (1 + rest_teacher_B))
    spread_B = torch.maximum(high_B - m_B, m_B - low_B)
    return Pair(
        theta_BV, teacher_BV, mid_BV, gap_BV, half_BV, at_theta_B, at_teacher_B, on_theta_B, on_teacher_B,
        lse_theta_B, lse_teacher_B, rest_B, spread_B, lost_theta_B, lost_teacher_B, empty_B, bad_side_B, finite,
    )  # fmt: skip


def as_float(name: str, z_BV: Tensor) -> Tensor:
    """z itself if it is float32, else a float32 copy in the workspace."""
    return z_BV if z_BV.dtype == torch.float32 else workspace(name, z_BV).copy_(z_BV)


def _reached(z_BV: Tensor) -> Tensor:
    """z with -inf for tokens masked by a large finite number (-1e9, finfo.min): their probability is 0 in any format."""
    return z_BV.masked_fill(z_BV < z_BV.amax(-1, keepdim=True) - _MAX_GAP, -torch.inf)


def _tame(gap_BV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """Make z_t - z_theta finite, in place; its row minima and maxima, whether they were -inf and +inf, whether it was.

    Outside S the gap multiplies weights of 0, so that any finite number will do.
    """
    low_B, high_B = gap_BV.amin(-1), gap_BV.amax(-1)
    lost_theta_B = lost_teacher_B = torch.zeros_like(low_B, dtype=torch.bool)
    finite = not any_row(~((low_B >= -_MAX_GAP) & (high_B <= _MAX_GAP)))
    if not finite:
        gap_BV.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        lost_theta_B, lost_teacher_B = gap_BV.amin(-1) == -torch.inf, gap_BV.amax(-1) == torch.inf
        gap_BV.nan_to_num_(0.0, 0.0, 0.0).clamp_(-_MAX_GAP, _MAX_GAP)
        low_B, high_B = gap_BV.amin(-1), gap_BV.amax(-1)
    return low_B, high_B, lost_theta_B, lost_teacher_B, finite


def _full_support(z_BV: Tensor, other_BV: Tensor, lse_shared_B: Tensor, empty_B: Tensor) -> tuple[Tensor, Tensor]:
    """(log sum exp z, log pi(S)), where lse_shared is log sum_S exp z: z may reach tokens that the other cannot."""
    lse_B = torch.logsumexp(z_BV, -1).double()
    off_B = (torch.logsumexp(z_BV.masked_fill(other_BV > -torch.inf, -torch.inf), -1) - lse_B).exp()
    # A small loss is summed by itself; as a difference of two log sums it would be rounding.
    log_on_B = torch.where(off_B < 0.5, torch.log1p(-off_B), lse_shared_B - lse_B)
    return torch.where(empty_B, lse_B, lse_shared_B - log_on_B), log_on_B


class Curve:
    """K over some rows of a pair. Lengths [B] below are of those rows."""

    def __init__(self, pair: Pair, rows_B: Tensor | None) -> None:
        def take(values_B: Tensor) -> Tensor:
            return values_B if rows_B is None else values_B[rows_B]

        self.mid_BV, self.gap_BV = self._take("mid", pair.mid_BV, rows_B), self._take("gap", pair.gap_BV, rows_B)
        self.ends_B = take(pair.at_teacher_B - pair.at_theta_B)
        self.lost_B, self.spread_B = take(pair.on_theta_B - pair.on_teacher_B), take(pair.spread_B)
        self.a_BV, self.b_BV = self._buffer("a"), self._buffer("b")

    @staticmethod
    def _take(name: str, values_BV: Tensor, rows_B: Tensor | None) -> Tensor:
        if rows_B is None:
            return values_BV
        return torch.index_select(values_BV, 0, rows_B, out=workspace(name + " rows", values_BV, len(rows_B)))

    def _buffer(self, name: str) -> Tensor:
        return workspace(name, self.gap_BV)

    def _at(self, delta_B: Tensor) -> Tensor:
        return torch.addcmul(self.mid_BV, self.gap_BV, delta_B.float()[:, None], out=self.a_BV)

    def slope(self, delta_B: Tensor) -> tuple[Tensor, Tensor]:
        """K' and K'' at delta: mean and variance of the gap under q."""
        torch.softmax(self._at(delta_B), -1, out=self.b_BV)
        mean_B = dot(self.b_BV, self.gap_BV, self.a_BV)
        square_B = self.a_BV.mul_(self.gap_BV).sum(-1).double()
        return mean_B, square_B - mean_B**2

    def rise(self, half: float, shift_B: Tensor) -> tuple[Tensor, Tensor]:
        """K(half - shift) - K(-half - shift), and the same difference of K'."""
        (high_B, slope_high_B), (low_B, slope_low_B) = (self._value(end - shift_B) for end in (half, -half))
        return high_B - low_B, slope_high_B - slope_low_B

    def _value(self, delta_B: Tensor) -> tuple[Tensor, Tensor]:
        y_BV = self._at(delta_B)
        top_B1 = y_BV.amax(-1, keepdim=True)
        torch.exp(y_BV.sub_(top_B1), out=self.b_BV)
        sum_B = dot(self.b_BV, self.gap_BV, self.a_BV)
        rest_B = off_peak_(self.b_BV)
        return top_B1.squeeze(-1) + torch.log1p(rest_B), sum_B / (1 + rest_B)


class FlatCurve(Curve):
    """The same K where it is so flat that differences of its values are rounding: near-identical policies.

    With w = q at 1/2 and x = gap, exp(K(delta) - K(0)) = 1 + sum w (e^(delta x) - 1), and the mean of x under w is 0
    by construction of the gap. Leaving out exactly that zero leaves sums whose terms share a sign or an order of
    magnitude, so that float32 gives them to 1e-6 of their own size however small they are.
    """

    def __init__(self, pair: Pair, rows_B: Tensor | None) -> None:
        super().__init__(pair, rows_B)
        self.half_BV = self._take("half", pair.half_BV, rows_B)
        self.wide = any_row(self.spread_B > _WIDE)
        self.ends_B = self._rise(0.5, None)[0]

    def _tilt(self, delta_B: Tensor, name: str) -> Tensor:
        """w (e^(delta x) - 1), in the buffer of that name."""
        y_BV = torch.mul(self.gap_BV, delta_B.float()[:, None], out=self._buffer(name))
        if not self.wide:
            return y_BV.expm1_().mul_(self.half_BV)
        log_top_B1 = self.half_BV.amax(-1, keepdim=True).log()
        direct_BV = (self.mid_BV + log_top_B1).add_(y_BV).exp_().sub_(self.half_BV)
        tilt_BV = torch.expm1(y_BV).mul_(self.half_BV)
        return torch.where(y_BV.abs() < _WIDE, tilt_BV, direct_BV, out=y_BV)

    def slope(self, delta_B: Tensor) -> tuple[Tensor, Tensor]:
        tilt_BV = self._tilt(delta_B, "a")
        total_B = 1 + tilt_BV.sum(-1).double()
        mean_B = dot(tilt_BV, self.gap_BV, self.b_BV) / total_B
        square_B = dot(tilt_BV.add_(self.half_BV).mul_(self.gap_BV), self.gap_BV, self.b_BV) / total_B
        return mean_B, square_B - mean_B**2

    def rise(self, half: float, shift_B: Tensor) -> tuple[Tensor, Tensor]:
        rise_B, high_BV, low_BV = self._rise(half, shift_B)
        total_high_B, total_low_B = 1 + high_BV.sum(-1).double(), 1 + low_BV.sum(-1).double()
        slope_high_B = dot(high_BV, self.gap_BV, self.a_BV) / total_high_B
        slope_low_B = dot(low_BV, self.gap_BV, self.a_BV) / total_low_B
        slope_B = slope_high_B - slope_low_B
        over_B = ~(total_high_B + total_low_B).isfinite()
        if self.wide and any_row(over_B):
            log_rise_B, log_slope_B = super().rise(half, shift_B)
            rise_B, slope_B = torch.where(over_B, log_rise_B, rise_B), torch.where(over_B, log_slope_B, slope_B)
        return rise_B, slope_B

    def _rise(self, half: float, shift_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """K(half - shift) - K(-half - shift), and w (e^(delta x) - 1) at the two; no shift is 0."""
        # The sum of w (e^((half-shift) x) - e^((-half-shift) x) - 2 half x), its last term being the zero that is left
        # out. Where x is small the three nearly cancel: there it is 2w (sinh y - y + sinh y (e^(-shift x) - 1)).
        y_BV = torch.mul(self.gap_BV, half, out=self._buffer("y"))
        small_BV = _sinh_excess(y_BV, self._buffer("small"), self.a_BV)
        if shift_B is None:
            shift_B = torch.zeros_like(self.spread_B)
        else:
            torch.mul(self.gap_BV, -shift_B.float()[:, None], out=self.a_BV).expm1_()
            small_BV.addcmul_(self.a_BV, torch.add(small_BV, y_BV, out=self.b_BV))
        small_BV.mul_(2).mul_(self.half_BV)
        high_BV, low_BV = self._tilt(half - shift_B, "high"), self._tilt(-half - shift_B, "low")
        torch.sub(high_BV, low_BV, out=self.a_BV).sub_(y_BV.mul_(self.half_BV), alpha=2)
        near_BV = torch.abs(self.gap_BV, out=self.b_BV) < 1
        difference_B = torch.where(near_BV, small_BV, self.a_BV, out=y_BV).sum(-1).double()
        total_high_B, total_low_B = 1 + high_BV.sum(-1).double(), 1 + low_BV.sum(-1).double()
        ratio_B = difference_B / total_low_B
        rise_B = torch.where(ratio_B > -0.5, torch.log1p(ratio_B), (total_high_B / total_low_B).log())
        return rise_B, high_BV, low_BV


def _sinh_excess(y_BV: Tensor, out_BV: Tensor, scratch_BV: Tensor) -> Tensor:
    """sinh y - y by its series, for |y| < 1."""
    square_BV = torch.mul(y_BV, y_BV, out=scratch_BV)
    torch.mul(square_BV, 1 / 72, out=out_BV).add_(1)
    for divisor in (42, 20):
        out_BV.mul_(square_BV).mul_(1 / divisor).add_(1)
    return out_BV.mul_(square_BV).mul_(y_BV).mul_(1 / 6)
