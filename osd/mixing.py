"""Mixture q of student and teacher from which tokens are drawn, and the columns of the per-token record.

geometric: q ∝ pi_theta^(1-alpha) pi_t^alpha on the tokens finite on both sides; linear: (1-alpha) pi_theta + alpha pi_t.
This module is the readable reference for the kernels. Shape suffixes: B rows, V vocabulary, R record columns. Logarithms
are natural.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from osd.alpha import solve_pair
from osd.core import MixingConfig
from osd.log_partition import Pair, any_row, dot, pair_up, workspace


@dataclass(frozen=True)
class Mixture:
    """Distribution q of each row and its distances from both policies. All tensors are float32 except bad_side_B.

    alpha_B: the teacher's weight. logq_BV: log q, normalised.
    lse_theta_B, lse_teacher_B: normalisers, log pi(y) = logits[y] / temperature - lse.
    kl_theta_B, kl_teacher_B: KL(q||pi_theta), KL(q||pi_t); inf where q has mass on tokens of probability 0 in the policy.
    ess_theta_B, ess_teacher_B: 1 / sum_V(pi^2 / q), in [0, 1]: the share of effective samples that remains when samples
        of q are reweighted to pi. 0 where q excludes a token with a finite logit in pi, or the sum exceeds float32.
    entropy_q_B: H(q).
    bad_side_B: int8, 0 if both rows are distributions, 1 if the student's row is not (NaN, +inf, or all -inf), 2 if the
        teacher's is not, 3 if neither is. All other values of a bad row are NaN. Other rows are not affected.
    """

    alpha_B: Tensor
    logq_BV: Tensor
    lse_theta_B: Tensor
    lse_teacher_B: Tensor
    kl_theta_B: Tensor
    kl_teacher_B: Tensor
    ess_theta_B: Tensor
    ess_teacher_B: Tensor
    entropy_q_B: Tensor
    bad_side_B: Tensor


@torch.no_grad()
def mix(
    logits_theta_BV: Tensor,
    logits_teacher_BV: Tensor,
    config: MixingConfig,
    *,
    temperature_B: Tensor | float = 1.0,
    alpha_B: Tensor | None = None,
) -> Mixture:
    """Temper both policies, choose alpha (see osd.alpha.solve_alpha), and mix.

    logits: [B, V] logits or log-probabilities, any float dtype, not modified.
    temperature_B: divides the logits of both sides. A row at 0 (greedy: its token is the argmax of q) is mixed and
        measured at temperature 1.
    alpha_B: given weights in [0, 1], not clamped to the bounds of config. NaN: choose this row's alpha by config.

    alpha = 0 gives exactly pi_theta and alpha = 1 exactly pi_t, each over its full support and with the argmax of its
    logits. For any alpha between them, if the supports share no token, the geometric q is pi_theta, so that samples
    stay on-policy.

    Raises ValueError on shapes that differ, and on a negative or non-finite temperature given as a number.
    """
    divisor = _divisor(temperature_B)
    pair = pair_up(_tempered("theta", logits_theta_BV, divisor), _tempered("teacher", logits_teacher_BV, divisor))
    alpha_B = _choose(pair, config, alpha_B)
    logq_BV, q_BV, kls = (_linear if config.mixture == "linear" else _geometric)(pair, alpha_B.double())
    bad_B = pair.bad_side_B > 0

    def finish(values_B: Tensor) -> Tensor:
        return values_B.masked_fill(bad_B, torch.nan).float()

    return Mixture(
        alpha_B=alpha_B,
        logq_BV=logq_BV,
        lse_theta_B=finish(pair.lse_theta_B),
        lse_teacher_B=finish(pair.lse_teacher_B),
        kl_theta_B=finish(kls[0]),
        kl_teacher_B=finish(kls[1]),
        ess_theta_B=finish(_ess(pair.theta_BV, pair.lse_theta_B, logq_BV, pair.finite)),
        ess_teacher_B=finish(_ess(pair.teacher_BV, pair.lse_teacher_B, logq_BV, pair.finite)),
        entropy_q_B=finish(_entropy_q(q_BV, logq_BV, pair.finite)),
        bad_side_B=pair.bad_side_B,
    )


def _divisor(temperature_B: Tensor | float) -> Tensor | float | None:
    """Return the divisor of the logits, with 1 in place of 0. Returns None if no division is needed."""
    if isinstance(temperature_B, Tensor):
        divisor_B = torch.where(temperature_B == 0, 1.0, temperature_B.float())
        nothing = not divisor_B.is_cuda and bool((divisor_B == 1).all())
        return None if nothing else divisor_B[:, None]
    if not 0 <= temperature_B < float("inf"):
        raise ValueError(f"temperature_B={temperature_B!r} must be finite and at least 0 (0 is greedy)")
    return None if temperature_B in (0, 1) else temperature_B


def _tempered(name: str, logits_BV: Tensor, divisor: Tensor | float | None) -> Tensor:
    return logits_BV if divisor is None else torch.div(logits_BV.float(), divisor, out=workspace(name, logits_BV))


def _choose(pair: Pair, config: MixingConfig, given_B: Tensor | None) -> Tensor:
    if given_B is None:
        return solve_pair(pair, config)
    if given_B.shape != pair.bad_side_B.shape:
        raise ValueError(f"alpha_B has shape {tuple(given_B.shape)}; use one weight per row, {tuple(pair.bad_side_B.shape)}")
    given_B = given_B.float()
    unset_B = given_B.isnan()
    if any_row(unset_B):
        given_B = torch.where(unset_B, solve_pair(pair, config), given_B)
    return given_B.masked_fill(pair.bad_side_B > 0, torch.nan)


def _geometric(pair: Pair, alpha_B: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return log q, q, and (KL(q||pi_theta), KL(q||pi_t)) of the geometric mixture.

    With f = E_q[log pi_t/pi_theta] the divergences are alpha f - log Z and (alpha - 1) f - log Z. log Z is K(alpha - 1/2)
    minus the line through the normalisers of the policies at -1/2 and 1/2 (K: see osd.log_partition).
    """
    logq_BV = torch.addcmul(pair.mid_BV, pair.gap_BV, (alpha_B - 0.5).float()[:, None])
    top_B1 = logq_BV.amax(-1, keepdim=True)
    q_BV = torch.exp(logq_BV.sub_(top_B1), out=pair.half_BV)  # alpha is known, so half is no longer needed
    total_B1 = q_BV.sum(-1, keepdim=True)
    logq_BV.sub_(total_B1.log())
    q_BV.div_(total_B1)
    norm_theta_B, norm_teacher_B = pair.at_theta_B - pair.on_theta_B, pair.at_teacher_B - pair.on_teacher_B
    f_B = dot(q_BV, pair.gap_BV, workspace("a", q_BV)) - (norm_teacher_B - norm_theta_B)
    log_z_B = (top_B1 + total_B1.log()).squeeze(-1) - torch.lerp(norm_theta_B, norm_teacher_B, alpha_B)
    kls = (alpha_B * f_B - log_z_B).clamp(min=0), ((alpha_B - 1) * f_B - log_z_B).clamp(min=0)
    student_B = (alpha_B == 0) | (pair.empty_B & (alpha_B < 1))
    return _pure_rows(pair, student_B, alpha_B == 1, logq_BV, q_BV, *kls)


def _pure_rows(
    pair: Pair,
    student_B: Tensor,
    teacher_B: Tensor,
    logq_BV: Tensor,
    q_BV: Tensor,
    kl_theta_B: Tensor,
    kl_teacher_B: Tensor,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Replace q by a single policy over its full support in the given rows. Returns (log q, q, both KLs)."""
    if any_row(student_B | teacher_B):
        for at_B, z_BV, lse_B in (
            (student_B, pair.theta_BV, pair.lse_theta_B),
            (teacher_B, pair.teacher_BV, pair.lse_teacher_B),
        ):
            if any_row(at_B):
                logq_BV = torch.where(at_B[:, None], _normalised(z_BV, lse_B), logq_BV)
        q_BV = torch.exp(logq_BV)
        kl_theta_B = torch.where(teacher_B & pair.lost_teacher_B, torch.inf, kl_theta_B).masked_fill(student_B, 0.0)
        kl_teacher_B = torch.where(student_B & pair.lost_theta_B, torch.inf, kl_teacher_B).masked_fill(teacher_B, 0.0)
    return logq_BV, q_BV, (kl_theta_B, kl_teacher_B)


def _normalised(z_BV: Tensor, lse_B: Tensor) -> Tensor:
    """Return z - lse with the argmax of z preserved.

    Rounding can make the maximum tie with an earlier token, and greedy decoding would then pick the earlier one.
    """
    logp_BV = z_BV - lse_B.float()[:, None]
    top_B1 = z_BV.argmax(-1, keepdim=True)
    peak_B1 = logp_BV.gather(-1, top_B1)
    return logp_BV.scatter_(-1, top_B1, torch.nextafter(peak_B1, torch.full_like(peak_B1, torch.inf)).clamp_(max=0))


def _linear(pair: Pair, alpha_B: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return log q, q, and both KLs of the linear mixture q = (1 - alpha) pi_theta + alpha pi_t."""
    weight_B1 = alpha_B.float()[:, None]
    logp_theta_BV = pair.theta_BV - pair.lse_theta_B.float()[:, None]
    logp_teacher_BV = pair.teacher_BV - pair.lse_teacher_B.float()[:, None]
    logq_BV = torch.logaddexp(logp_theta_BV + torch.log1p(-weight_B1), logp_teacher_BV + weight_B1.log())
    q_BV = torch.exp(logq_BV)

    def kl(logp_BV: Tensor) -> Tensor:
        terms_BV = torch.sub(logq_BV, logp_BV, out=logp_BV).mul_(q_BV)
        return terms_BV.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf).sum(-1).double().clamp(min=0)

    return _pure_rows(pair, alpha_B == 0, alpha_B == 1, logq_BV, q_BV, kl(logp_theta_BV), kl(logp_teacher_BV))


def _ess(z_BV: Tensor, lse_B: Tensor, logq_BV: Tensor, finite: bool) -> Tensor:
    """Return 1 / sum(pi^2 / q) with pi = exp(z - lse). A token outside both supports contributes 0."""
    terms_BV = torch.lerp(logq_BV, z_BV, 2.0, out=workspace("a", logq_BV)).sub_(2 * lse_B.float()[:, None])
    if not finite:
        terms_BV.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return 1 / terms_BV.exp_().sum(-1).clamp(min=1)


def _entropy_q(q_BV: Tensor, logq_BV: Tensor, finite: bool) -> Tensor:
    scratch_BV = workspace("a", logq_BV)
    # Clamp: 0 * -inf would be NaN, and exp(-1e4) is already 0.
    return -dot(q_BV, logq_BV if finite else torch.clamp(logq_BV, min=-1e4, out=scratch_BV), scratch_BV)


def record_rows(
    mixture: Mixture,
    logits_theta_BV: Tensor,
    logits_teacher_BV: Tensor,
    temperature_B: Tensor | float,
    token_B: Tensor,
    logp_draw_B: Tensor,
) -> Tensor:
    """Return the record of the drawn tokens [B]: float32 [B, R], columns in RECORD_FIELDS order.

    Pass the logits and temperatures that `mix` received. logp_draw_B is the log-probability with which each token was
    drawn, after top-k, top-p and penalties were applied to q.
    """
    divisor = _divisor(temperature_B)
    index_B1 = token_B.long()[:, None]

    def logp(z_BV: Tensor, lse_B: Tensor) -> Tensor:
        z_B1 = z_BV.gather(-1, index_B1).float()
        return (z_B1 if divisor is None else z_B1 / divisor).squeeze(-1) - lse_B

    columns = (
        mixture.alpha_B,
        mixture.logq_BV.gather(-1, index_B1).squeeze(-1),
        logp(logits_theta_BV, mixture.lse_theta_B),
        logp(logits_teacher_BV, mixture.lse_teacher_B),
        mixture.kl_theta_B,
        mixture.kl_teacher_B,
        mixture.entropy_q_B,
        mixture.ess_theta_B,
        mixture.ess_teacher_B,
        logp_draw_B.float(),
    )
    return torch.stack(columns, dim=-1)
