"""One pass over a batch: values of the loss that its metrics and later passes need, and importance weights of its tokens.

Shape suffixes: B completions, T completion tokens (padded), N unmasked tokens, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from osd.train.divergence import token_logprobs
from osd.train.importance import importance_weights
from osd.train.lm_head import Head, TopK, gathered, on_shared_vocabulary

if TYPE_CHECKING:
    from osd.train.trainer import OSDTrainer


@dataclass
class Pass:
    """Results of one pass beside its loss, which TRL returns alone.

    Attributes:
        counted: some token of some process counts; an evaluation batch without one has no loss.
        sums: over the tokens of the pass, for `osd.train.metrics.loss_metrics`.
        logp_BT: log π_θ of the completions under the weights of this pass, where samples are used again.
    """

    counted: bool
    sums: dict[str, Tensor] = field(default_factory=dict)
    logp_BT: Tensor | None = None


def weigh(
    trainer: OSDTrainer, hidden_BTH: Tensor, student: Head, teacher: Head | TopK, inputs: dict[str, Tensor]
) -> tuple[Tensor | None, Pass]:
    """Return importance weights [B, T] towards the current student, or None, and the pass with their sums.

    Args:
        hidden_BTH: the student's final hidden states of the completions.
    """
    args, mask_BT, training = trainer.args, inputs["loss_mask"], trainer.model.training
    result = Pass(counted=training or bool(inputs["num_items_in_batch"]))
    if args.importance_correction == "none" or not training:  # evaluation samples from the student itself
        return None, result
    logp_theta_BT = inputs["logp_theta"]
    if args.num_iterations > 1 or args.async_generation:
        temperature = trainer.vllm_generation.sampling_temperature
        result.logp_BT = _logprobs(hidden_BTH, student, teacher, inputs, temperature)
        # For tokens of the weights of the first pass, the change of log π_θ since then, by the trainer's arithmetic both
        # times: the engine's differs in bfloat16 by hundredths of a nat per token, which would be noise in every weight. For
        # tokens of older weights, the trainer has nothing to compare with.
        changed_BT = logp_theta_BT + result.logp_BT - inputs.get("logp_at_first", result.logp_BT)
        logp_theta_BT = torch.where(inputs["is_stale"], result.logp_BT, changed_BT)
    weight_BT, truncated_BT = importance_weights(
        logp_theta_BT, inputs["logp_draw"], mask_BT, correction=args.importance_correction, clip=args.importance_clip
    )
    weight_N = weight_BT[mask_BT != 0].double()
    result.sums = {
        "weight": weight_N.sum(),
        "weight_squared": weight_N.square().sum(),
        "truncated": truncated_BT[mask_BT != 0].sum(),
    }
    return weight_BT.to(hidden_BTH.device), result


@torch.no_grad()
def _logprobs(hidden_BTH: Tensor, student: Head, teacher: Head | TopK, inputs: dict[str, Any], temperature: float) -> Tensor:
    """Return log π_θ of the completions' tokens under the weights being trained, tempered as in sampling, [B, T]."""
    student, _ = on_shared_vocabulary(gathered(student, hidden_BTH.dtype), teacher)
    kept_BT = inputs["loss_mask"] != 0
    hidden_NH, token_N = (x[kept_BT.to(x.device)] for x in (hidden_BTH, inputs["completion_ids"]))
    logp_N = token_logprobs(hidden_NH, student, token_N.to(hidden_NH.device), temperature)
    logp_BT = torch.zeros_like(inputs["logp_draw"])
    logp_BT[kept_BT] = logp_N.to(logp_BT.device)
    return logp_BT
