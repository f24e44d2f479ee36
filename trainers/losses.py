"""Supervision: the divergence between the student and the teacher distribution, over the tokens of a batch.

Shape suffixes: B completions, T completion tokens (padded), N unmasked tokens, H hidden size of the model in question, X
numbers that give the teacher at a token.

To draw y_n from q* the engine has computed π_t(· | teacher's prompt, y_<n), so no second teacher runs here. The record has the
teacher's final hidden state h_t, and its distribution is softmax(head_t(h_t) / temperature); or its largest log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from osd.train.divergence import Divergence, token_divergence
from osd.train.lm_head import Head, TopK, gathered, on_shared_vocabulary


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
    teacher_BTX: Tensor,
    student: Head,
    teacher: Head | TopK,
    loss_mask_BT: Tensor,
    *,
    of: Divergence,
    weight_BT: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> BatchLoss:
    """Sum and divide the (weighted) divergence of every unmasked token; full logits are never materialised.

    Args:
        student_hidden_BTH: final hidden states, aligned to the completion's tokens.
        teacher_BTX: the teacher's hidden states, or its top-k rows (`osd.engine.topk`), as ``teacher`` says.
        loss_mask_BT: not 0 where a token is trained on.
        of: the divergence, its temperature and its clip.
        weight_BT: importance weights (osd.train.importance); they multiply the divergence after it was clipped.
        num_items_in_batch: the loss is the sum divided by it; None divides by the number of unmasked tokens. Weights do not
            enter the divisor.
    """
    student = gathered(student, student_hidden_BTH.dtype)
    if isinstance(teacher, Head):
        teacher = gathered(teacher, teacher_BTX.dtype)
    student, teacher = on_shared_vocabulary(student, teacher)
    kept_BT = loss_mask_BT.to(student_hidden_BTH.device) != 0
    teacher_NX = teacher_BTX.to(student_hidden_BTH.device)[kept_BT]
    divergence_N, entropy_N = token_divergence(student_hidden_BTH[kept_BT], teacher_NX, student, teacher, of)
    tokens, clipped = kept_BT.sum(), torch.zeros_like(kept_BT.sum())
    if of.clip is not None:
        clipped = (divergence_N > of.clip).sum()
        divergence_N = divergence_N.clamp(max=of.clip)
    if weight_BT is not None:
        divergence_N = divergence_N * weight_BT[kept_BT]
    divisor = tokens if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=tokens.device)
    loss = divergence_N.sum() / divisor.clamp(min=1)  # a batch without a token is a finite zero, not 0 / 0
    return BatchLoss(loss, entropy_N.sum().detach(), tokens, clipped)


def pad_rows(rows_TX: Sequence[Tensor | None], length: int, like_X: Tensor, device: torch.device) -> Tensor:
    """Stack the recorded rows of every completion to `[B, length, X]`, right-padded with zeros, in the dtype of `like_X`.

    None (a completion that ended in an error) becomes zeros too. A NaN that is masked in the loss would still reach the
    gradient: 0 × NaN is NaN.
    """
    padded_BTX = torch.zeros(len(rows_TX), length, like_X.size(-1), dtype=like_X.dtype, device=device)
    for row, recorded in zip(padded_BTX, rows_TX, strict=True):
        if recorded is not None:
            row[: recorded.size(0)].copy_(recorded, non_blocking=True)
    return padded_BTX


def pad_column(column_T: Sequence[Tensor | None], length: int, device: torch.device) -> Tensor:
    """Stack one column of the record of every completion (None: in error), right-padded with zeros, `[B, length]` float32."""
    padded_BT = torch.zeros(len(column_T), length, device=device)
    for row, column in zip(padded_BT, column_T, strict=True):
        if column is not None:
            row[: len(column)] = column
    return padded_BT
