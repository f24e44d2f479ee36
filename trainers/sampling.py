"""The completions of one batch: sampled from q*, with the columns that the loss and the metrics read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from osd.generation import OSDGeneration
from osd.prompts import PROMPT_COLUMN
from osd.train.alpha_schedule import unmixed
from osd.train.losses import pad_column
from osd.train.metrics import batch_metrics, end_metrics
from osd.train.privilege_gap import privilege_gap

if TYPE_CHECKING:
    from osd.engine.config import PairConfig
    from osd.engine.engine import PairCompletion, PairEngine
    from osd.engine.served import ServedPair
    from osd.train.trainer import OSDTrainer


def start_generation(trainer: OSDTrainer, pair: PairConfig | PairEngine | ServedPair) -> OSDGeneration:
    """Start the engine of a pair, or take one that is running, with the sampling parameters of the trainer."""
    args = trainer.args
    kwargs = args.sampling_kwargs()
    if not kwargs.get("ignore_eos"):
        kwargs["stop_token_ids"] = sorted({*trainer.eos_token_ids, *(kwargs.get("stop_token_ids") or ())})
    return OSDGeneration(
        trainer.model,
        trainer.accelerator,
        trainer.processing_class,
        pair=pair,
        mix_tokens=args.mix_tokens,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        hidden=args.teacher_signal == "recorded",
        topk=args.teacher_topk if args.teacher_signal == "topk" else 0,
        max_staleness=args.max_staleness,
        async_weight_updates=args.async_weight_updates if args.async_generation else "between",
        on_error="keep",
        temperature=trainer.temperature,
        top_p=trainer.top_p,
        top_k=trainer.top_k,
        min_p=trainer.min_p,
        repetition_penalty=trainer.repetition_penalty,
        max_completion_length=trainer.max_completion_length,
        generation_kwargs=kwargs,
    )


def sampled_batch(
    trainer: OSDTrainer, inputs: list[dict[str, Any]], generate_as_trl: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> dict[str, Any]:
    """Sample a completion for every row; return the batch with its supervision, and log its metrics.

    Args:
        generate_as_trl: TRL's `_generate_and_score_completions`, which tokenizes, syncs the weights, samples and pads.

    Raises:
        RuntimeError: every completion of a training batch ended in an error.
    """
    mode = "train" if trainer.model.training else "eval"
    teacher_ids = trainer._renderer.teacher_ids(inputs)
    generation, begun = trainer.vllm_generation, mode == "train" and trainer._ahead.take(inputs)
    generation.model = trainer.model  # FSDP1 wraps it anew when training begins
    generation.updates = trainer.state.global_step
    if mode == "train" and not begun:
        trainer._ahead.drop()
    # The prompt alone: TRL would look for images in other columns.
    student_rows: list[dict[str, Any]] = [{PROMPT_COLUMN: trainer._renderer.student_prompt(row)} for row in inputs]
    with generation.teacher_reads(teacher_ids, alpha=_set_mixing(trainer, inputs, mode), begun=begun):
        output = generate_as_trl(student_rows)
    batch = generation.last_batch
    assert batch is not None, "TRL called generate()"
    completions = batch.completions
    output |= _recorded_columns(trainer, completions, batch.staleness_T, output["completion_mask"])
    if mode == "train" and not output["num_items_in_batch"]:  # of all processes, which stop together
        raise RuntimeError(f"every completion of the batch ended in an error; the first: {completions[0].error}")
    metrics = batch_metrics(generation, trainer.accelerator)
    metrics["osd/engine/weights_version"] += trainer._earlier_syncs
    if mode == "train":
        metrics |= trainer._schedule.metrics(generation.engine.mixing) | _privilege_metrics(trainer, output)
        trainer._ahead.begin()  # after the last use of the engine in this step, and before the host's large copies
    output |= trainer._teacher.columns(completions, teacher_ids, output["completion_mask"])
    for name, value in metrics.items():
        trainer._metrics[mode][name].append(value)
    for name, value in end_metrics(completions, trainer.accelerator).items():
        trainer._metrics[mode][name][-1] = value  # TRL's own count ends only at token ids
    if trainer.log_completions:
        trainer._logs["alpha"].extend(gather_object([_alpha(c) for c in completions]))
        trainer._logs["token_ids"].extend(gather_object([list(c.token_ids) for c in completions]))
    return output


def _set_mixing(trainer: OSDTrainer, inputs: list[dict[str, Any]], mode: str) -> float | list[float | None] | None:
    """Set the mixing of this step; return α where it is fixed: for all completions, or one each. None: it is solved."""
    if mode == "eval":
        return 0.0  # evaluation measures the student's own completions
    step = trainer.state.global_step
    trainer.vllm_generation.engine.set_mixing(trainer._schedule.at(step, trainer.state.max_steps))
    return unmixed(inputs, trainer.args.mix_fraction, seed=trainer._seed_of(step))


def _recorded_columns(
    trainer: OSDTrainer, completions: list[PairCompletion], staleness_T: list[torch.Tensor], completion_mask_BT: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return `loss_mask`, `logp_theta`, `logp_draw` and `is_stale`, [B, T]; TRL shuffles and splits them too.

    A completion that ended in an error is masked out whole. A stale token was drawn from older weights than the present ones.
    """
    length, device = completion_mask_BT.size(1), completion_mask_BT.device
    records = [None if c.error else c.record for c in completions]
    loss_mask_BT = completion_mask_BT * torch.tensor([[r is not None] for r in records], device=device)
    return {
        "loss_mask": loss_mask_BT,
        "logp_theta": pad_column([None if r is None else r.logp_theta for r in records], length, device),
        "logp_draw": pad_column([None if r is None else r.logp_draw for r in records], length, device),
        "is_stale": pad_column(staleness_T, length, device) > 0,
        "num_items_in_batch": trainer.accelerator.gather(loss_mask_BT.sum()).sum(),
    }


def _privilege_metrics(trainer: OSDTrainer, output: dict[str, torch.Tensor]) -> dict[str, float]:
    every, step = trainer.args.privilege_gap_steps, trainer.state.global_step
    if not every or step % every:
        return {}
    plain = [ids[mask.bool()].tolist() for ids, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)]
    tokens = trainer.args.privilege_gap_tokens
    return privilege_gap(trainer.vllm_generation, trainer.accelerator, plain, tokens=tokens, seed=trainer._seed_of(step))


def _alpha(completion: PairCompletion) -> list[float]:
    return [] if completion.error or completion.record is None else torch.as_tensor(completion.record.alpha).tolist()
