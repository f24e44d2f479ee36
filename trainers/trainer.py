"""OSDTrainer: on-policy distillation from q*, the optimal mixture of teacher and student, sampled fresh at every step.

One step of training, and where each part is:
    α's bounds and what is mixed at this step             trainers.alpha_schedule
    sync the student into its engine, sample from q*      osd.generation.OSDGeneration, called by TRL
    the teacher, from the record or computed again        trainers.teacher
    weights from what was sampled towards π_θ             trainers.importance
    divergence between student and teacher                _compute_loss, trainers.losses, trainers.divergence
    α, KLs, cache hits, times, weights                    trainers.metrics, trainers.privilege_gap

Of TRL's DistillationTrainer these are overridden, all of them private to TRL and pinned by tests/test_trl_contract.py:
`_generate_and_score_completions`, `_compute_loss`, `_prepare_inputs`, `_get_train_sampler`, `_save_checkpoint`,
`_set_signature_columns_if_needed`; and the public `compute_loss`, `get_train_dataloader`, `evaluation_loop`, `train` and
`log`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DistillationTrainer
from trl.trainer.utils import get_config_model_id, repeat_iterable_dataset

from osd.engine.backend.versions import setting
from osd.generation import OSDGeneration
from osd.prompt_checks import compare_templates, is_conversation
from osd.prompts import (
    PRIVILEGED_COLUMN,
    PROMPT_COLUMN,
    TEACHER_PROMPT_COLUMN,
    encode_all,
    for_side,
    privileged_template_for,
    teacher_prompt,
    template_fields,
)
from trainers.alpha_schedule import MIX_COLUMN, unmixed
from trainers.checkpointing import EpochSampler, check_same_run, marked_when_whole, resolve, run_of
from trainers.completion_logging import log_completions
from trainers.config import OSDConfig
from trainers.divergence import token_logprobs
from trainers.importance import importance_weights
from trainers.lm_head import Head, gathered, head_of, on_shared_vocabulary
from trainers.losses import batch_loss, pad_column
from trainers.metrics import batch_metrics, loss_metrics
from trainers.privilege_gap import privilege_gap
from trainers.teacher import start_teacher
from trainers.validation import check_datasets, check_lora_sync, planned_pair, refuse_unsupported

if TYPE_CHECKING:
    from osd.engine.engine import PairCompletion, PairConfig, PairEngine


class OSDTrainer(DistillationTrainer):
    """Trains a student on completions drawn from q* ∝ π_θ^(1-α) π_t^α, against the teacher that sampled them.

    The dataset has a `prompt` column (text or conversation) and, for a teacher that knows more, `teacher_prompt`, or
    `privileged_context`, or any columns that `args.privileged_template` names; rows whose `mix` column is false are sampled
    from the student alone. Both engines run in this process; the
    teacher exists only there (unless `args.teacher_signal="recompute"` loads another). Evaluation samples from the student
    alone.

    Args:
        model: the student: path, model id, or a loaded causal language model (also with PEFT).
        teacher_model: path or model id of the teacher; default: `args.teacher_model_name_or_path`.
        args: the configuration.
        engine: a running `PairEngine` of these two models to use instead of starting one; the caller closes it.
        train_dataset, eval_dataset, processing_class, callbacks, optimizers, peft_config: as in TRL.
        quantization_config, tools: refused.

    Raises:
        ValueError: before any model loads: `tools`, a teacher that is not a path or id, no teacher, a dataset whose
            columns do not fit the privileged template.
    """

    args: OSDConfig
    _signature_columns: list[str] | None  # type: ignore[assignment]
    chat_template_kwargs: dict[str, Any]
    max_completion_length: int  # checked by OSDConfig
    model: Any
    vllm_generation: OSDGeneration

    _tag_names = ["trl", "osd"]  # noqa: RUF012 (TRL's own form)
    _name = "OSD"
    _paper = {}  # noqa: RUF012

    def __init__(
        self,
        model: Any,
        teacher_model: str | None = None,
        args: OSDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable] | None = None,
        engine: PairEngine | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = OSDConfig(f"{name.split('/')[-1]}-OSD")
        refuse_unsupported(tools=tools, quantization_config=quantization_config)
        check_lora_sync(model, peft_config, args)
        check_datasets(train_dataset, eval_dataset, args.privileged_template)
        pair = planned_pair(model, teacher_model, args, engine)
        self._run = run_of(model, pair, args)
        if (checkpoint := resolve(args.resume_from_checkpoint, args.output_dir)) is not None:
            check_same_run(checkpoint, self._run)
        # With `use_vllm` set, TRL's constructor would build its own generator inline; ours is put in its place below.
        with setting(args, use_vllm=False):
            super().__init__(
                model=model,
                teacher_model=None,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )
        if self._is_vlm:
            raise ValueError("OSD distils text models; this student has an image processor")
        self.vllm_generation = self._start_generation(pair)
        self.use_vllm = True
        self._last_loaded_step = -1  # TRL syncs whenever this is not the current step
        self._schedule, self._divergence = args.schedule(), args.loss_divergence()
        self._loss_sums: dict[str, torch.Tensor] = {}
        self._logp_BT: torch.Tensor | None = None  # of the last pass, where samples are used again
        self._earlier_syncs = 0  # of a resumed run, before it was broken off
        engine = self.vllm_generation.engine
        with self.vllm_generation.stays_awake():
            engine.wake_up()
            self._teacher = start_teacher(self, engine)
        for name in ("alpha", "token_ids"):
            self._logs[name] = deque(maxlen=self._logs["prompt"].maxlen)

    def _start_generation(self, pair: PairConfig | PairEngine) -> OSDGeneration:
        return OSDGeneration(
            self.model,
            self.accelerator,
            self.processing_class,
            pair=pair,
            mix_tokens=self.args.mix_tokens,
            lora_sync=self.args.lora_sync,
            enable_sleep_mode=self.args.vllm_enable_sleep_mode,
            hidden=self.args.teacher_signal == "recorded",
            on_error="keep",
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_completion_length=self.max_completion_length,
            generation_kwargs=self.args.sampling_kwargs(),
        )

    def close(self) -> None:
        """Shut the paired engine down, if this trainer started it, and give its memory back."""
        if self.vllm_generation.owns_engine:
            self.__dict__.pop("_teacher", None)  # it refers to the engine's memory
        self.vllm_generation.close()

    # -- completions and their supervision ----------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self.vllm_generation.stays_awake():
            return self._sampled_and_supervised(inputs)

    def _sampled_and_supervised(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        teacher_ids = self._teacher_ids(inputs)
        self.vllm_generation.model = self.model  # FSDP1 wraps it anew when training begins
        student_rows = [{**row, PROMPT_COLUMN: self._student_prompt(row)} for row in inputs]
        with self.vllm_generation.teacher_reads(teacher_ids, alpha=self._alphas(inputs, mode)):
            output = super()._generate_and_score_completions(student_rows)
        batch = self.vllm_generation.last_batch
        assert batch is not None, "TRL called generate()"
        completions = batch.completions
        output |= self._recorded_columns(completions, output["completion_mask"])
        if mode == "train" and not output["num_items_in_batch"]:  # of all processes, which stop together
            raise RuntimeError(f"every completion of the batch ended in an error; the first: {completions[0].error}")
        output |= self._teacher.columns(completions, teacher_ids, output["completion_mask"])
        metrics = batch_metrics(self.vllm_generation, self.accelerator)
        metrics["engine/weights_version"] += self._earlier_syncs
        if mode == "train":
            metrics |= self._schedule.metrics(self.vllm_generation.engine.mixing) | self._privilege_metrics(output)
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        if self.log_completions:
            self._logs["alpha"].extend(gather_object([_alpha(c) for c in completions]))
            self._logs["token_ids"].extend(gather_object([list(c.token_ids) for c in completions]))
        return output

    def _alphas(self, inputs: list[dict[str, Any]], mode: str) -> float | list[float | None] | None:
        """Set the mixing of this step, and return the weights of the completions that have their own."""
        if mode == "eval":
            return 0.0  # evaluation measures the student's own completions
        self.vllm_generation.engine.set_mixing(self._schedule.at(self.state.global_step, self.state.max_steps))
        return unmixed(inputs, self.args.mix_fraction, seed=self._step_seed)

    @property
    def _step_seed(self) -> str:
        """For draws that are to be the same again in a resumed run, and to leave the global random state alone."""
        return f"{self.args.seed} {self.state.global_step} {self.accelerator.process_index}"

    def _privilege_metrics(self, output: dict[str, torch.Tensor]) -> dict[str, float]:
        every = self.args.privilege_gap_steps
        if not every or self.state.global_step % every:
            return {}
        plain = [ids[mask.bool()].tolist() for ids, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)]
        tokens = self.args.privilege_gap_tokens
        return privilege_gap(self.vllm_generation, self.accelerator, plain, tokens=tokens, seed=self._step_seed)

    def _student_prompt(self, row: Mapping[str, Any]) -> Any:
        args = self.args
        return for_side(row[PROMPT_COLUMN], system_prompt=args.student_system_prompt, chat=args.enable_chat_template)

    def _teacher_ids(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        args = self.args
        prompts = [teacher_prompt(row, privileged_template_for(row, args.privileged_template)) for row in rows]
        prompts = [for_side(p, system_prompt=args.teacher_system_prompt, chat=args.enable_chat_template) for p in prompts]
        tokenizer, kwargs = self.vllm_generation.engine.tokenizer, self.chat_template_kwargs
        if any(map(is_conversation, prompts)):
            compare_templates(tokenizer, self.processing_class, kwargs, kwargs)
        return encode_all(tokenizer, prompts, **kwargs)

    def _recorded_columns(self, completions: list[PairCompletion], completion_mask_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """Batch-first tensors, which TRL shuffles and splits with the rest: `loss_mask`, `logp_theta`, `logp_draw`, [B, T].

        A completion that ended in an error is masked out whole.
        """
        length, device = completion_mask_BT.size(1), completion_mask_BT.device
        records = [None if c.error else c.record for c in completions]
        loss_mask_BT = completion_mask_BT * torch.tensor([[r is not None] for r in records], device=device)
        return {
            "loss_mask": loss_mask_BT,
            "logp_theta": pad_column([None if r is None else r.logp_theta for r in records], length, device),
            "logp_draw": pad_column([None if r is None else r.logp_draw for r in records], length, device),
            "num_items_in_batch": self.accelerator.gather(loss_mask_BT.sum()).sum(),
        }

    # -- the loss -----------------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        self._logp_BT = None
        self._is_counted = self.model.training or bool(inputs["num_items_in_batch"])
        # accelerate wraps the model's forward method in autocast, and TRL puts the loss in that method's place: under TRL 1.16
        # bf16=True computes in the dtype of the weights, float32 as a rule.
        with self.accelerator.autocast():
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self._logp_BT is not None:
            inputs.setdefault("logp_at_first", self._logp_BT)  # not inside: DDP hands a copy of the inputs on
        # Here, and not in _compute_loss: a collective inside the wrapped forward pass could hang.
        metrics = loss_metrics(self._loss_sums, self.accelerator)
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        return loss

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        student_hidden_BTH = self._get_last_hidden_state(
            unwrapped_student,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
        )
        lm_head = unwrapped_student.get_output_embeddings()
        student_hidden_BTH = student_hidden_BTH.to(lm_head.weight.device)
        student = head_of(lm_head.weight, getattr(lm_head, "bias", None), unwrapped_student.config)
        teacher_hidden_BTH, teacher = self._teacher.supervision(inputs)
        weight_BT, weight_sums = self._importance_weights(student_hidden_BTH, student, teacher, inputs)
        result = batch_loss(
            student_hidden_BTH,
            teacher_hidden_BTH,
            student,
            teacher,
            inputs["loss_mask"],
            of=self._divergence,
            weight_BT=weight_BT,
            num_items_in_batch=num_items_in_batch,
        )
        clipped = {} if self._divergence.clip is None else {"clipped": result.clipped}
        self._loss_sums = {"tokens": result.tokens, **clipped, **weight_sums}
        return result.loss, result.entropy, result.tokens

    def _importance_weights(
        self, student_hidden_BTH: torch.Tensor, student: Head, teacher: Head, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Weights [B, T] towards the student as it is now, or None; and their sums, for the metrics."""
        args, mask_BT = self.args, inputs["loss_mask"]
        if args.importance_correction == "none" or not self.model.training:  # evaluation samples from the student itself
            return None, {}
        logp_theta_BT = inputs["logp_theta"]
        if args.num_iterations > 1:
            # How far the student has moved since it sampled, by the trainer's arithmetic both times: the engine's differs in
            # bfloat16 by hundredths of a nat per token, which would be noise in every weight.
            self._logp_BT = self._logp_now(student_hidden_BTH, student, teacher, inputs)
            logp_theta_BT = logp_theta_BT + self._logp_BT - inputs.get("logp_at_first", self._logp_BT)
        weight_BT, truncated_BT = importance_weights(
            logp_theta_BT, inputs["logp_draw"], mask_BT, correction=args.importance_correction, clip=args.importance_clip
        )
        weight_N = weight_BT[mask_BT != 0].double()
        sums = {
            "weight": weight_N.sum(),
            "weight_squared": weight_N.square().sum(),
            "truncated": truncated_BT[mask_BT != 0].sum(),
        }
        return weight_BT.to(student_hidden_BTH.device), sums

    @torch.no_grad()
    def _logp_now(
        self, student_hidden_BTH: torch.Tensor, student: Head, teacher: Head, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """log π_θ of the completion's tokens under the weights being trained, tempered as in sampling, [B, T]."""
        student, _ = on_shared_vocabulary(gathered(student, student_hidden_BTH.dtype), teacher)
        kept_BT = inputs["loss_mask"] != 0
        hidden_NH, token_N = (x[kept_BT.to(x.device)] for x in (student_hidden_BTH, inputs["completion_ids"]))
        logp_N = token_logprobs(hidden_NH, student, token_N.to(hidden_NH.device), self.vllm_generation.sampling_temperature)
        logp_BT = torch.zeros_like(inputs["logp_draw"])
        logp_BT[kept_BT] = logp_N.to(logp_BT.device)
        return logp_BT

    # -- the same completions for several optimizer steps -------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        buffered: list[dict[str, torch.Tensor]] | None = self._buffered_inputs
        again = self.state.global_step % self.args.num_iterations != 0
        if self.model.training and again and buffered is not None:
            return buffered[self._step % self.args.gradient_accumulation_steps]
        # TRL samples at the first pass of an optimizer step, and after a resume, when nothing is buffered.
        return super()._prepare_inputs(generation_batch)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        # Prompts come again as often as their completions are used.
        sampler = super()._get_train_sampler(dataset)
        return EpochSampler(sampler, times=self.args.num_iterations, epoch=lambda: int(self.state.epoch or 0))

    def get_train_dataloader(self) -> Any:
        stream, iterations = self.train_dataset, self.args.num_iterations
        if iterations == 1 or not isinstance(stream, IterableDataset):
            return super().get_train_dataloader()
        if self.shuffle_dataset:
            stream = stream.shuffle(seed=self.args.seed)  # before it is repeated, where TRL would do it after
        size = self.args.per_device_train_batch_size * self.accelerator.num_processes * self.args.gradient_accumulation_steps
        repeated = repeat_iterable_dataset(stream, mini_repeat_count=1, batch_size=size, repeat_count=iterations)
        with setting(self, train_dataset=repeated, shuffle_dataset=False):
            return super().get_train_dataloader()

    # -- breaking off and going on ------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `train`; "last" resumes from the newest whole checkpoint in `output_dir`, if there is one.

        Raises:
            ValueError: a checkpoint that is not whole, or of a run with another model or another mixing.
        """
        checkpoint = resolve(resume_from_checkpoint, self.args.output_dir)
        self._earlier_syncs = 0
        if checkpoint is not None:
            self._earlier_syncs = check_same_run(checkpoint, self._run) - self.vllm_generation.engine.weights_version
        return super().train(checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        synced_again = self._last_loaded_step == self.state.global_step  # these weights, for evaluation; a resumed run will too
        version = self.vllm_generation.engine.weights_version + self._earlier_syncs - synced_again
        with marked_when_whole(self, folder, self._run, version):
            super()._save_checkpoint(model, trial)

    # -- TRL's surroundings -------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # TRL syncs when the step changed; weights can change without it (a best checkpoint loaded after training).
        self._last_loaded_step = -1
        output = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        output.metrics.setdefault(f"{kwargs.get('metric_key_prefix', 'eval')}_loss", math.nan)  # of batches that all failed
        return output

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        # A batch of which no token counts, on any process, has no loss; zero would make a broken student the best of all.
        loss, *rest = super().prediction_step(*args, **kwargs)
        return loss if self._is_counted else None, *rest

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        wanted, self.log_completions = self.log_completions, False
        try:
            super().log(logs, start_time)
        finally:
            self.log_completions = wanted
        if wanted and self.accelerator.is_main_process:
            log_completions(self)

    def _set_signature_columns_if_needed(self) -> None:
        # With remove_unused_columns, what only the teacher reads is not unused.
        super()._set_signature_columns_if_needed()
        named = template_fields(self.args.privileged_template) if self.args.privileged_template else ()
        wanted = {*(self._signature_columns or ()), TEACHER_PROMPT_COLUMN, PRIVILEGED_COLUMN, MIX_COLUMN, *named}
        self._signature_columns = sorted(wanted)


def _alpha(completion: PairCompletion) -> list[float]:
    return [] if completion.error or completion.record is None else torch.as_tensor(completion.record.alpha).tolist()
