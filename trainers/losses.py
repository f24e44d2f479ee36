"""Recorded supervision: the divergence between the student and the teacher distribution that sampling computed.

Shape suffixes: B completions, T completion tokens (padded), V vocabulary shared by both models, V_own the rows of one
model's `lm_head`, H hidden size of the model in question (teacher and student may differ).

To draw y_n from q* the engine already computed π_t(· | teacher's prompt, y_<n), so no second teacher runs here. The record
kept the teacher's final hidden state h_t; its distribution is softmax(head_t(h_t) / temperature), and the loss is TRL's
generalised Jensen-Shannon divergence (`beta`: 0 forward KL(π_t‖π_θ), 1 reverse KL(π_θ‖π_t)), averaged over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.distillation_trainer import _chunked_divergence_loss


@dataclass(frozen=True, kw_only=True)
class Head:
    """How one model turns a final hidden state into logits.

    Attributes:
        weight_VH: the `lm_head` weight, by reference.
        bias_V: its bias, or None.
        scale: multiplier of the logits (Cohere, Granite, Falcon-H1, ...), applied before the soft cap.
        softcap: `softcap * tanh(logits / softcap)` (Gemma), or None.
    """

    weight_VH: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None


def head_of(weight_VH: Tensor, bias_V: Tensor | None, config: Any) -> Head:
    """The head of a model with this (transformers) configuration."""
    text = config.get_text_config()
    return Head(
        weight_VH=weight_VH,
        bias_V=bias_V,
        scale=logit_scale(text),
        softcap=getattr(text, "final_logit_softcapping", None),
    )


def logit_scale(text_config: Any) -> float:
    """The multiplier that an architecture applies to its logits, under whichever name its config has for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(text_config, name, None)
        if scale is not None:
            return scale
    scaling = getattr(text_config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite and MiniCPM3 divide by the number of that name; HyperCLOVA X multiplies by it.
    return scaling if text_config.model_type == "hyperclovax" else 1 / scaling


def on_shared_vocabulary(student: Head, teacher: Head) -> tuple[Head, Head]:
    """Both heads cut to the ids that both models have.

    One tokenizer is padded to different vocabulary sizes (Qwen2.5: 151,936 or 152,064); the ids past the shorter one
    belong to no token. The engine mixes over the same ids.

    Raises:
        ValueError: the student's head would have to be cut while DeepSpeed ZeRO-3 keeps it in shards.
    """
    shared = min(_rows(student.weight_VH), _rows(teacher.weight_VH))
    if hasattr(student.weight_VH, "ds_shape") and _rows(student.weight_VH) != shared:
        raise ValueError(
            f"the student's lm_head has {_rows(student.weight_VH)} rows and the teacher's {shared}; under DeepSpeed ZeRO-3 "
            "the larger one cannot be the student's. Resize the student's embeddings, or train without ZeRO-3"
        )
    return _cut(student, shared), _cut(teacher, shared)


def _rows(weight_VH: Tensor) -> int:
    # ZeRO-3 leaves a placeholder of no elements and keeps the real shape beside it.
    return getattr(weight_VH, "ds_shape", weight_VH.shape)[0]


def _cut(head: Head, rows: int) -> Head:
    if _rows(head.weight_VH) == rows:
        return head
    bias_V = None if head.bias_V is None else head.bias_V[:rows]
    return Head(weight_VH=head.weight_VH[:rows], bias_V=bias_V, scale=head.scale, softcap=head.softcap)


def recorded_divergence(
    student_hidden_BTH: Tensor,
    teacher_hidden_BTH: Tensor,
    student: Head,
    teacher: Head,
    loss_mask_BT: Tensor,
    *,
    beta: float,
    temperature: float,
    num_items_in_batch: Tensor | int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's chunked divergence against the recorded teacher; full logits are never materialised.

    Args:
        student_hidden_BTH, teacher_hidden_BTH: final hidden states, aligned to the completion's tokens.
        loss_mask_BT: 1 where a token is trained on.
        beta: 0 forward KL, 1 reverse KL, between them the generalised JSD.
        temperature: divides both models' logits.
        num_items_in_batch: the loss is the sum divided by it; None divides by the number of unmasked tokens.

    Returns:
        the loss (nats per token, differentiable in the student), the summed entropy of the student over unmasked tokens
        (nats), and how many tokens are unmasked.
    """
    student, teacher = on_shared_vocabulary(student, teacher)
    return _chunked_divergence_loss(
        student_hidden_BTH,
        teacher_hidden_BTH.to(student_hidden_BTH.device),
        student.weight_VH,
        teacher.weight_VH,
        loss_mask_BT,
        beta,
        num_items_in_batch=num_items_in_batch,
        student_lm_head_bias=student.bias_V,
        teacher_lm_head_bias=teacher.bias_V,
        student_logit_scale=student.scale,
        teacher_logit_scale=teacher.scale,
        student_final_logit_softcapping=student.softcap,
        teacher_final_logit_softcapping=teacher.softcap,
        temperature=temperature,
    )


def pad_hidden(hidden_TH: Sequence[Tensor | None], length: int, device: torch.device) -> Tensor:
    """Stack the recorded hidden states of a batch, right-padded with zeros to `length` tokens, `[B, length, H]`.

    None (a completion that ended in an error) becomes zeros too: masking a NaN in the loss would not keep it out of the
    gradient, where it would be multiplied by zero.

    Raises:
        RuntimeError: no completion of the batch has a record.
    """
    kept = next((h for h in hidden_TH if h is not None), None)
    if kept is None:
        raise RuntimeError("every completion of the batch ended in an error; there is nothing to train on")
    padded_BTH = torch.zeros(len(hidden_TH), length, kept.size(-1), dtype=kept.dtype, device=device)
    for row, h in zip(padded_BTH, hidden_TH, strict=True):
        if h is not None:
            row[: h.size(0)] = h
    return padded_BTH
