"""The divergence of each token between teacher and student, from hidden states, in chunks: no [N, V] tensor is kept.

Shape suffixes: N tokens, V vocabulary shared by both models, H hidden size of the model in question. With p the teacher's
and q the student's next-token distribution, both softmax(logits / temperature) (no factor temperature², as in TRL):

    "jsd"              TRL's generalised Jensen-Shannon divergence: β KL(p‖m) + (1-β) KL(q‖m) with m = β p + (1-β) q;
                       at its ends β = 0 the forward KL(p‖q), and β = 1 the reverse KL(q‖p)
    "skew_kl"          KL(p ‖ s p + (1-s) q), the skew KL of DistiLLM (arXiv:2402.03898); at most log 1/s
    "skew_reverse_kl"  KL(q ‖ s q + (1-s) p), its skew reverse KL
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from osd.train.lm_head import Head

DIVERGENCES = ("jsd", "skew_kl", "skew_reverse_kl")
_CHUNK_LOGITS = 1 << 25  # logits of one model that exist at a time; 128 MiB in float32


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The quantity that is minimised at each token.

    Attributes:
        kind: one of DIVERGENCES.
        beta: of "jsd", in [0, 1].
        skew: of the skewed ones, in (0, 1): the share of the first argument that is mixed into the second.
        temperature: divides both models' logits, > 0.
        clip: a token whose divergence is above this many nats counts as that many, and has no gradient; None: no limit.
    """

    kind: str = "jsd"
    beta: float = 1.0
    skew: float = 0.1
    temperature: float = 1.0
    clip: float | None = None


def token_divergence(
    student_hidden_NH: Tensor, teacher_hidden_NH: Tensor, student: Head, teacher: Head, of: Divergence
) -> tuple[Tensor, Tensor]:
    """Return the unclipped divergence [N], differentiable in the student, and the student's entropy [N]; both in nats."""
    if of.kind != "jsd":
        return _SkewedDivergence.apply(
            student_hidden_NH, student.weight_VH, student.bias_V, teacher_hidden_NH, student, teacher, of
        )
    # Under ZeRO-3 TRL's function reads the DeepSpeed status of every weight. The engine's own head has none.
    _say_whole(teacher.weight_VH, teacher.bias_V)
    return ChunkedDivergenceFunction.apply(
        student_hidden_NH,
        student.weight_VH,
        student.bias_V,
        teacher_hidden_NH,
        teacher.weight_VH,
        teacher.bias_V,
        of.beta,
        of.temperature,
        student.scale,
        student.softcap,
        teacher.scale,
        teacher.softcap,
    )


@torch.no_grad()
def token_logprobs(hidden_NH: Tensor, head: Head, token_N: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / temperature) at the given tokens, [N] float32."""
    logp_N = torch.empty(len(hidden_NH), device=hidden_NH.device)
    dtype = _compute_dtype(hidden_NH)
    with _gathered(head.weight_VH, head.bias_V), _no_autocast(hidden_NH):
        for rows in _chunks(hidden_NH, head.weight_VH):
            logp_CV = _logp(_project(hidden_NH[rows], head.weight_VH, dtype), head.bias_V, head, temperature)
            logp_N[rows] = logp_CV.gather(-1, token_N[rows, None])[:, 0].float()
    return logp_N


def _skewed(logp_theta_NV: Tensor, logp_teacher_NV: Tensor, of: Divergence) -> Tensor:
    pair = (logp_teacher_NV, logp_theta_NV) if of.kind == "skew_kl" else (logp_theta_NV, logp_teacher_NV)
    mixed_NV = torch.logaddexp(pair[0] + math.log(of.skew), pair[1] + math.log1p(-of.skew))
    return (pair[0].exp() * (pair[0] - mixed_NV)).sum(-1)


class _SkewedDivergence(torch.autograd.Function):
    """The skewed divergences. Chunks are projected twice, in forward and backward, and their logits are not kept.

    Gradients are summed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        teacher_hidden_NH: Tensor,
        student: Head,
        teacher: Head,
        of: Divergence,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, teacher_hidden_NH)
        ctx.student, ctx.teacher, ctx.of = student, teacher, of
        ctx.dtypes = _compute_dtype(hidden_NH), _compute_dtype(teacher_hidden_NH)
        divergence_N = hidden_NH.new_zeros(len(hidden_NH), dtype=_at_least_float32(hidden_NH.dtype))
        entropy_N = torch.zeros_like(divergence_N)
        with _gathered(weight_VH, bias_V, teacher.weight_VH, teacher.bias_V), _no_autocast(hidden_NH):
            for rows in _chunks(hidden_NH, weight_VH):
                theta_CV = _logp(_project(hidden_NH[rows], weight_VH, ctx.dtypes[0]), bias_V, student, of.temperature)
                teacher_CV = _teacher_logp(teacher_hidden_NH[rows], teacher, of, ctx.dtypes[1])
                divergence_N[rows] = _skewed(theta_CV, teacher_CV, of)
                entropy_N[rows] = -(theta_CV.exp() * theta_CV).sum(-1)
        ctx.mark_non_differentiable(entropy_N)
        return divergence_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_NH, weight_VH, bias_V, teacher_hidden_NH = ctx.saved_tensors
        given = (hidden_NH, weight_VH, bias_V)
        with _gathered(weight_VH, bias_V, ctx.teacher.weight_VH, ctx.teacher.bias_V), _no_autocast(hidden_NH):
            grads = [
                torch.zeros(x.shape, dtype=_at_least_float32(x.dtype), device=x.device) if needed else None
                for x, needed in zip(given, ctx.needs_input_grad, strict=False)
            ]
            for rows in _chunks(hidden_NH, weight_VH):
                logits_CV = _project(hidden_NH[rows], weight_VH, ctx.dtypes[0]).requires_grad_()
                teacher_CV = _teacher_logp(teacher_hidden_NH[rows], ctx.teacher, ctx.of, ctx.dtypes[1])
                with torch.enable_grad():
                    divergence_C = _skewed(_logp(logits_CV, bias_V, ctx.student, ctx.of.temperature), teacher_CV, ctx.of)
                [grad_CV] = torch.autograd.grad(divergence_C, logits_CV, grad_N[rows])
                if grads[0] is not None:
                    _add_product(grads[0][rows], grad_CV, weight_VH, ctx.dtypes[0])
                if grads[1] is not None:
                    _add_product(grads[1], grad_CV.t(), hidden_NH[rows], ctx.dtypes[0])
                if grads[2] is not None:
                    grads[2] += grad_CV.sum(0)
        return (*(None if g is None else g.to(x.dtype) for g, x in zip(grads, given, strict=True)), *(None,) * 4)


def _teacher_logp(hidden_CH: Tensor, teacher: Head, of: Divergence, dtype: torch.dtype) -> Tensor:
    return _logp(_project(hidden_CH, teacher.weight_VH, dtype), teacher.bias_V, teacher, of.temperature)


def _logp(logits_CV: Tensor, bias_V: Tensor | None, head: Head, temperature: float) -> Tensor:
    """Turn the bare projection into log-probabilities: bias, scale, soft cap, temperature."""
    logits_CV = (logits_CV if bias_V is None else logits_CV + bias_V.to(logits_CV.dtype)) * head.scale
    if head.softcap is not None:
        logits_CV = head.softcap * torch.tanh(logits_CV / head.softcap)
    return (logits_CV / temperature).log_softmax(-1)


def _chunks(hidden_NH: Tensor, weight_VH: Tensor) -> Iterator[slice]:
    size = max(1, _CHUNK_LOGITS // weight_VH.shape[0])
    return (slice(start, start + size) for start in range(0, len(hidden_NH), size))


def _project(hidden_CH: Tensor, weight_VH: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply hidden · weightᵀ with factors in `dtype` and a result in float32 or better: rounded logits would move the KL."""
    hidden_CH, weight_VH = hidden_CH.to(dtype), weight_VH.to(dtype)
    exact = _at_least_float32(dtype)
    if hidden_CH.is_cuda and dtype != exact:
        return torch.mm(hidden_CH, weight_VH.t(), out_dtype=exact)
    return hidden_CH.to(exact) @ weight_VH.to(exact).t()


def _add_product(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Add a @ b to total in place. The factors are rounded to `dtype`, the sum is not."""
    a, b = a.to(dtype), b.to(dtype)
    if a.is_cuda and dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _gathered(*tensors: Tensor | None) -> Any:
    """Return a context in which tensors that DeepSpeed ZeRO-3 keeps in shards are whole."""
    return maybe_gather_lm_head_ctx(*(x for x in tensors if hasattr(x, "ds_status")))  # type: ignore[arg-type, misc]


def _say_whole(*tensors: Tensor | None) -> None:
    """Mark plain tensors as not sharded, if DeepSpeed ZeRO-3 is on."""
    if not is_deepspeed_zero3_enabled():
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for tensor in tensors:
        if tensor is not None and not hasattr(tensor, "ds_status"):
            tensor.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]


def _no_autocast(hidden_NH: Tensor) -> Any:
    return torch.autocast(hidden_NH.device.type, enabled=False)


def _compute_dtype(hidden_NH: Tensor) -> torch.dtype:
    device = hidden_NH.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
