"""Float64 reference for the engine tests: logits of transformers, alpha by bisection. Shares no code with osd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

# N tokens, V vocabulary, T tokens of one completion.


def completion_logits(model: torch.nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """Return the logits that predict each completion token, float64 [T, V]."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    return logits.double()


def reference(path: Path, **options: Any) -> torch.nn.Module:
    """Load a transformers model in float32, independent of the checkpoint's dtype; ``options`` of ``from_pretrained``."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()


def log_probabilities(
    models: Sequence[torch.nn.Module], prompts: Sequence[Any], completions: Sequence[Any], temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log π_θ and log π_t at every sampled position, float64 [N, V]; models are (teacher, student)."""
    teacher, student = models
    rows = [
        (
            completion_logits(student, p.student_token_ids, c.token_ids),
            completion_logits(teacher, p.teacher_token_ids, c.token_ids),
        )
        for p, c in zip(prompts, completions, strict=True)
    ]
    theta, teacher = (torch.cat(side).div(temperature).log_softmax(-1) for side in zip(*rows, strict=True))
    return theta, teacher


def record_columns(
    ls: torch.Tensor, lt: torch.Tensor, alpha: torch.Tensor, logq: torch.Tensor, tokens: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Return every column of the record by its definition, float64 [N].

    Args:
        ls, lt, logq: log π_θ, log π_t and log q* [N, V].
        alpha: [N, 1].
        tokens: what was drawn, from q* itself.
    """
    token = torch.tensor(tokens)[:, None]
    return {
        "alpha": alpha[:, 0],
        "logq": logq.gather(-1, token)[:, 0],
        "logp_theta": ls.gather(-1, token)[:, 0],
        "logp_teacher": lt.gather(-1, token)[:, 0],
        "kl_theta": (logq.exp() * (logq - ls)).sum(-1),
        "kl_teacher": (logq.exp() * (logq - lt)).sum(-1),
        "entropy_q": -(logq.exp() * logq).sum(-1),
        "ess_theta": 1 / (2 * ls - logq).exp().sum(-1),
        "ess_teacher": 1 / (2 * lt - logq).exp().sum(-1),
        "logp_draw": logq.gather(-1, token)[:, 0],
    }


def mixture(logp_theta: torch.Tensor, logp_teacher: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Return log q* of normalised float64 log-probabilities [N, V] and α [N, 1]."""
    return ((1 - alpha) * logp_theta + alpha * logp_teacher).log_softmax(-1)


def bisect(condition: Callable[[torch.Tensor], torch.Tensor], rows: int) -> torch.Tensor:
    """Return the root of an increasing condition, clamped to [0, 1]: α [rows, 1] float64."""
    low, high = torch.zeros(rows, 1, dtype=torch.float64), torch.ones(rows, 1, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        below = condition(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def solve(method: str, ls: torch.Tensor, lt: torch.Tensor) -> torch.Tensor:
    """Return α [N, 1] by the definition of the method, from log-probabilities [N, V]."""

    def q(alpha: torch.Tensor) -> torch.Tensor:
        return mixture(ls, lt, alpha)

    def kl(p: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return (p.exp() * (p - r)).sum(-1, keepdim=True)

    conditions = {
        "kl_symmetry": lambda a: kl(q(a), ls) - kl(q(a), lt),
        "ess_balance": lambda a: (2 * ls - q(a)).logsumexp(-1, True) - (2 * lt - q(a)).logsumexp(-1, True),
        "reverse_kl_symmetry": lambda a: kl(ls, q(a)) - kl(lt, q(a)),
    }
    if method == "entropy":
        h_theta, h_teacher = (-(p.exp() * p).sum(-1, keepdim=True) for p in (ls, lt))
        return h_theta / (h_theta + h_teacher)
    return bisect(conditions[method], len(ls))


def pit_chi_square(
    logq: torch.Tensor, tokens: Sequence[int], order_by: torch.Tensor, *, bins: int = 64, seed: int = 0
) -> float:
    """Return the chi-square of the randomised probability integral transform of draws under log q* [N, V].

    Each draw y becomes F(y-) + U·q(y), where F cumulates over the ids in the order of ``order_by`` [N, V]. This value is
    uniform on [0, 1] in every context if y was drawn from q*. The power is highest for an order along which an error
    shifts mass. The statistic has ``bins - 1`` degrees of freedom.
    """
    u = integral_transform(logq, tokens, order_by, seed=seed)
    counts = np.histogram(u.numpy(), bins=bins, range=(0, 1))[0]
    return float(stats.chisquare(counts).statistic)


def integral_transform(logq: torch.Tensor, tokens: Sequence[int], order_by: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """Return the randomised probability integral transform of draws, in [0, 1), float64 [N]; see `pit_chi_square`."""
    order = order_by.argsort(-1)
    q = logq.exp().gather(-1, order)
    before = q.cumsum(-1) - q
    place = (order == torch.tensor(tokens)[:, None]).double().argmax(-1, keepdim=True)
    uniform = torch.rand(len(q), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (before.gather(-1, place) + uniform * q.gather(-1, place))[:, 0].clamp(0, 1 - 1e-12)


def q_star(
    models: Sequence[torch.nn.Module],
    prompts: Sequence[Sequence[int]],
    completion: Sequence[int],
    temperature: float = 1.0,
    vocab: int | None = None,
) -> torch.Tensor:
    """log q* before each completion token by KL symmetry, float64 [T, V]; models and prompts are (teacher, student)."""
    lt, ls = (
        (completion_logits(model, prompt, completion)[:, :vocab] / temperature).log_softmax(-1)
        for model, prompt in zip(models, prompts, strict=True)
    )
    return mixture(ls, lt, solve("kl_symmetry", ls, lt))


def penalised(
    logq: torch.Tensor,
    prompt: Sequence[int],
    completion: Sequence[int],
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> torch.Tensor:
    """Penalties as vLLM defines them on logits, applied to log q* [T, V]: the repetition penalty counts the prompt too."""
    out, counts = logq.clone(), torch.zeros(logq.shape[-1], dtype=torch.float64)
    seen = torch.zeros(logq.shape[-1], dtype=torch.bool)
    seen[list(prompt)] = True
    for row, token in enumerate(completion):
        out[row] = torch.where(seen, torch.where(out[row] > 0, out[row] / repetition, out[row] * repetition), out[row])
        out[row] -= frequency * counts + presence * (counts > 0)
        counts[token] += 1
        seen[token] = True
    return out


def not_greedy(logq: torch.Tensor, tokens: Sequence[int], tie: float = 1e-4) -> list[float]:
    """Gaps in log q* [T, V] to the most likely token, of tokens that are not it; ties in float32 are left out."""
    gaps = logq.amax(-1) - logq.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return gaps[gaps > tie].tolist()
