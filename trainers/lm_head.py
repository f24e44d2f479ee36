"""Output layers: how each model turns its final hidden state into logits, over the vocabulary that both share.

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
        ValueError: a head would have to be cut while DeepSpeed ZeRO-3 keeps it in shards.
    """
    shared = min(_rows(student.weight_VH), _rows(teacher.weight_VH))
    for side, head in (("student", student), ("teacher", teacher)):
        if hasattr(head.weight_VH, "ds_shape") and _rows(head.weight_VH) != shared:
            raise ValueError(
                f"the {side}'s lm_head has {_rows(head.weight_VH)} rows, and both models share {shared}; under DeepSpeed "
                f"ZeRO-3 the larger one cannot be the {side}'s. Resize its embeddings, or train without ZeRO-3"
            )
    return _cut(student, shared), _cut(teacher, shared)


def _rows(weight_VH: Tensor) -> int:
    # ZeRO-3 leaves a placeholder of no elements and keeps the real shape beside it.
    return getattr(weight_VH, "ds_shape", weight_VH.shape)[0]


def _cut(head: Head, rows: int) -> Head:
    if _rows(head.weight_VH) == rows:
        return head
    bias_V = None if head.bias_V is None else head.bias_V[:rows]
    return replace(head, weight_VH=head.weight_VH[:rows], bias_V=bias_V)


def gathered(head: Head, dtype: torch.dtype) -> Head:
    """The head with plain tensors where FSDP2 keeps it in shards: gathered once, and not once for every chunk of the loss."""
    if not isinstance(head.weight_VH, DTensor):
        return head
    bias_V = head.bias_V.full_tensor() if isinstance(head.bias_V, DTensor) else head.bias_V
    return replace(head, weight_VH=head.weight_VH.full_tensor().to(dtype), bias_V=bias_V)
