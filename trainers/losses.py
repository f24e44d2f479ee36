"""Supervision: the divergence between the student and the teacher distribution, over the tokens of a batch.

Shape suffixes: B completions, T completion tokens (padded), N unmasked tokens, H hidden size of the model in question.

To draw y_n from q* the engine has computed π_t(· | teacher's prompt, y_<n), so no second teacher runs here. The record has the
teacher's final hidden state h_t; its distribution is softmax(head_t(h_t) / temperature).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from osd.train.divergence import Divergence, token_divergence
from osd.train.lm_head import Head, gathered, on_shared_vocabulary


class BatchLoss(NamedTuple):
    """Loss of a batch in nats per token, differentiable in the student, and sums over unmasked tokens without gradient.

    entropy: of the student, in nats. tokens: their number. clipped: the number above the divergence's clip.
    """

    loss: Tensor
    entropy: Tensor
    tokens: Tensor
    clipped: Tensor


def batch_loss(
    student_hidden_BTH: Tensor,
    teacher_hidden_BTH: Tensor,
    student: Head,
    teacher: Head,
    loss_mask_BT: Tensor,
    *,
    of: Divergence,
    weight_BT: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> BatchLoss:
    """Sum and divide the (weighted) divergence of every unmasked token; full logits are never materialised.

    Args:
        student_hidden_BTH, teacher_hidden_BTH: final hidden states, aligned to the completion's tokens.
        loss_mask_BT: not 0 where a token is trained on.
        of: the divergence, its temperature and its clip.
        weight_BT: importance weights (osd.train.importance); they multiply the divergence after it was clipped.
        num_items_in_batch: the loss is the sum divided by it; None divides by the number of unmasked tokens. Weights do not
            enter the divisor.
    """
    student, teacher = gathered(student, student_hidden_BTH.dtype), gathered(teacher, teacher_hidden_BTH.dtype)
    student, teacher = on_shared_vocabulary(student, teacher)
    kept_BT = loss_mask_BT.to(student_hidden_BTH.device) != 0
    teacher_hidden_NH = teacher_hidden_BTH.to(student_hidden_BTH.device)[kept_BT]
    divergence_N, entropy_N = token_divergence(student_hidden_BTH[kept_BT], teacher_hidden_NH, student, teacher, of)
    tokens, clipped = kept_BT.sum(), torch.zeros_like(kept_BT.sum())
    if of.clip is not None:
        clipped = (divergence_N > of.clip).sum()
        divergence_N = divergence_N.clamp(max=of.clip)
    if weight_BT is not None:
        divergence_N = divergence_N * weight_BT[kept_BT]
    divisor = tokens if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=tokens.device)
    loss = divergence_N.sum() / divisor.clamp(min=1)  # a batch without a token is a finite zero, not 0 / 0
    return BatchLoss(loss, entropy_N.sum().detach(), tokens, clipped)


def pad_hidden(hidden_TH: Sequence[Tensor | None], length: int, weight_VH: Tensor, device: torch.device) -> Tensor:
    """Stack recorded hidden states to `[B, length, H]`, right-padded with zeros, in the dtype of their layer `weight_VH`.

    None (a completion that ended in an error) becomes zeros too. A NaN that is masked in the loss would still reach the
    gradient: 0 × NaN is NaN.
    """
    padded_BTH = torch.zeros(len(hidden_TH), length, weight_VH.size(1), dtype=weight_VH.dtype, device=device)
    for row, h in zip(padded_BTH, hidden_TH, strict=True):
        if h is not None:
            row[: h.size(0)].copy_(h, non_blocking=True)
    return padded_BTH


def pad_column(column_T: Sequence[Tensor | None], length: int, device: torch.device) -> Tensor:
    """Stack one column of the record of every completion (None: in error), right-padded with zeros, `[B, length]` float32."""
    padded_BT = torch.zeros(len(column_T), length, device=device)
    for row, column in zip(padded_BT, column_T, strict=True):
        if column is not None:
            row[: len(column)] = column
    return padded_BT
