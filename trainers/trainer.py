"""OSDTrainer: on-policy distillation from q*, the optimal mixture of teacher and student, sampled anew at every step.

One step of training and its modules:
    α's bounds, and rows without mixing                   osd.train.alpha_schedule
    both prompts of every row                             osd.train.rows
    the completions, and their columns and metrics        osd.train.sampling
    sync of the student, sampling from q*                 osd.generation.OSDGeneration, called by TRL
    the next batch, sampled meanwhile (async_generation)  osd.train.lookahead
    the teacher, from the record or computed again        osd.train.teacher
    importance weights towards π_θ                        osd.train.passes, osd.train.importance
    divergence between student and teacher                _compute_loss, osd.train.losses, osd.train.divergence
    α, KLs, cache hits, times, weights                    osd.train.metrics, osd.train.privilege_gap

Overridden methods of TRL's DistillationTrainer, private to TRL and pinned by tests/test_trl_contract.py:
`_generate_and_score_completions`, `_tokenize_prompts`, `_compute_loss`, `_prepare_inputs`, `_get_train_sampler`,
`_get_last_hidden_state`, `_save_checkpoint`, `_save`, `_set_signature_columns_if_needed`. Overridden public methods:
`compute_loss`, `get_train_dataloader`, `get_batch_samples`, `evaluation_loop`, `prediction_step`, `train`, `log` and
`create_model_card`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from datasets import IterableDataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DistillationTrainer
from trl.trainer.utils import get_config_model_id, repeat_iterable_dataset

from osd.colocated import check_groups
from osd.engine.config import PairConfig
from osd.generation import OSDGeneration
from osd.interrupts import kept_interrupts
from osd.prompts import PRIVILEGED_COLUMN, TEACHER_PROMPT_COLUMN, template_fields
from osd.train.alpha_schedule import MIX_COLUMN
from osd.train.checkpointing import EpochSampler, check_same_run, marked_when_whole, resolve
from osd.train.completion_logging import log_completions
from osd.train.config import OSDConfig
from osd.train.lm_head import head_of
from osd.train.lookahead import SampledAhead, warn_without_overlap
from osd.train.losses import batch_loss
from osd.train.metrics import loss_metrics, take_reduced
from osd.train.model_card import model_card
from osd.train.passes import Pass, weigh
from osd.train.preparation import Plan, plan
from osd.train.sampling import sampled_batch, start_generation
from osd.train.saving import check_saving, copy_processor, freeze_encoders, repair_generation_config
from osd.train.teacher import start_teacher

if TYPE_CHECKING:
    from osd.engine.engine import PairEngine


class OSDTrainer(DistillationTrainer):
    """Trains a student on completions drawn from q* ∝ π_θ^(1-α) π_t^α, against the teacher that sampled them.

    The dataset has a `prompt` column (text or conversation) and, for a teacher that knows more, `teacher_prompt`, or
    `privileged_context`, or any columns that `args.privileged_template` names; rows whose `mix` column is false are sampled
    from the student alone. Both engines run in this process; the teacher exists only there (unless
    `args.teacher_signal="recompute"` loads another). Evaluation samples from the student alone.

    Usable as a context manager; `close()` shuts the engine down.

    Args:
        model: the student: path, model id, or a loaded causal language model (also with PEFT).
        teacher_model: path or model id of the teacher; default: `args.teacher_model_name_or_path`.
        args: the configuration.
        engine: a running `PairEngine` of these two models to use instead of starting one. The trainer sets its mixing; the
            caller closes it.
        processing_class: the student's tokenizer; the teacher reads with its own. Its end-of-sequence token ends completions,
            as do those of the loaded student's generation config.
        train_dataset, eval_dataset, callbacks, optimizers, peft_config: as in TRL.
        quantization_config, tools: refused.

    Raises:
        ValueError: before any model loads: `tools`, a teacher that is not a path or id, no teacher, a dataset whose columns do
            not fit the privileged template, rows that cannot be used (see `args.drop_bad_rows`), an output folder that cannot
            be written.
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
        planned = plan(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            teacher_model=teacher_model,
            processing_class=processing_class,
            engine=engine,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
        )
        planned.check_server(args)
        if isinstance(planned.pair, PairConfig):
            check_groups(planned.pair, args.world_size)
        train_dataset, eval_dataset = planned.datasets(train_dataset, eval_dataset)
        self._renderer, self._run = planned.renderer, planned.run
        config: Any = getattr(planned.pair, "config", planned.pair)  # of a running engine
        self._teacher_name = config.teacher
        self.dataset_name: str | None = None  # for the model card; the training command sets it
        # With `use_vllm` set, TRL's constructor would build its own generator inline; `_start` sets ours.
        with patch.multiple(args, use_vllm=False):
            super().__init__(
                model=model,
                teacher_model=None,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=planned.renderer.student_tokenizer,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )
        # TRL renders the student's prompts.
        self.chat_template_kwargs = self._renderer.template_kwargs(self._renderer.student_tokenizer)
        freeze_encoders(self.model)
        check_saving(self)
        warn_without_overlap(args, train_dataset)
        self._schedule, self._divergence = args.schedule(), args.loss_divergence()
        self._pass = Pass(counted=False)
        self._earlier_syncs = 0  # of a resumed run, before it stopped
        self._ahead = SampledAhead(self)
        for name in ("alpha", "token_ids"):
            self._logs[name] = deque(maxlen=self._logs["prompt"].maxlen)
        self._start(planned)

    def _start(self, planned: Plan) -> None:
        """Start the engine, unless one is running; close it again if anything after that fails."""
        self.vllm_generation = start_generation(self, planned.pair)
        try:
            self.vllm_generation.attach(self)
            engine = self.vllm_generation.engine
            engine.set_mixing(self._schedule.start)
            with self.vllm_generation.stays_awake():
                engine.wake_up()
                self._teacher = start_teacher(self, engine)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Shut the paired engine down and free its memory, if this trainer started it."""
        if self.vllm_generation.owns_engine:
            self.__dict__.pop("_teacher", None)  # it refers to the engine's memory
        self.vllm_generation.close()

    def __enter__(self) -> OSDTrainer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- completions and their supervision ----------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self.vllm_generation.stays_awake():
            return sampled_batch(self, inputs, super()._generate_and_score_completions)

    def _seed_of(self, step: int) -> str:
        """Return the seed of an optimizer step's own draws: a resumed run repeats them, and the global random state stays."""
        return f"{self.args.seed} {step} {self.accelerator.process_index}"

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        if not self.args.async_generation:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = self._ahead.batches(epoch_iterator, num_batches)
        return batches, self._get_num_items_in_batch(batches, device)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        # By the same code as the teacher's, which also takes texts and conversations in one batch.
        return self._renderer.student_ids(prompts), None, {}

    # -- the loss -----------------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        # accelerate wraps the model's forward method in autocast, and TRL 1.16 replaces that method by the loss.
        # With bf16=True it would compute in the dtype of the weights, usually float32.
        with self.accelerator.autocast():
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self._pass.logp_BT is not None:
            inputs.setdefault("logp_at_first", self._pass.logp_BT)  # not inside: DDP copies the inputs
        # Not in _compute_loss: a collective inside the wrapped forward pass could hang.
        metrics = loss_metrics(self._pass.sums, self.accelerator)
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        return loss

    def _get_last_hidden_state(self, unwrapped_model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if unwrapped_model.base_model is unwrapped_model:  # a Llama4ForCausalLM names its backbone wrongly
            unwrapped_model.base_model_prefix = "model"
        return super()._get_last_hidden_state(unwrapped_model, *args, **kwargs)

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
        teacher_BTX, teacher = self._teacher.supervision(inputs)
        weight_BT, self._pass = weigh(self, student_hidden_BTH, student, teacher, inputs)
        result = batch_loss(
            student_hidden_BTH,
            teacher_BTX,
            student,
            teacher,
            inputs["loss_mask"],
            of=self._divergence,
            weight_BT=weight_BT,
            num_items_in_batch=num_items_in_batch,
        )
        clipped = {} if self._divergence.clip is None else {"clipped": result.clipped}
        self._pass.sums |= {"tokens": result.tokens, **clipped}
        return result.loss, result.entropy, result.tokens

    # -- the same completions for several optimizer steps -------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        buffered: list[dict[str, torch.Tensor]] | None = self._buffered_inputs
        again = self.state.global_step % self.args.num_iterations != 0
        if self.model.training and again and buffered is not None:
            return buffered[self._step % self.args.gradient_accumulation_steps]
        # TRL samples at the first pass of an optimizer step, and after a resume, when nothing is buffered.
        return super()._prepare_inputs(generation_batch)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        # Prompts are repeated as often as their completions are used.
        sampler = super()._get_train_sampler(dataset)
        return EpochSampler(sampler, times=self.args.num_iterations, epoch=lambda: int(self.state.epoch or 0))

    def get_train_dataloader(self) -> Any:
        stream, iterations = self.train_dataset, self.args.num_iterations
        if iterations == 1 or not isinstance(stream, IterableDataset):
            return super().get_train_dataloader()
        if self.shuffle_dataset:
            stream = stream.shuffle(seed=self.args.seed)  # before rows are repeated; TRL shuffles after
        size = self.args.per_device_train_batch_size * self.accelerator.num_processes * self.args.gradient_accumulation_steps
        repeated = repeat_iterable_dataset(stream, mini_repeat_count=1, batch_size=size, repeat_count=iterations)
        with patch.multiple(self, train_dataset=repeated, shuffle_dataset=False):
            return super().get_train_dataloader()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does; "last" resumes from the newest whole checkpoint in `output_dir`, if there is one.

        Raises:
            ValueError: a checkpoint that is not whole, or of a run with another model or another mixing.
        """
        checkpoint = resolve(resume_from_checkpoint, self.args.output_dir)
        self._earlier_syncs = 0
        if checkpoint is not None:
            self._earlier_syncs = check_same_run(checkpoint, self._run) - self.vllm_generation.engine.weights_version
        try:
            with kept_interrupts():
                return super().train(checkpoint, *args, **kwargs)
        finally:
            self._ahead.end()

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        repair_generation_config(self.model)  # it may have been changed since the start
        super()._save(output_dir, *args, **kwargs)
        copy_processor(self.model, self.args.student_init_kwargs().get("revision"), output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        synced_again = self._last_loaded_step == self.state.global_step  # these weights, for evaluation; a resumed run will too
        version = self.vllm_generation.engine.weights_version + self._earlier_syncs - synced_again
        with marked_when_whole(self, folder, self._run, version):
            super()._save_checkpoint(model, trial)

    def create_model_card(  # type: ignore[override]  # TRL's signature
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md to the output folder: base model, teacher, α method, data and loss."""
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        card = model_card(
            self.args,
            name=model_name or folder.resolve().name,
            student=get_config_model_id(self.model.config) or self._run["student"]["name"],
            teacher=self._teacher_name,
            dataset=dataset_name or self.dataset_name,
            tags=[tags] if isinstance(tags, str) else tags,
        )
        card.save(folder / "README.md")

    # -- TRL's surroundings -------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # TRL syncs when the step changed; weights can change without it (a best checkpoint loaded after training).
        self._last_loaded_step = -1
        output = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        output.metrics.setdefault(f"{kwargs.get('metric_key_prefix', 'eval')}_loss", math.nan)  # of batches that all failed
        return output

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        # A batch without a token that counts, on any process, has no loss; zero would make a broken student the best.
        loss, *rest = super().prediction_step(*args, **kwargs)
        return loss if self._pass.counted else None, *rest

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        # In place, as TRL adds the metrics that it averages: `evaluate()` returns this dictionary.
        logs.update({f"{prefix}{name}": value for name, value in take_reduced(self._metrics[mode]).items()})
        wanted, self.log_completions = self.log_completions, False
        try:
            super().log(logs, start_time)
        finally:
            self.log_completions = wanted
        if wanted and self.accelerator.is_main_process:
            log_completions(self)

    def _set_signature_columns_if_needed(self) -> None:
        # With remove_unused_columns, the columns that only the teacher reads stay.
        super()._set_signature_columns_if_needed()
        named = template_fields(self.args.privileged_template) if self.args.privileged_template else ()
        wanted = {*(self._signature_columns or ()), TEACHER_PROMPT_COLUMN, PRIVILEGED_COLUMN, MIX_COLUMN, *named}
        self._signature_columns = sorted(wanted)
