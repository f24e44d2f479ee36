"""The divergence of each token between teacher and student, from hidden states, in chunks: no [N, V] tensor is kept.

Shape suffixes: N tokens, C tokens of a chunk, V vocabulary shared by both models, H hidden size of the model in question, X
numbers that give the teacher at a token (its hidden state, or a top-k row), O outcomes that are compared. With p the teacher's
and q the student's next-token distribution, both softmax(logits / temperature) (no factor temperature², as in TRL):

    "jsd"              TRL's generalised Jensen-Shannon divergence: β KL(p‖m) + (1-β) KL(q‖m) with m = β p + (1-β) q;
                       at its ends β = 0 the forward KL(p‖q), and β = 1 the reverse KL(q‖p)
    "skew_kl"          KL(p ‖ s p + (1-s) q), the skew KL of DistiLLM (arXiv:2402.03898); at most log 1/s
    "skew_reverse_kl"  KL(q ‖ s q + (1-s) p), its skew reverse KL

The outcomes are the ids of the vocabulary. Of a teacher given by its k largest log-probabilities they are these k ids and "any
other id", with both models' probability of each: a lower bound, because merging outcomes never increases a divergence. It falls
short by the weight of the merged outcome times the divergence inside it: p' and q' are both distributions given an id outside
the k, P and Q their masses there, and for KL(p‖q) the gap is P KL(p'‖q'). docs/distillation.md has the other gaps and those of
the gradient.
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

from osd.engine.topk import ids_and_logprobs
from osd.train.lm_head import Head, TopK

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
    student_hidden_NH: Tensor, teacher_NX: Tensor, student: Head, teacher: Head | TopK, of: Divergence
) -> tuple[Tensor, Tensor]:
    """Return the unclipped divergence [N], differentiable in the student, and the student's entropy [N]; both in nats.

    Args:
        teacher_NX: hidden states, or top-k rows at `of.temperature`, as ``teacher`` says.
    """
    if isinstance(teacher, TopK) or of.kind != "jsd":
        return _ChunkedDivergence.apply(student_hidden_NH, student.weight_VH, student.bias_V, teacher_NX, student, teacher, of)
    # Under ZeRO-3 TRL's function reads the DeepSpeed status of every weight. The engine's own head has none.
    _say_whole(teacher.weight_VH, teacher.bias_V)
    return ChunkedDivergenceFunction.apply(
        student_hidden_NH,
        student.weight_VH,
        student.bias_V,
        teacher_NX,
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


def _divergence(q_CO: Tensor, p_CO: Tensor, of: Divergence) -> Tensor:
    """Return the divergence of log-probabilities, student and teacher, [C]."""
    if of.kind == "skew_kl":
        return _kl(p_CO, _mixed(p_CO, q_CO, of.skew))
    if of.kind == "skew_reverse_kl":
        return _kl(q_CO, _mixed(q_CO, p_CO, of.skew))
    if of.beta in (0, 1):
        return _kl(q_CO, p_CO) if of.beta else _kl(p_CO, q_CO)
    mixed_CO = _mixed(p_CO, q_CO, of.beta)
    return of.beta * _kl(p_CO, mixed_CO) + (1 - of.beta) * _kl(q_CO, mixed_CO)


def _kl(first_CO: Tensor, second_CO: Tensor) -> Tensor:
    return (first_CO.exp() * (first_CO - second_CO)).sum(-1)


def _mixed(first_CO: Tensor, second_CO: Tensor, share: float) -> Tensor:
    return torch.logaddexp(first_CO + math.log(share), second_CO + math.log1p(-share))


def _outcomes(theta_CV: Tensor, row_CX: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of student and teacher over the ids of a top-k row and the rest, [C, O]."""
    id_Ck, teacher_CO = ids_and_logprobs(row_CX)
    if id_Ck.shape[1] == theta_CV.shape[1]:  # there is no rest, whose log-probability is minus infinity
        return theta_CV.gather(-1, id_Ck), _finite(teacher_CO[:, :-1], theta_CV.dtype)
    rest_C1 = theta_CV.scatter(-1, id_Ck, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([theta_CV.gather(-1, id_Ck), rest_C1], -1), _finite(teacher_CO, theta_CV.dtype)


def _finite(logp_CO: Tensor, dtype: torch.dtype) -> Tensor:
    return logp_CO.clamp(min=torch.finfo(logp_CO.dtype).min).to(dtype)  # exp gives the same zero, and 0 * -inf would be NaN


class _ChunkedDivergence(torch.autograd.Function):
    """A divergence by chunks, which are projected twice, in forward and backward; their logits are not kept.

    Gradients are summed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        teacher_NX: Tensor,
        student: Head,
        teacher: Head | TopK,
        of: Divergence,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, teacher_NX)
        ctx.student, ctx.teacher, ctx.of = student, teacher, of
        ctx.dtypes = _compute_dtype(hidden_NH), _compute_dtype(teacher_NX)
        divergence_N = hidden_NH.new_zeros(len(hidden_NH), dtype=_at_least_float32(hidden_NH.dtype))
        entropy_N = torch.zeros_like(divergence_N)
        with _gathered(weight_VH, bias_V, *_tensors(teacher)), _no_autocast(hidden_NH):
            for rows in _chunks(hidden_NH, weight_VH):
                theta_CV = _logp(_project(hidden_NH[rows], weight_VH, ctx.dtypes[0]), bias_V, student, of.temperature)
                divergence_N[rows] = _divergence(*_compared(theta_CV, teacher_NX[rows], teacher, of, ctx.dtypes[1]), of)
                entropy_N[rows] = -(theta_CV.exp() * theta_CV).sum(-1)
        ctx.mark_non_differentiable(entropy_N)
        return divergence_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_NH, weight_VH, bias_V, teacher_NX = ctx.saved_tensors
        given = (hidden_NH, weight_VH, bias_V)
        with _gathered(weight_VH, bias_V, *_tensors(ctx.teacher)), _no_autocast(hidden_NH):
            grads = [
                torch.zeros(x.shape, dtype=_at_least_float32(x.dtype), device=x.device) if needed else None
                for x, needed in zip(given, ctx.needs_input_grad, strict=False)
            ]
            for rows in _chunks(hidden_NH, weight_VH):
                logits_CV = _project(hidden_NH[rows], weight_VH, ctx.dtypes[0]).requires_grad_()
                with torch.enable_grad():
                    theta_CV = _logp(logits_CV, bias_V, ctx.student, ctx.of.temperature)
                    compared = _compared(theta_CV, teacher_NX[rows], ctx.teacher, ctx.of, ctx.dtypes[1])
                    divergence_C = _divergence(*compared, ctx.of)
                [grad_CV] = torch.autograd.grad(divergence_C, logits_CV, grad_N[rows])
                if grads[0] is not None:
                    _add_product(grads[0][rows], grad_CV, weight_VH, ctx.dtypes[0])
                if grads[1] is not None:
                    _add_product(grads[1], grad_CV.t(), hidden_NH[rows], ctx.dtypes[0])
                if grads[2] is not None:
                    grads[2] += grad_CV.sum(0)
        return (*(None if g is None else g.to(x.dtype) for g, x in zip(grads, given, strict=True)), *(None,) * 4)


def _compared(
    theta_CV: Tensor, teacher_CX: Tensor, teacher: Head | TopK, of: Divergence, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of student and teacher over the same outcomes, [C, O]."""
    if isinstance(teacher, TopK):
        return _outcomes(theta_CV, teacher_CX)
    with torch.no_grad():
        return theta_CV, _logp(_project(teacher_CX, teacher.weight_VH, dtype), teacher.bias_V, teacher, of.temperature)


def _tensors(teacher: Head | TopK) -> tuple[Tensor | None, ...]:
    return () if isinstance(teacher, TopK) else (teacher.weight_VH, teacher.bias_V)


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
