"""Output layers: from a final hidden state to logits, over the vocabulary that both models share.

Shape suffixes: V vocabulary shared by both models (before they are cut: the rows of one model's `lm_head`), H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, kw_only=True)
class Head:
    """The output layer of one model: from a final hidden state to logits.

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


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Replacement for the teacher's `Head` when the teacher is given by its top-k rows (`osd.engine.topk`).

    Attributes:
        vocab_size: the number of ids that they are of, which both models share.
    """

    vocab_size: int


def head_of(weight_VH: Tensor, bias_V: Tensor | None, config: Any) -> Head:
    """Make the head of a model with this (transformers) configuration."""
    text = config.get_text_config()
    return Head(
        weight_VH=weight_VH,
        bias_V=bias_V,
        scale=logit_scale(text),
        softcap=getattr(text, "final_logit_softcapping", None),
    )


def logit_scale(text_config: Any) -> float:
    """Return the factor on an architecture's logits; configurations have several names for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(text_config, name, None)
        if scale is not None:
            return scale
    scaling = getattr(text_config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite and MiniCPM3 divide by the number of that name; HyperCLOVA X multiplies by it.
    return scaling if text_config.model_type == "hyperclovax" else 1 / scaling


def on_shared_vocabulary(student: Head, teacher: Head | TopK) -> tuple[Head, Head | TopK]:
    """Cut both heads to the ids that both models have.

    One tokenizer may be padded to different vocabulary sizes (Qwen2.5: 151,936 or 152,064). The ids past the shorter one
    belong to no token. The engine mixes over the same ids.

    Raises:
        ValueError: a head would have to be cut while DeepSpeed ZeRO-3 keeps it in shards.
    """
    heads = [("student", student), ("teacher", teacher)] if isinstance(teacher, Head) else [("student", student)]
    shared = min(_rows(student), _rows(teacher))
    for side, head in heads:
        if hasattr(head.weight_VH, "ds_shape") and _rows(head) != shared:
            raise ValueError(
                f"the {side}'s lm_head has {_rows(head)} rows, and both models share {shared}; under DeepSpeed "
                f"ZeRO-3 the larger one cannot be the {side}'s. Resize its embeddings, or train without ZeRO-3"
            )
    return first_rows(student, shared), first_rows(teacher, shared) if isinstance(teacher, Head) else teacher


def _rows(head: Head | TopK) -> int:
    if isinstance(head, TopK):
        return head.vocab_size
    # ZeRO-3 leaves a placeholder of no elements and keeps the real shape beside it.
    return getattr(head.weight_VH, "ds_shape", head.weight_VH.shape)[0]


def first_rows(head: Head, rows: int) -> Head:
    """Cut a head to the first ids of its vocabulary."""
    if _rows(head) == rows:
        return head
    bias_V = None if head.bias_V is None else head.bias_V[:rows]
    return replace(head, weight_VH=head.weight_VH[:rows], bias_V=bias_V)


def gathered(head: Head, dtype: torch.dtype) -> Head:
    """Return the head with plain tensors if FSDP2 keeps it in shards: gathered once for all chunks of the loss."""
    if not isinstance(head.weight_VH, DTensor):
        return head
    bias_V = head.bias_V.full_tensor() if isinstance(head.bias_V, DTensor) else head.bias_V
    return replace(head, weight_VH=head.weight_VH.full_tensor().to(dtype), bias_V=bias_V)
