"""Plan a run before a model loads: the pair, both tokenizers, the rows of both datasets and the checkpoint to resume from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.utils import get_config_model_id

from osd.engine.request import check_topk
from osd.engine.served import ServedPair
from osd.prompt_checks import forget_warnings
from osd.train.checkpointing import check_same_run, resolve, run_of, start_of
from osd.train.rows import Renderer
from osd.train.saving import check_outputs
from osd.train.validation import check_adapter, check_datasets, planned_pair, refuse_unsupported

if TYPE_CHECKING:
    from osd.engine.engine import PairConfig, PairEngine
    from osd.train.config import OSDConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked run that has loaded no weights.

    Attributes:
        pair: the configuration of the engine to start, or the running engine, or the server.
        renderer: both sides' prompts, with both tokenizers.
        run: models and mixing, as written beside every checkpoint.
    """

    pair: PairConfig | PairEngine | ServedPair
    renderer: Renderer
    run: dict[str, Any]

    def check_server(self, args: OSDConfig) -> None:
        """Check that the server can be trained against, if there is one; raises as `ServedPair.check_trainer`."""
        if isinstance(self.pair, ServedPair) and args.process_index == 0:  # the process that will hold it
            self.pair.check_trainer(args.device)

    def datasets(self, train_dataset: Any, eval_dataset: Any) -> tuple[Any, Any]:
        """Return both datasets without rows that cannot be used.

        Raises:
            ValueError: as `Renderer.usable`.
        """
        usable = self.renderer.usable
        if isinstance(eval_dataset, dict):
            evaluated: Any = {name: usable(rows, f"evaluation set {name!r}") for name, rows in eval_dataset.items()}
        else:
            evaluated = usable(eval_dataset, "evaluation set")
        return usable(train_dataset, "training set"), evaluated


def plan(
    model: Any,
    args: OSDConfig,
    *,
    train_dataset: Any,
    eval_dataset: Any = None,
    teacher_model: Any = None,
    processing_class: Any = None,
    engine: PairEngine | None = None,
    quantization_config: Any = None,
    peft_config: Any = None,
    tools: Any = None,
) -> Plan:
    """Check everything that can be checked without weights and without rendering rows; arguments as of OSDTrainer.

    Raises:
        ValueError: naming the field, the value and the fix.
    """
    forget_warnings()
    refuse_unsupported(model, args, tools=tools, quantization_config=quantization_config)
    check_adapter(model, peft_config)
    check_datasets(train_dataset, eval_dataset, args.privileged_template)
    pair = planned_pair(model, teacher_model, args, engine)
    check_outputs(args)
    from osd.engine.backend.configuration import context_lengths
    from osd.validate_models import check_same_ids, load_tokenizer, shared_vocabulary

    config: Any = getattr(pair, "config", pair)  # of a running engine, or the pair itself
    if args.teacher_signal == "topk":
        check_topk(args.teacher_topk, shared_vocabulary(config), "teacher_topk")
    teacher = getattr(pair, "tokenizer", None) or load_tokenizer(config, "teacher")  # of the running engine
    student = processing_class if processing_class is not None else _student_tokenizer(model, args)
    if isinstance(student, ProcessorMixin):
        student = student.tokenizer  # OSD distils text
    if not isinstance(student, PreTrainedTokenizerBase):
        raise ValueError(f"processing_class is a {type(student).__name__}; give the student's tokenizer")
    check_same_ids(teacher.get_vocab(), student.get_vocab())
    if isinstance(pair, ServedPair):
        lengths = {side: limits.max_model_len for side, limits in pair.limits().items()}
        longer = "restart the server with a larger --max-model-len"
    else:
        lengths = context_lengths(config)
        longer = "raise vllm_max_model_length" if pair is config else "start the engine with a larger max_model_len"
    checkpoint = resolve(args.resume_from_checkpoint, args.output_dir)
    started = start_of(checkpoint)
    run = run_of(model, pair, args, started)
    if checkpoint is not None:
        check_same_run(checkpoint, run)
    return Plan(
        pair=pair,
        renderer=Renderer(
            student_tokenizer=student,
            teacher_tokenizer=teacher,
            args=args,
            context=_context(lengths, args, longer),
            longer=longer,
            started=started,
        ),
        run=run,
    )


def _context(lengths: dict[str, int], args: OSDConfig, longer: str) -> dict[str, int]:
    for side, length in lengths.items():
        if args.max_completion_length >= length:  # type: ignore[operator]  # checked by OSDConfig
            raise ValueError(
                f"max_completion_length={args.max_completion_length} leaves no room for a prompt in the {side}'s context of "
                f"{length} tokens; lower it, or {longer}"
            )
    return lengths


def _student_tokenizer(model: Any, args: OSDConfig) -> Any:
    """Load the tokenizer that TRL would load, also of a multimodal student."""
    revision = args.student_init_kwargs().get("revision") if isinstance(model, str) else None
    return AutoTokenizer.from_pretrained(
        model if isinstance(model, str) else get_config_model_id(model.config),
        revision=revision,
        truncation_side="left",
        padding_side="left",
        trust_remote_code=args.trust_remote_code,
    )
