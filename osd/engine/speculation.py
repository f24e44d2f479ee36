"""Lossless speculation: the student drafts, and every kept token is distributed exactly as the target (theory, Theorem 19).

At every position the student's draft y ~ π_θ is kept with probability min(1, τ(y) / π_θ(y)), where τ is the target: q*, after
top-k and whatever else acts on it. The first draft that is refused is replaced by a token of (τ - π_θ)₊, normalised, and the
positions after it are void. The last position of a cycle is decided like the others: its draft is one that the student made and
the teacher never reads. So each kept token depends on the tokens before it and on three random numbers of its position alone.
With the same seed, completions do not depend on how cycles fall: on the number of drafts, other requests, or preemptions.

B requests, N positions of all requests, W the longest run of positions, V vocabulary. No function waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from osd.core import TOKEN_ORIGINS
from osd.engine.mixture import inverse_cdf

DRAWN, ACCEPTED, CORRECTED, BONUS = range(len(TOKEN_ORIGINS))

# One stream of random numbers each for drafting, accepting and correcting, see `osd.engine.mixture.uniform`.
DRAFT, ACCEPT, CORRECT = 0x6A09E667F3BCC908, 0x3B67AE8584CAA73B, 0x3C6EF372FE94F82B


def stream(seed_N: torch.Tensor, number: int) -> torch.Tensor:
    """Return the seeds of one of the three streams of random numbers, int64 [N]."""
    return seed_N ^ number


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The positions of a step, request by request. Tensors are int64, on the device.

    Attributes:
        request_N, place_N: the request of each position, and its place among that request's.
        first_B, drafts_B: each request's first position, and how many positions follow it (0: it has no draft to verify).
        width: W, the most positions of a request.
    """

    request_N: torch.Tensor
    place_N: torch.Tensor
    first_B: torch.Tensor
    drafts_B: torch.Tensor
    width: int

    @classmethod
    def of(cls, drafts: Sequence[int], device: torch.device) -> Layout:
        """Lay out requests with these numbers of drafts."""
        drafts_B = torch.tensor(drafts, dtype=torch.int64)
        runs_B = drafts_B + 1
        first_B = runs_B.cumsum(0) - runs_B
        request_N = torch.arange(len(drafts)).repeat_interleave(runs_B)
        place_N = torch.arange(len(request_N)) - first_B[request_N]
        tensors = dict(request_N=request_N, place_N=place_N, first_B=first_B, drafts_B=drafts_B)
        return cls(
            **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}, width=max(drafts, default=0) + 1
        )

    def grid(self, values_N: torch.Tensor) -> torch.Tensor:
        """Return values by request and place, [B, W]; zero where a request has no such position."""
        out = values_N.new_zeros(len(self.first_B), self.width)
        return out.index_put_((self.request_N, self.place_N), values_N)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The tokens of a step.

    Attributes:
        token_BW: each request's kept tokens, int64; what follows them is void.
        kept_B: how many, 1 to drafts + 1, int64.
        final_B: the position of each request's last kept token, int64.
        token_N: the draft of each position, or the token that replaced it.
        kept_N: whether a position's token is kept.
        origin_N: how a kept token came to be, an index into ``TOKEN_ORIGINS``; uint8.
    """

    token_BW: torch.Tensor
    kept_B: torch.Tensor
    final_B: torch.Tensor
    token_N: torch.Tensor
    kept_N: torch.Tensor
    origin_N: torch.Tensor


def accept(logp_target_N: torch.Tensor, logp_theta_N: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """Return whether each draft is accepted: with probability min(1, τ(y) / π_θ(y)); never where either is NaN."""
    return uniform_N < (logp_target_N.double() - logp_theta_N.double()).exp()


def residual(target_BV: torch.Tensor, theta_BV: torch.Tensor) -> torch.Tensor:
    """Return (τ - π_θ)₊ as weights, float64 [B, V], from log τ and log π_θ, which need not be normalised.

    Where both policies are equal up to rounding, returns τ: only rounding can refuse a draft there.
    """
    target_BV, theta_BV = target_BV.double().softmax(-1), theta_BV.double().softmax(-1)
    weights_BV = (target_BV - theta_BV).clamp_(min=0)
    return torch.where(weights_BV.sum(-1, keepdim=True) > 0, weights_BV, target_BV)


def verify(
    layout: Layout,
    *,
    draft_N: torch.Tensor,
    accepted_N: torch.Tensor,
    correct: Callable[[torch.Tensor], torch.Tensor],
) -> Verdict:
    """Keep each request's drafts up to the first that is refused, and replace that one.

    Args:
        layout: the positions.
        draft_N: the student's draft at every position, int64.
        accepted_N: whether it is accepted, bool.
        correct: draws the token of some positions anew; takes their indices, int64 [B], and returns ids, int64 [B].
    """
    lead_B = layout.grid(accepted_N.long()).cumprod(-1).sum(-1)  # accepted drafts before the first refused one
    kept_B = torch.minimum(lead_B, layout.drafts_B) + 1
    final_B = layout.first_B + kept_B - 1
    refused_B = lead_B <= layout.drafts_B
    token_B = torch.where(refused_B, correct(final_B), draft_N[final_B])
    token_N = draft_N.scatter(0, final_B, token_B)
    last_N, kept_N = layout.drafts_B[layout.request_N], layout.place_N < kept_B[layout.request_N]
    origin_N = torch.where(layout.place_N == kept_B[layout.request_N] - 1, CORRECTED, ACCEPTED)
    origin_N = torch.where(layout.place_N == last_N, BONUS, origin_N).masked_fill(last_N == 0, DRAWN)
    return Verdict(
        token_BW=layout.grid(token_N),
        kept_B=kept_B,
        final_B=final_B,
        token_N=token_N,
        kept_N=kept_N,
        origin_N=origin_N.to(torch.uint8),
    )


def draw_residual(
    target_BV: torch.Tensor, theta_BV: torch.Tensor | None, has_draft_B: torch.Tensor | None, uniform_B: torch.Tensor
) -> torch.Tensor:
    """Draw the token in the place of each request's refused draft, int64 [B].

    Args:
        target_BV, theta_BV: log τ and log π_θ, not normalised; no π_θ where the student has a part in no request.
        has_draft_B: False where the student has no part, and the token is drawn from τ itself; None: it has everywhere.
        uniform_B: numbers in [0, 1), float64.
    """
    weights_BV = target_BV.double().softmax(-1) if theta_BV is None else residual(target_BV, theta_BV)
    if theta_BV is not None and has_draft_B is not None:
        weights_BV = torch.where(has_draft_B[:, None], weights_BV, target_BV.double().softmax(-1))
    return inverse_cdf(weights_BV.cumsum(-1), uniform_B)


# -- how many drafts --------------------------------------------------------------------------------------------------


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Return the mean number of tokens that a cycle keeps, if each draft is accepted with this probability (Theorem 20)."""
    return sum(acceptance**n for n in range(drafts + 1))
