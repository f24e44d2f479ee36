"""Everything about a run that can be refused before a model loads: arguments, dataset columns, the two models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model

from osd.prompts import privileged_template_for
from trainers.config import OSDConfig

if TYPE_CHECKING:
    from osd.engine.pair import PairConfig, PairEngine


def refuse_unsupported(*, tools: Any, quantization_config: Any) -> None:
    """Refuse what TRL's trainer can do and this one cannot.

    Raises:
        ValueError: tools, or a quantized student.
    """
    if tools:
        names = [getattr(tool, "__name__", tool) for tool in tools]
        raise ValueError(
            f"tools={names!r} are not supported: a tool's answer would re-enter generation without the teacher's prompt. "
            "Train without tools, or use TRL's DistillationTrainer"
        )
    if quantization_config is not None:
        raise ValueError("quantization_config is not supported: the live student is copied into its engine at every step")


def check_lora_sync(model: Any, peft_config: Any, args: OSDConfig) -> None:
    """Refuse to sync the adapter alone of a student that has none.

    Raises:
        ValueError: naming the field.
    """
    has_adapter = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
    if args.lora_sync == "adapter" and not has_adapter:
        raise ValueError(
            "lora_sync='adapter' and the student has no LoRA adapter; give peft_config (--use_peft true), or use 'merged'"
        )


def check_datasets(train_dataset: Any, eval_dataset: Any, template: str | None) -> None:
    """Check the columns of every dataset against the privileged template.

    Raises:
        ValueError: as :func:`osd.prompts.privileged_template_for`; or image columns.
    """
    evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    for dataset in (train_dataset, *evaluated):
        columns = _columns(dataset)
        if columns is None:
            continue
        privileged_template_for(columns, template)
        images = sorted({"image", "images"} & set(columns))
        if images:
            raise ValueError(f"OSD distils text models; remove the dataset's columns {images}")


def _columns(dataset: Any) -> list[str] | None:
    """Column names of a dataset; None if there is no way to know them before rows are read."""
    if dataset is None or not hasattr(dataset, "column_names"):
        return None
    if dataset.column_names is not None:
        return dataset.column_names
    return list(next(iter(dataset)))  # a stream that does not declare its columns


def planned_pair(model: Any, teacher_model: Any, args: OSDConfig, engine: PairEngine | None) -> PairConfig | PairEngine:
    """The pair to train with: the running `engine`, or the checked configuration of one to start.

    Raises:
        ValueError: no teacher, or one that is not a path or id; a model that cannot be found; tokenizers that differ;
            engine arguments that vLLM does not have; a running engine of another teacher or another mixing.
    """
    teacher = _teacher_path(teacher_model, args, engine)
    if engine is not None:
        _check_running(engine, teacher, args)
        return engine
    from osd.engine.models import check_models
    from osd.engine.pair import PairConfig

    student = model if isinstance(model, str) else model.name_or_path
    kwargs: dict[str, Any] = args.pair_kwargs()
    pair = PairConfig(teacher=teacher, student=student, mixing=args.mixing(), **kwargs)
    check_models(pair)
    return pair


def _teacher_path(teacher_model: Any, args: OSDConfig, engine: PairEngine | None) -> str:
    given = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    if given is None and engine is not None:
        return engine.config.teacher
    if given is None:
        raise ValueError("no teacher: set teacher_model_name_or_path, or pass teacher_model, to a path or model id")
    if not isinstance(given, str):
        raise ValueError(
            f"teacher_model is a {type(given).__name__}: the teacher runs in vLLM, which loads it itself; pass its path or "
            "model id (a model changed in memory must be saved with save_pretrained first)"
        )
    return given


def _check_running(engine: PairEngine, teacher: str, args: OSDConfig) -> None:
    running = engine.config
    if running.teacher != teacher:
        raise ValueError(f"the running engine's teacher is {running.teacher!r}, and the trainer was given {teacher!r}")
    if running.mixing != args.mixing():
        raise ValueError(f"the running engine mixes with {running.mixing}, and the trainer's args say {args.mixing()}")
