"""The log-partition function K of the geometric mixture of two policies, evaluated without loss of digits.

On the shared support S (tokens finite on both sides) let

    mid = (z_theta + z_t) / 2,   gap = z_t - z_theta - m,   K(delta) = log sum_S exp(mid + delta * gap)

with m the mean of z_t - z_theta under q at alpha = 1/2. delta = alpha - 1/2 is -1/2 at the student and 1/2 at the
teacher. K' and K'' are the mean and variance of the gap under q. log(pi_t / pi_theta) = gap - shift with
shift = K(1/2) - K(-1/2) when both supports are S. A token outside S has mid = -inf, so its weight is 0.

Shape suffixes: B rows, V vocabulary. Logarithms are natural. [B, V] tensors are float32. [B] tensors are float64,
because they are differences of nearly equal numbers.
"""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

# Finite gaps are clamped to this: their cubes stay finite, and a larger gap gives weight 0 for any delta above 1e-4.
_MAX_GAP = 1e6
_WIDE = 50.0  # above this e^(3/2 gap) may overflow, although its product with the weight is small


def blind(values: Tensor) -> bool:
    """Return True if control flow must not depend on these values, because a CUDA graph is being captured.

    Outside a capture, reading a value costs a synchronisation of about 20 microseconds and saves a dozen passes
    over [B, V].
    """
    return values.is_cuda and torch.cuda.is_current_stream_capturing()


def any_row(mask_B: Tensor) -> bool:
    """Return True if any row is set, or if the mask must not be read (see `blind`)."""
    return blind(mask_B) or bool(mask_B.any())


class _Workspace(threading.local):
    """Named [B, V] buffers that one thread reuses between calls.

    On the CPU, touching fresh pages costs more than the arithmetic. A later request for the same name returns the same
    memory, so a buffer must not be used after the call that requested it.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def __call__(self, name: str, like_BV: Tensor, rows: int | None = None) -> Tensor:
        shape = (like_BV.shape[0] if rows is None else rows, like_BV.shape[1])
        if like_BV.is_cuda:  # the CUDA allocator already reuses memory, separately for each stream
            return torch.empty(shape, device=like_BV.device)
        size = shape[0] * shape[1]
        if name not in self.kept or self.kept[name].numel() < size:
            with torch.inference_mode(False):  # a tensor made in inference mode cannot be written outside it
                self.kept[name] = torch.empty(size)
        return self.kept[name][:size].view(shape)


workspace = _Workspace()


def dot(a_BV: Tensor, b_BV: Tensor, scratch_BV: Tensor) -> Tensor:
    """Return the row sums of a * b, float64 [B]. Overwrites the scratch buffer."""
    return torch.mul(a_BV, b_BV, out=scratch_BV).sum(-1).double()


def off_peak_(e_BV: Tensor) -> Tensor:
    """Return the row sums of e = exp(y - max y) minus 1, float64 [B]. Sets the peak of each row of e to 0.

    The peak (exactly 1) is removed with frac() and the rest is summed separately. So log1p of the result is 1e-12,
    not 0, when the sum is 1 + 1e-12.
    """
    total_B = e_BV.sum(-1).double()
    rest_B = e_BV.frac_().sum(-1).double()
    return rest_B + ((total_B - rest_B).round() - 1)


def log_sum_exp_(y_BV: Tensor, scratch_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Return (log sum exp y, sum exp(y - max) - 1) per row, float64 [B]. NaN for a row with NaN or +inf, or all -inf.

    Subtracts the row maximum from y in place. The scratch buffer becomes exp(y) with the peak set to 0.
    """
    top_B1 = y_BV.amax(-1, keepdim=True)
    rest_B = off_peak_(torch.exp(y_BV.sub_(top_B1), out=scratch_BV))
    return top_B1.squeeze(-1).double() + torch.log1p(rest_B), rest_B


@dataclass(frozen=True)
class Pair:
    """Two tempered policies on one vocabulary, with the quantities that the solver and the mixture need.

    Built by `pair_up`. The buffers may be reused after alpha is known.

    theta_BV, teacher_BV: the logits, float32, possibly the caller's own storage.
    mid_BV, gap_BV: defined in the module docstring; mid is shifted to a maximum of 0.
    half_BV: q at alpha = 1/2.
    at_theta_B, at_teacher_B: K(-1/2) and K(1/2).
    on_theta_B, on_teacher_B: log pi_theta(S) and log pi_t(S), 0 when S is the full support of that policy.
    lse_theta_B, lse_teacher_B: log sum exp of the logits over the full support of each policy.
    rest_B: the larger of the two off-peak masses. spread_B: an upper bound of |gap| on S.
    lost_theta_B, lost_teacher_B: True where this policy reaches tokens outside S. empty_B: True where S is empty.
    bad_side_B: int8, 1 where the student's row is not a distribution (NaN, +inf, all -inf), 2 the teacher's, 3 both.
    finite: True if every logit is known to be finite.
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


def pair_up(logits_theta_BV: Tensor, logits_teacher_BV: Tensor) -> Pair:
    """Build the Pair of two tempered [B, V] logits or log-probabilities of any float dtype.

    The result uses the workspace of this thread, so the next call overwrites it. Raises ValueError unless both inputs
    have one shape [B, V].
    """
    if logits_theta_BV.ndim != 2 or logits_theta_BV.shape != logits_teacher_BV.shape:
        raise ValueError(
            f"student logits {tuple(logits_theta_BV.shape)} and teacher logits {tuple(logits_teacher_BV.shape)} must "
            f"have the same shape [B, V]; cut both to the shared vocabulary"
        )
    theta_BV, teacher_BV = as_float("theta", logits_theta_BV), as_float("teacher", logits_teacher_BV)
    mid_BV, gap_BV, half_BV, a_BV, b_BV = (workspace(name, theta_BV) for name in ("mid", "gap", "half", "a", "b"))

    torch.sub(teacher_BV, theta_BV, out=gap_BV)
    if any_row(~((gap_BV.amin(-1) >= -_MAX_GAP) & (gap_BV.amax(-1) <= _MAX_GAP))):
        theta_BV, teacher_BV = _mask_unreachable(theta_BV), _mask_unreachable(teacher_BV)
        torch.sub(teacher_BV, theta_BV, out=gap_BV)
    torch.mul(theta_BV, 0.5, out=mid_BV).add_(teacher_BV, alpha=0.5)
    top_B1 = mid_BV.amax(-1, keepdim=True)
    torch.softmax(mid_BV.sub_(top_B1), -1, out=half_BV)
    low_B, high_B, lost_theta_B, lost_teacher_B, finite = _tame(gap_BV)
    m_B = torch.zeros_like(low_B, dtype=torch.float64)
    for _ in range(2):  # one pass leaves a mean of 1e-7 of m, which may exceed the gap itself
        shift_B = dot(half_BV, gap_BV, a_BV).float()
        gap_BV.sub_(shift_B[:, None])
        m_B += shift_B

    # Evaluate both ends from mid and gap instead of the logits: only their difference matters, and shared rounding
    # errors cancel in it.
    at_theta_B, rest_theta_B = log_sum_exp_(torch.add(mid_BV, gap_BV, alpha=-0.5, out=a_BV), b_BV)
    at_teacher_B, rest_teacher_B = log_sum_exp_(torch.add(mid_BV, gap_BV, alpha=0.5, out=a_BV), b_BV)
    top_B = top_B1.squeeze(-1).double()
    lse_theta_B, lse_teacher_B = top_B - m_B / 2 + at_theta_B, top_B + m_B / 2 + at_teacher_B
    on_theta_B = on_teacher_B = torch.zeros_like(m_B)
    empty_B, bad_side_B = torch.zeros_like(lost_theta_B), torch.zeros_like(lost_theta_B, dtype=torch.int8)
    if any_row(lost_theta_B | lost_teacher_B | ~(at_theta_B + at_teacher_B).isfinite()):
        empty_B = top_B == -torch.inf
        # The maximum of a row is finite exactly when the row is a distribution.
        bad_theta_B, bad_teacher_B = (~z_BV.amax(-1).isfinite() for z_BV in (theta_BV, teacher_BV))
        bad_side_B = bad_theta_B.to(torch.int8) + 2 * bad_teacher_B.to(torch.int8)
        lse_theta_B, on_theta_B = _full_support(theta_BV, teacher_BV, lse_theta_B, empty_B)
        lse_teacher_B, on_teacher_B = _full_support(teacher_BV, theta_BV, lse_teacher_B, empty_B)
    rest_B = torch.maximum(rest_theta_B / (1 + rest_theta_B), rest_teacher_B / (1 + rest_teacher_B))
    spread_B = torch.maximum(high_B - m_B, m_B - low_B)
    return Pair(
        theta_BV, teacher_BV, mid_BV, gap_BV, half_BV, at_theta_B, at_teacher_B, on_theta_B, on_teacher_B,
        lse_theta_B, lse_teacher_B, rest_B, spread_B, lost_theta_B, lost_teacher_B, empty_B, bad_side_B, finite,
    )  # fmt: skip


def as_float(name: str, z_BV: Tensor) -> Tensor:
    """Return z itself if it is float32, else a float32 copy in the workspace."""
    return z_BV if z_BV.dtype == torch.float32 else workspace(name, z_BV).copy_(z_BV)


def _mask_unreachable(z_BV: Tensor) -> Tensor:
    """Replace large finite masks (-1e9, finfo.min) by -inf: the probability of those tokens is 0 in any format."""
    return z_BV.masked_fill(z_BV < z_BV.amax(-1, keepdim=True) - _MAX_GAP, -torch.inf)


def _tame(gap_BV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """Make z_t - z_theta finite in place. Outside S its weight is 0, so any finite number may stand there.

    Returns (row minima, row maxima, rows that had -inf, rows that had +inf, True if no value had to be changed).
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
    """Return (log sum exp z, log pi(S)) given lse_shared = log sum_S exp z, for a z that may reach tokens outside S."""
    lse_B = torch.logsumexp(z_BV, -1).double()
    off_B = (torch.logsumexp(z_BV.masked_fill(other_BV > -torch.inf, -torch.inf), -1) - lse_B).exp()
    # Sum a small mass outside S directly: as a difference of two log sums it would be rounding noise.
    log_on_B = torch.where(off_B < 0.5, torch.log1p(-off_B), lse_shared_B - lse_B)
    return torch.where(empty_B, lse_B, lse_shared_B - log_on_B), log_on_B


class Curve:
    """K for a subset of the rows of a Pair. In this class [B] counts those rows."""

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
        """Return K' and K'' at delta: the mean and variance of the gap under q."""
        torch.softmax(self._at(delta_B), -1, out=self.b_BV)
        mean_B = dot(self.b_BV, self.gap_BV, self.a_BV)
        square_B = self.a_BV.mul_(self.gap_BV).sum(-1).double()
        return mean_B, square_B - mean_B**2

    def rise(self, half: float, shift_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return K(half - shift) - K(-half - shift), and the same difference of K'."""
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
    """K for near-identical policies, where differences of `Curve` values would be rounding noise.

    With w = q at 1/2 and x = gap, exp(K(delta) - K(0)) = 1 + sum w (e^(delta x) - 1). The mean of x under w is 0 by
    construction of the gap. Omitting that zero term leaves sums whose terms share a sign or an order of magnitude, so
    float32 computes them to a relative error of 1e-6, however small they are.
    """

    def __init__(self, pair: Pair, rows_B: Tensor | None) -> None:
        super().__init__(pair, rows_B)
        self.half_BV = self._take("half", pair.half_BV, rows_B)
        self.wide = any_row(self.spread_B > _WIDE)
        self.ends_B = self._rise(0.5, None)[0]

    def _tilt(self, delta_B: Tensor, name: str) -> Tensor:
        """Return w (e^(delta x) - 1) in the buffer of that name."""
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
        """Return K(half - shift) - K(-half - shift), and w (e^(delta x) - 1) at both ends. None is a shift of 0."""
        # Sum w (e^((half-shift) x) - e^((-half-shift) x) - 2 half x). The last term is the omitted zero. Where x is
        # small the three terms nearly cancel, so there use 2w (sinh y - y + sinh y (e^(-shift x) - 1)).
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
    """Return sinh y - y by its series, for |y| < 1."""
    square_BV = torch.mul(y_BV, y_BV, out=scratch_BV)
    torch.mul(square_BV, 1 / 72, out=out_BV).add_(1)
    for divisor in (42, 20):
        out_BV.mul_(square_BV).mul_(1 / divisor).add_(1)
    return out_BV.mul_(square_BV).mul_(y_BV).mul_(1 / 6)
