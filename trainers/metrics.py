"""Metrics of one batch of completions, reduced over its tokens and over all processes.

`osd/alpha/...`  the teacher's weight: mean, std, min and max over tokens
`osd/q/...`      of the mixture, means over tokens: KL(q*‖π_θ) and KL(q*‖π_t) in nats, entropy in nats, and
                 ess_ratio = ESS(π_θ)/ESS(π_t), which is 1 where both policies are equally well covered by q*
`osd/engine/...` seconds of sync, and of sampling as far as training waited for it; cached share of each side's prompt tokens;
                 version of the student's weights; staleness, the mean age of tokens in optimizer updates; with
                 num_speculative_tokens: draft_acceptance, the share of verified drafts that were accepted, and tokens_per_cycle
`osd/loss/clipped`    share of tokens whose divergence was above kl_clip
`osd/loss/topk_rest`  with top-k supervision: the teacher's probability of all ids but the k, mean over tokens
`osd/importance/...`  of the weights as used: mean_weight; ess, the effective sample size (Σw)² / Σw² as a share of the tokens;
             truncated, the share of tokens at importance_clip. The means over the passes of a step.
`osd/schedule/...`, `osd/privilege/...`  see osd.train.alpha_schedule and osd.train.privilege_gap
`osd/completions/failed`  completions since the last log that ended in an error; they are masked out of the loss and of the rest

The log has the mean of each metric over the batches since the last log, except for those in `OVER_BATCHES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch

from osd.core import TOKEN_ORIGINS
from osd.generation import GeneratedBatch, OSDGeneration

if TYPE_CHECKING:
    from osd.engine.engine import PairCompletion

_last = itemgetter(-1)
# Whole numbers in the log, and how the batches since the last log make one.
WHOLE: dict[str, Callable[[list[float]], float]] = {
    "num_tokens": _last,
    "osd/engine/weights_version": _last,
    "osd/completions/failed": sum,
    "completions/min_length": min,
    "completions/max_length": max,
    "completions/min_terminated_length": lambda lengths: min(filter(None, lengths), default=0),  # TRL's 0: none ended
    "completions/max_terminated_length": max,
}
OVER_BATCHES: dict[str, Callable[[list[float]], float]] = {**WHOLE, "osd/alpha/min": min, "osd/alpha/max": max}
_MEANS = ("kl_theta", "kl_teacher", "entropy_q", "ess_ratio")
_CACHE = ("teacher_prompt_tokens", "teacher_cached_tokens", "student_prompt_tokens", "student_cached_tokens")


def batch_metrics(generation: OSDGeneration, accelerator: Any) -> dict[str, float]:
    """Return metrics of the last batch; a collective operation. NaN if no token was sampled without error."""
    batch = generation.last_batch
    assert batch is not None, "called after generate()"
    totals = _totals(batch)
    names = list(totals)
    gathered_PK = accelerator.gather(torch.tensor([list(totals.values())], dtype=torch.float64, device=accelerator.device))
    of = {name: gathered_PK[:, k] for k, name in enumerate(names)}
    tokens = of["tokens"].sum().item()
    mean = {name: _ratio(of[name].sum().item(), tokens) for name in ("alpha", "alpha_squared", *_MEANS)}
    variance = mean["alpha_squared"] - mean["alpha"] ** 2
    return {
        "osd/alpha/mean": mean["alpha"],
        "osd/alpha/std": max(variance, 0.0) ** 0.5 if tokens else float("nan"),
        "osd/alpha/min": of["alpha_min"].min().item() if tokens else float("nan"),
        "osd/alpha/max": of["alpha_max"].max().item() if tokens else float("nan"),
        "osd/q/kl_student": mean["kl_theta"],
        "osd/q/kl_teacher": mean["kl_teacher"],
        "osd/q/entropy": mean["entropy_q"],
        "osd/q/ess_ratio": mean["ess_ratio"],
        "osd/engine/sync_seconds": of["sync_seconds"].max().item(),
        "osd/engine/generate_seconds": of["seconds"].max().item(),
        "osd/engine/teacher_cache_hit": _ratio(*(of[f"teacher_{k}_tokens"].sum().item() for k in ("cached", "prompt"))),
        "osd/engine/student_cache_hit": _ratio(*(of[f"student_{k}_tokens"].sum().item() for k in ("cached", "prompt"))),
        "osd/engine/weights_version": of["weights_version"].min().item(),
        "osd/engine/staleness": _ratio(of["staleness"].sum().item(), tokens),
        "osd/completions/failed": of["failed"].sum().item(),
        **({"osd/loss/topk_rest": _ratio(of["topk_rest"].sum().item(), tokens)} if generation.topk else {}),
        **_draft_metrics(*(of[name].sum().item() for name in TOKEN_ORIGINS)),
    }


def _draft_metrics(drawn: float, accepted: float, corrected: float, bonus: float) -> dict[str, float]:
    """Return metrics of speculation from how the tokens came to be; none if no draft was verified."""
    if not accepted + corrected:
        return {}
    return {
        "osd/engine/draft_acceptance": accepted / (accepted + corrected),
        "osd/engine/tokens_per_cycle": (drawn + accepted + corrected + bonus) / (drawn + corrected + bonus),
    }


def end_metrics(completions: list[PairCompletion], accelerator: Any) -> dict[str, float]:
    """Return TRL's metrics of completion ends from the engine's finish reasons; a collective operation.

    TRL compares the last token with the ids that end a completion. It counts a completion that a stop string ended as cut.
    """
    ends_B2 = torch.tensor([[len(c.token_ids), c.finish_reason == "length"] for c in completions], device=accelerator.device)
    length_P, is_cut_P = accelerator.gather(ends_B2).unbind(-1)
    whole = length_P[is_cut_P == 0].float()
    whole = whole if len(whole) else torch.zeros(1)
    return {
        "completions/clipped_ratio": is_cut_P.float().mean().item(),
        "completions/mean_terminated_length": whole.mean().item(),
        "completions/min_terminated_length": whole.min().item(),
        "completions/max_terminated_length": whole.max().item(),
    }


def take_reduced(metrics: dict[str, list[float]]) -> dict[str, Any]:
    """Remove the metrics in `OVER_BATCHES` from the lists that TRL averages, and return their values for the log.

    A value is None if no batch has one. Those in `WHOLE` are of type int.
    """
    known = {name: [v for v in metrics.pop(name) if not math.isnan(v)] for name in OVER_BATCHES if name in metrics}
    values = {name: OVER_BATCHES[name](of_batch) if of_batch else None for name, of_batch in known.items()}
    return {name: int(value) if name in WHOLE and value is not None else value for name, value in values.items()}


def loss_metrics(sums: dict[str, torch.Tensor], accelerator: Any) -> dict[str, float]:
    """Return metrics of one pass from its sums over tokens, all optional except `tokens`; a collective operation."""
    if set(sums) <= {"tokens"}:
        return {}  # on every process: none may wait in a collective operation
    sums_K = torch.stack([value.detach().double().to(accelerator.device) for value in sums.values()])
    of = dict(zip(sums, accelerator.gather(sums_K[None]).sum(0).tolist(), strict=True))
    tokens = of["tokens"]
    metrics = {}
    if "clipped" in of:
        metrics["osd/loss/clipped"] = _ratio(of["clipped"], tokens)
    if "weight" in of:
        metrics["osd/importance/mean_weight"] = _ratio(of["weight"], tokens)
        metrics["osd/importance/ess"] = _ratio(of["weight"] ** 2, of["weight_squared"] * tokens)
        metrics["osd/importance/truncated"] = _ratio(of["truncated"], tokens)
    return metrics


def _totals(batch: GeneratedBatch) -> dict[str, float]:
    """Return this process's sums and its extremes of α. The keys do not depend on the batch."""
    aged = zip(batch.completions, batch.staleness_T, strict=True)
    kept = [(c.record, age_T) for c, age_T in aged if not c.error and c.record is not None]
    good = [record for record, _ in kept]
    # [N] over the tokens of all completions; float64, since these are sums of many.
    token_N = {
        name: torch.cat([getattr(r, name) for r in good]).double() if good else torch.empty(0, dtype=torch.float64)
        for name in ("alpha", "kl_theta", "kl_teacher", "entropy_q", "ess_theta", "ess_teacher")
    }
    token_N["ess_ratio"] = token_N["ess_theta"] / token_N["ess_teacher"]
    alpha_N = token_N["alpha"]
    rest_N = [record.teacher_topk_TX[:, -1].double().exp() for record in good if record.teacher_topk_TX is not None]
    origins = [record.origin_T for record in good if record.origin_T is not None]
    counts = torch.cat(origins).bincount(minlength=len(TOKEN_ORIGINS)) if origins else torch.zeros(len(TOKEN_ORIGINS))
    return {
        "tokens": float(len(alpha_N)),
        "alpha": alpha_N.sum().item(),
        "alpha_squared": alpha_N.square().sum().item(),
        "alpha_min": alpha_N.min().item() if len(alpha_N) else float("inf"),
        "alpha_max": alpha_N.max().item() if len(alpha_N) else float("-inf"),
        **{name: token_N[name].sum().item() for name in _MEANS},
        **{name: float(sum(getattr(c, name) for c in batch.completions)) for name in _CACHE},
        "topk_rest": float(sum(rest.sum() for rest in rest_N)),
        "staleness": float(sum(age_T.sum() for _, age_T in kept)),
        "failed": float(sum(c.error is not None for c in batch.completions)),
        "sync_seconds": batch.sync_seconds,
        "seconds": batch.seconds,
        "weights_version": float(batch.weights_version),
        **dict(zip(TOKEN_ORIGINS, counts.double().tolist(), strict=True)),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
