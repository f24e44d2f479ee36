"""Everything that is saved at the end of a run: checked at its start, and complete for a multimodal student."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from huggingface_hub import get_token
from transformers import GenerationConfig
from transformers.utils import cached_file
from trl.trainer.utils import get_config_model_id

from osd.engine.multimodal import is_multimodal, text_parameters

if TYPE_CHECKING:
    from osd.train.config import OSDConfig
    from osd.train.trainer import OSDTrainer

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def check_outputs(args: OSDConfig) -> None:
    """Check that `output_dir` can be written, and that a push to the Hub has a token.

    Raises:
        ValueError: naming the field and the fix.
    """
    try:
        os.makedirs(args.output_dir or ".", exist_ok=True)
        with TemporaryDirectory(dir=args.output_dir):
            pass
    except OSError as error:
        raise ValueError(f"output_dir={args.output_dir!r} cannot be written ({error}); choose another folder") from error
    if args.push_to_hub and not (args.hub_token or get_token()):
        raise ValueError("push_to_hub=True needs a token: set hub_token or HF_TOKEN, or run `hf auth login`")


def check_saving(trainer: OSDTrainer) -> None:
    """Write everything but the weights once: configuration, generation config, tokenizer and model card.

    Raises:
        ValueError: with the reason.
    """
    if not trainer.args.should_save:
        return
    repair_generation_config(trainer.model)
    model = _base(trainer.model)
    with TemporaryDirectory(dir=trainer.args.output_dir) as folder, patch.multiple(trainer.args, output_dir=folder):
        for name, write in (
            ("configuration", model.config.save_pretrained),
            ("generation config", getattr(getattr(model, "generation_config", None), "save_pretrained", Path)),
            ("tokenizer", trainer._tokenizer.save_pretrained),
            ("model card", lambda _: trainer.create_model_card(model_name=Path(folder).name)),
        ):
            try:
                write(folder)
            except Exception as error:
                raise ValueError(f"the student's {name} cannot be saved ({error}); correct it before training") from error


def repair_generation_config(model: Any) -> None:
    """Make the generation config of a model one that transformers saves, with a warning if it was not.

    transformers refuses to save an inconsistent one (`temperature` with `do_sample=False`), and the weights with it.
    """
    holder = _base(model)
    config = getattr(holder, "generation_config", None)
    if config is None or (reason := _refusal(config)) is None:
        return
    config.do_sample = True  # as transformers itself repairs one with options of sampling
    change = "do_sample=True was added"
    if _refusal(config) is not None:
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        holder.generation_config = GenerationConfig(**ids)
        change = "only its token ids are kept"
    warnings.warn(f"the student's generation config could not be saved, so {change} ({reason})", stacklevel=3)


def _refusal(config: GenerationConfig) -> str | None:
    try:
        config.validate(strict=True)
        config.to_json_string()
    except (TypeError, ValueError) as error:
        return " ".join(str(error).split())[:300]
    return None


def copy_processor(model: Any, revision: str | None, folder: str | None) -> None:
    """Copy the files that describe a multimodal student's inputs into its checkpoint; training does not change them."""
    if not is_multimodal(model.config):
        return
    for name in _PROCESSOR_FILES:
        found = cached_file(
            get_config_model_id(model.config),
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            shutil.copy(found, str(folder))


def freeze_encoders(model: Any) -> None:
    """Freeze what a multimodal student does not compute for text: it gets no gradient, and its engine does not have it."""
    used = set(map(id, text_parameters(model)))
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
