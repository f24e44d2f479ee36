"""OSDTrainer: on-policy distillation from q*, the optimal mixture of teacher and student, sampled fresh at every step.

One step of training, and where each part is:
    sync the student into its engine, sample from q*      osd.generation.OSDGeneration, called by TRL
    teacher's hidden states out of the record             _generate_and_score_completions
    divergence between student and recorded teacher       _compute_loss, trainers.losses
    α, KLs, cache hits, times                             trainers.metrics

Of TRL's DistillationTrainer these are overridden, all of them private to TRL and pinned by tests/test_trl_contract.py:
`_generate_and_score_completions`, `_compute_loss`, `_set_signature_columns_if_needed`; and the public `evaluation_loop`
and `log`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import AutoConfig
from trl import DistillationTrainer
from trl.trainer.utils import get_config_model_id

from osd.generation import OSDGeneration
from osd.prompts import (
    PRIVILEGED_COLUMN,
    PROMPT_COLUMN,
    TEACHER_PROMPT_COLUMN,
    encode,
    for_side,
    privileged_template_for,
    teacher_prompt,
    template_fields,
)
from trainers.completions import log_completions
from trainers.config import OSDConfig
from trainers.losses import Head, head_of, pad_hidden, recorded_divergence
from trainers.metrics import batch_metrics
from trainers.setup import check_datasets, planned_pair, refuse_unsupported

if TYPE_CHECKING:
    from osd.engine.pair import PairCompletion, PairConfig, PairEngine


class OSDTrainer(DistillationTrainer):
    """Trains a student on completions drawn from q* ∝ π_θ^(1-α) π_t^α, against the teacher that sampled them.

    The dataset has a `prompt` column (text or conversation) and, for a teacher that knows more, `teacher_prompt`, or
    `privileged_context`, or any columns that `args.privileged_template` names. Both engines run in this process; the
    teacher exists only there. Evaluation samples from the student alone.

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
        check_datasets(train_dataset, eval_dataset, args.privileged_template)
        pair = planned_pair(model, teacher_model, args, engine)
        with _no_inline_vllm(args):
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
        self._teacher_head = self._find_teacher_head()
        for name in ("alpha", "token_ids"):
            self._logs[name] = deque(maxlen=self._logs["prompt"].maxlen)

    def _start_generation(self, pair: PairConfig | PairEngine) -> OSDGeneration:
        return OSDGeneration(
            self.model,
            self.accelerator,
            self.processing_class,
            pair=pair,
            hidden=True,
            on_error="keep",
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_completion_length=self.max_completion_length,
            generation_kwargs=self.args.sampling_kwargs(),
        )

    def _find_teacher_head(self) -> Head:
        engine = self.vllm_generation.engine
        config = AutoConfig.from_pretrained(
            engine.config.teacher,
            revision=self.args.teacher_model_revision,
            trust_remote_code=self.args.trust_remote_code,
        )
        weight_VH, bias_V = engine.teacher_lm_head()
        return head_of(weight_VH, bias_V, config)

    def close(self) -> None:
        """Shut the paired engine down, if this trainer started it, and give its memory back."""
        self.__dict__.pop("_teacher_head", None)  # it refers to the engine's memory
        self.vllm_generation.close()

    # -- completions and their supervision ----------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        teacher_ids = [self._teacher_ids(row) for row in inputs]
        student_rows = [{**row, PROMPT_COLUMN: self._student_prompt(row)} for row in inputs]
        alpha = None if mode == "train" else 0.0  # evaluation measures the student's own completions
        with self.vllm_generation.teacher_reads(teacher_ids, alpha=alpha):
            output = super()._generate_and_score_completions(student_rows)
        batch = self.vllm_generation.last_batch
        assert batch is not None, "TRL called generate()"
        completions = batch.completions
        output |= self._recorded_supervision(completions, output["completion_mask"])
        for name, value in batch_metrics(self.vllm_generation, self.accelerator).items():
            self._metrics[mode][name].append(value)
        if self.log_completions:
            self._logs["alpha"].extend(gather_object([_alpha(c) for c in completions]))
            self._logs["token_ids"].extend(gather_object([list(c.token_ids) for c in completions]))
        return output

    def _student_prompt(self, row: Mapping[str, Any]) -> Any:
        args = self.args
        return for_side(row[PROMPT_COLUMN], system_prompt=args.student_system_prompt, chat=args.enable_chat_template)

    def _teacher_ids(self, row: Mapping[str, Any]) -> list[int]:
        args = self.args
        prompt = teacher_prompt(row, privileged_template_for(row, args.privileged_template))
        prompt = for_side(prompt, system_prompt=args.teacher_system_prompt, chat=args.enable_chat_template)
        return encode(self.vllm_generation.engine.tokenizer, prompt, **self.chat_template_kwargs)

    def _recorded_supervision(
        self, completions: list[PairCompletion], completion_mask_BT: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Batch-first tensors, which TRL shuffles and splits with the rest: `teacher_hidden` [B, T, H], `loss_mask` [B, T].

        A completion that ended in an error is masked out whole.
        """
        device = completion_mask_BT.device
        hidden_TH = [None if c.error or c.record is None else c.record.teacher_hidden_TH for c in completions]
        good_B1 = torch.tensor([[0 if c.error else 1] for c in completions], device=device)
        loss_mask_BT = completion_mask_BT * good_B1
        return {
            "teacher_hidden": pad_hidden(hidden_TH, completion_mask_BT.size(1), device),
            "loss_mask": loss_mask_BT,
            "num_items_in_batch": self.accelerator.gather(loss_mask_BT.sum()).sum(),
        }

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
        loss, entropy_sum, num_tokens = recorded_divergence(
            student_hidden_BTH.to(lm_head.weight.device),
            inputs["teacher_hidden"],
            head_of(lm_head.weight, getattr(lm_head, "bias", None), unwrapped_student.config),
            self._teacher_head,
            inputs["loss_mask"],
            beta=self.beta,
            temperature=self.temperature,
            num_items_in_batch=num_items_in_batch,
        )
        return loss, entropy_sum.detach(), num_tokens

    # -- TRL's surroundings -------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # TRL syncs when the step changed; weights can change without it (a best checkpoint loaded after training).
        self._last_loaded_step = -1
        return super().evaluation_loop(*args, **kwargs)

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
        wanted = {*(self._signature_columns or ()), TEACHER_PROMPT_COLUMN, PRIVILEGED_COLUMN, *named}
        self._signature_columns = sorted(wanted)


@contextmanager
def _no_inline_vllm(args: OSDConfig) -> Iterator[None]:
    """TRL's constructor builds its own vLLM generator inline when `use_vllm` is set; ours is put in its place afterwards."""
    args.use_vllm = False
    try:
        yield
    finally:
        args.use_vllm = True


def _alpha(completion: PairCompletion) -> list[float]:
    return [] if completion.error or completion.record is None else torch.as_tensor(completion.record.alpha).tolist()
