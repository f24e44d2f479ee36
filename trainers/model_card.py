"""The card of a trained student: README.md beside its weights."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from osd import __version__

if TYPE_CHECKING:
    from osd.train.config import OSDConfig

PROJECT = "https://github.com/optimal-sampling-distillation/osd"


def model_card(
    args: OSDConfig, *, name: str, student: str, teacher: str, dataset: str | None = None, tags: list[str] | None = None
) -> ModelCard:
    """Return the card: base model, teacher, how α was chosen, data and loss.

    Args:
        name: title of the card.
        student, teacher: model ids or paths, as they were given. Metadata names only the student, and only if it is an id.
        dataset: name of the training data; None if it is not known.
    """
    data = ModelCardData(
        base_model=None if Path(student).is_dir() else student,
        datasets=None if dataset is None or Path(dataset).exists() else dataset,
        library_name="transformers",
        model_name=name,
        pipeline_tag="text-generation",
        tags=["generated_from_trainer", "trl", "osd", "distillation", *(tags or [])],
    )
    rows = {
        "base model (the student before training)": _shown(student),
        "teacher": _shown(teacher),
        "prompts of the teacher": _privilege(args),
        "data": "not named" if dataset is None else _shown(dataset),
        "α, the teacher's weight": _alpha(args),
        "loss": _loss(args),
        "temperature": f"{args.temperature:g}",
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in ("trl", "transformers", "torch")),
    }
    lines = [
        f"# {name}\n",
        f"Trained with [OSD]({PROJECT}) {__version__} on completions drawn token by token from",
        "q\\* ∝ π_θ^(1-α) · π_t^α, the mixture of this student π_θ and its teacher π_t.\n",
        "| | |\n|---|---|",
        *(f"| {key} | {value} |" for key, value in rows.items()),
        "",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def _shown(name: str) -> str:
    """Return a model or data set as text: of a path only the last part."""
    return f"`{Path(name).name if Path(name).exists() else name}`"


def _alpha(args: OSDConfig) -> str:
    if args.alpha_method == "fixed":
        how = f"fixed, α = {args.fixed_alpha:g}"
    else:
        how = f"{args.alpha_method}, from {args.alpha_min:g} to {args.alpha_max:g}"
    schedule = "" if args.alpha_schedule == "constant" else f", {args.alpha_schedule} schedule"
    return f"{how}{schedule}, {args.mixture} mixture"


def _loss(args: OSDConfig) -> str:
    shape = f"β = {args.beta:g}" if args.divergence == "jsd" else f"skew = {args.skew:g}"
    return f"{args.divergence}, {shape}; {args.teacher_signal} teacher; importance correction: {args.importance_correction}"


def _privilege(args: OSDConfig) -> str:
    own = args.privileged_template or args.teacher_system_prompt
    return "its own template or system prompt" if own else "its own columns of the data, if there are any, else the student's"
