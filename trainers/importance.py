"""Importance weights: from completions drawn from q to expectations under π_θ.

Shape suffixes: B completions, T completion tokens (padded). All logarithms are natural.

On-policy distillation minimises J = E_{y~π_θ}[Σ_t D_t], where D_t = D(π_t(·|s_t), π_θ(·|s_t)) is over the whole
vocabulary, a function of the state s_t = (prompt, y_<t) alone, and no gradient goes through the sampling of y. Tokens are
drawn from q instead, with the recorded probability q(y_t|s_t) *after* top-k, penalties and the like (`logp_draw`, not
`logq`). With the ratios ρ_t = π_θ(y_t|s_t) / q(y_t|s_t), where π_θ is tempered as it was in sampling:

    "prefix"    w_t = Π_{s<t} ρ_s     E_q[Σ_t w_t D_t] = J and the same of its gradient: exactly unbiased. The token
                                      y_t itself does not enter, since D_t and whether there is a t-th token depend on y_<t.
    "sequence"  w_t = Π_{s≤L} ρ_s     one weight per completion of length L: unbiased too, for any function of y, because
                                      E_q[ρ_t…ρ_L | y_<t] = 1; that factor only adds variance to the prefix weight.
    "token"     w_t = ρ_{t-1}, w_1=1  only the last step into s_t is corrected: biased towards q from the third token on,
                                      with a variance that does not grow with t.
    "none"      w_t = 1               the mean over the states that q visits: biased, no variance.

Policy gradients need the ratio of the token itself, w_t = ρ_t. It has no use here: E_q[ρ_t | s_t] = 1, so for any loss over
the whole vocabulary it has the expectation of "none" and only adds noise.

Two things bias the exact weights: a clip (w_t = min(clip, ·) lowers the weight of states that π_θ prefers), and top-k, top-p
or min-p (no weight can replace tokens that q never draws). The loss divides by the number of tokens drawn, not by the sum of
the weights: J is estimated up to the mean length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CORRECTIONS = ("none", "token", "prefix", "sequence")


def importance_weights(
    logp_theta_BT: Tensor, logp_draw_BT: Tensor, mask_BT: Tensor, *, correction: str, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Return the weight of every token, [B, T] float32 without gradient, and whether it was clipped, [B, T] bool.

    Args:
        logp_theta_BT: log π_θ(y_t|s_t).
        logp_draw_BT: the log-probability with which y_t was drawn.
        mask_BT: not 0 where there is a token, padded on the right; weights elsewhere have no meaning.
        correction: one of CORRECTIONS.
        clip: the largest weight; None: no limit.
    """
    # Sums over many tokens: float64.
    log_ratio_BT = (logp_theta_BT.detach().double() - logp_draw_BT.double()).masked_fill(mask_BT == 0, 0.0)
    if correction == "none":
        log_weight_BT = torch.zeros_like(log_ratio_BT)
    elif correction == "token":
        log_weight_BT = torch.nn.functional.pad(log_ratio_BT[:, :-1], (1, 0))
    elif correction == "prefix":
        log_weight_BT = log_ratio_BT.cumsum(1) - log_ratio_BT
    else:
        log_weight_BT = log_ratio_BT.sum(1, keepdim=True).expand_as(log_ratio_BT)
    log_clip = math.inf if clip is None else math.log(clip)
    return log_weight_BT.clamp(max=log_clip).exp().float(), log_weight_BT > log_clip
