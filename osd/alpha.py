"""Solver for alpha, the teacher's weight in q ∝ pi_theta^(1-alpha) pi_t^alpha, for a batch of token positions.

Every condition is a condition on the convex function K of osd.log_partition. Shape suffixes: B rows, V vocabulary.
Logarithms are natural.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from osd.core import MixingConfig
from osd.log_partition import Curve, FlatCurve, Pair, blind, dot, log_sum_exp_, pair_up, workspace

# Float32 leaves an error of about 1e-7 of the off-peak mass in K(1/2) - K(-1/2). Where the variance of the gap is
# below this multiple of that mass, alpha would be off by more than 1e-5, and FlatCurve takes over.
_FLAT = 0.04
# FlatCurve computes masses relative to q at 1/2 as 1 + sum. That sum cancels when the Chernoff information is above this.
_FAR = 1.0
# Below this spread the third-order expansion about 1/2 is the solution, to 2e-5.
_SETTLED = 0.25
_MAX_STEPS = 50
_BLIND_STEPS = 16  # number of steps while convergence must not be tested

Condition = Callable[[Curve, Tensor], tuple[Tensor, Tensor]]


def _kl_symmetry(curve: Curve, alpha_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return E_q[log pi_t / pi_theta] = KL(q||pi_theta) - KL(q||pi_t), and its derivative, the variance."""
    mean_B, variance_B = curve.slope(alpha_B - 0.5)
    return mean_B - curve.ends_B - curve.lost_B, variance_B


def _ess_balance(curve: Curve, alpha_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return log sum_S pi_theta^2/q - log sum_S pi_t^2/q, and its derivative.

    With A(u) = log sum_S pi_theta (pi_t/pi_theta)^u the two terms are A(-alpha) and A(2-alpha) plus the same log Z. A is
    convex, so the difference increases: its derivative is A'(2-alpha) - A'(-alpha) >= 0, and the root is unique. If a
    policy reaches tokens that the other does not, its sum over the whole vocabulary is infinite for every alpha.
    Therefore both sums run over S, the tokens that q can sample.
    """
    rise_B, slope_B = curve.rise(1.0, alpha_B - 0.5)
    return 2 * (curve.ends_B + curve.lost_B) - rise_B, slope_B


def _reverse_kl_symmetry(curve: Curve) -> Tensor:
    """Return alpha = KL(t||theta) / (KL(theta||t) + KL(t||theta)) of the policies conditioned on S, 1/2 for 0/0.

    D(theta||q) = alpha KL(theta||t) + log Z and D(t||q) = (1-alpha) KL(t||theta) + log Z: log Z cancels. On S the
    two divergences are K'(1/2) - rise and rise - K'(-1/2), with rise = K(1/2) - K(-1/2).
    """
    half_B = torch.full_like(curve.ends_B, 0.5)
    to_theta_B = curve.slope(half_B)[0] - curve.ends_B
    to_teacher_B = curve.ends_B - curve.slope(-half_B)[0]
    return _share(to_theta_B.clamp(min=0), to_teacher_B.clamp(min=0))


def _share(a_B: Tensor, b_B: Tensor) -> Tensor:
    """Return a / (a + b), 1/2 for 0/0."""
    return torch.where(a_B + b_B > 0, a_B / (a_B + b_B), 0.5)


def _root(condition: Condition, curve: Curve, guess_B: Tensor, config: MixingConfig, steps: int) -> Tensor:
    """Find the zero of an increasing function of alpha by safeguarded Newton, float64 [B].

    A zero beyond a bound gives the bound. A step that leaves the bracket, or that does not halve the previous step,
    is replaced by a bisection. A step beyond a bound that was not evaluated yet evaluates that bound. Stops when every
    row is known to about 1e-5, or after `steps`.
    """
    low, high = config.alpha_min, config.alpha_max
    # A bracket end outside the bounds marks a bound that was not evaluated yet.
    left_B, right_B = torch.full_like(guess_B, low - 1), torch.full_like(guess_B, high + 1)
    alpha_B, last_B = guess_B.clamp(low, high), torch.full_like(guess_B, torch.inf)
    done_B = torch.zeros_like(guess_B, dtype=torch.bool)
    for _ in range(steps):
        value_B, slope_B = condition(curve, alpha_B)
        left_B = torch.where(value_B <= 0, alpha_B, left_B)
        right_B = torch.where(value_B >= 0, alpha_B, right_B)
        newton_B = torch.where(value_B == 0, alpha_B, alpha_B - value_B / slope_B)
        step_B = (newton_B - alpha_B).abs()
        trial_B = ((newton_B <= low) & (left_B < low)) | ((newton_B >= high) & (right_B > high))
        inside_B = (newton_B >= left_B) & (newton_B <= right_B) & (step_B <= last_B / 2)
        next_B = torch.where(inside_B | trial_B, newton_B, (left_B.clamp(min=low) + right_B.clamp(max=high)) / 2)
        # Freeze converged rows: at the root, rounding would trigger bisections.
        next_B = torch.where(done_B, alpha_B, next_B.clamp(low, high))
        last_B = (next_B - alpha_B).abs()
        # After a Newton step of h the error is about h * (h * spread) / 2 as long as h * spread is small.
        done_B |= inside_B & (step_B**2 * curve.spread_B < 1e-5) & (step_B * curve.spread_B < 0.1)
        done_B |= (last_B < 5e-6) | (left_B >= high) | (right_B <= low)
        alpha_B = next_B
        if not blind(done_B) and bool(done_B.all()):
            break
    return alpha_B


def _midpoint(pair: Pair) -> tuple[Tensor, Tensor]:
    """Return the second and third central moments of the gap under q at 1/2."""
    product_BV = torch.mul(pair.half_BV, pair.gap_BV, out=workspace("a", pair.gap_BV)).mul_(pair.gap_BV)
    second_B = product_BV.sum(-1).double()
    return second_B, product_BV.mul_(pair.gap_BV).sum(-1).double()


def _solve_curve(pair: Pair, config: MixingConfig, steps: int | None) -> Tensor:
    second_B, third_B = _midpoint(pair)
    skew_B = torch.where(second_B > 0, third_B / second_B, 0.0)
    far_B = (pair.at_theta_B + pair.at_teacher_B) / 2 + pair.half_BV.amax(-1).log()
    # The further the other tokens are below the peak, the larger the rounding of their exponents.
    flat_B = (second_B < _FLAT * pair.rest_B * (1 - pair.rest_B.log() / 8)) & (far_B < _FAR)
    balance = config.alpha_method == "ess_balance"
    # Third-order expansion of K about the middle: exact to first order in the gap.
    guess_B = 0.5 + (skew_B / (8 if balance else 24)).clamp(-0.4, 0.4)

    def solve(curve: Curve, start_B: Tensor) -> Tensor:
        if config.alpha_method == "reverse_kl_symmetry":
            return _reverse_kl_symmetry(curve)
        limit = steps or (_BLIND_STEPS if blind(start_B) else _MAX_STEPS)
        return _root(_ess_balance if balance else _kl_symmetry, curve, start_B, config, limit)

    if blind(guess_B):
        return torch.where(flat_B, solve(FlatCurve(pair, None), guess_B), solve(Curve(pair, None), guess_B))
    live_B = ~pair.empty_B & (pair.bad_side_B == 0)
    if config.alpha_method == "kl_symmetry":  # the expansion's error is below spread^3 / 1000
        live_B &= ~(flat_B & (pair.spread_B < _SETTLED) & ~(pair.lost_theta_B | pair.lost_teacher_B))
    for kind, mask_B in ((Curve, live_B & ~flat_B), (FlatCurve, live_B & flat_B)):
        if mask_B.all():
            return solve(kind(pair, None), guess_B)
        if mask_B.any():
            rows = mask_B.nonzero().squeeze(1)
            guess_B[rows] = solve(kind(pair, rows), guess_B[rows])
    return guess_B


def entropy(z_BV: Tensor) -> Tensor:
    """Return the entropy of softmax(z) in nats, float64 [B]. Relative error 1e-6, even if one token has all the mass."""
    y_BV, scratch_BV = workspace("a", z_BV).copy_(z_BV), workspace("b", z_BV)
    rest_B = log_sum_exp_(y_BV, scratch_BV)[1]
    # Clamp: 0 * -inf would be NaN, and exp(-1e4) is already 0.
    return torch.log1p(rest_B) - dot(scratch_BV, y_BV.clamp_(min=-1e4), y_BV) / (1 + rest_B)


def solve_pair(pair: Pair, config: MixingConfig, *, steps: int | None = None) -> Tensor:
    """Solve for alpha as in `solve_alpha`, given a Pair."""
    low, high = config.alpha_min, config.alpha_max
    if config.alpha_method == "fixed" or low == high:
        alpha = config.fixed_alpha if config.alpha_method == "fixed" else low
        alpha_B = torch.full_like(pair.rest_B, alpha)
    elif config.alpha_method == "entropy":
        alpha_B = _share(entropy(pair.theta_BV), entropy(pair.teacher_BV))
    else:
        alpha_B = torch.where(pair.empty_B, low, _solve_curve(pair, config, steps))
    return alpha_B.clamp(low, high).masked_fill(pair.bad_side_B > 0, torch.nan).float()


@torch.no_grad()
def solve_alpha(
    logits_theta_BV: Tensor, logits_teacher_BV: Tensor, config: MixingConfig, *, steps: int | None = None
) -> Tensor:
    """Solve for the teacher's weight of each row, by config.alpha_method, within [alpha_min, alpha_max]: float32 [B].

    Takes tempered logits or log-probabilities [B, V] of any float dtype and modifies neither. `steps` limits the
    iterations (default: until converged; a fixed number while a CUDA graph is captured).

    Equations, with S the tokens finite on both sides:
      kl_symmetry          E_q[log pi_t/pi_theta] = 0, both policies normalised over their own support; alpha minimises
                           log sum_S pi_theta^(1-alpha) pi_t^alpha over the bounds (the Chernoff point)
      ess_balance          sum_S pi_theta^2/q = sum_S pi_t^2/q
      reverse_kl_symmetry  KL(pi_theta||q) = KL(pi_t||q), both conditioned on S
      entropy              H(pi_theta) / (H(pi_theta) + H(pi_t)), 1/2 when both are 0
      fixed                fixed_alpha
    Identical policies give 1/2. With an empty S the first three methods give alpha_min. A root beyond a bound gives the
    bound. A row with NaN or +inf, or all -inf, on either side gives NaN and affects no other row.

    Raises ValueError unless both inputs have one shape [B, V].
    """
    return solve_pair(pair_up(logits_theta_BV, logits_teacher_BV), config, steps=steps)
