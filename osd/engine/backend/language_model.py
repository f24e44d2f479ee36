"""Multimodal checkpoints as text models in vLLM: the language model alone, without the encoders' weights and processors."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.config import LoadConfig, VllmConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from osd.engine.multimodal import is_multimodal, text_architecture, text_config, text_weights

LOAD_FORMAT = "osd_language_model"


def as_text(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return engine arguments that load no more than the language model of ``arguments["model"]``.

    vLLM runs the language model's own class where it has one. Otherwise, and for quantized checkpoints, whose configuration
    names layers of the whole model, it runs the multimodal class without its encoders (``language_model_only``).
    """
    options = {key: arguments[key] for key in ("revision", "trust_remote_code") if arguments.get(key)}
    try:
        config = AutoConfig.from_pretrained(arguments["model"], **options)
    except (OSError, ValueError):
        return arguments  # vLLM may know more formats
    if not is_multimodal(config):
        return arguments
    own = ("hf_overrides", "load_format", "config_format", "quantization")
    special = any(arguments.get(name) not in (None, "auto", {}) for name in own) or getattr(config, "quantization_config", None)
    if special or text_architecture(config) not in ModelRegistry.get_supported_archs():
        return {"language_model_only": True, **arguments}
    return {**arguments, "hf_overrides": text_config, "load_format": LOAD_FORMAT, "config_format": "hf"}


def reads_text_names(config: VllmConfig) -> bool:
    """Return whether :func:`osd.engine.multimodal.text_weights` must rename this model's weights."""
    return config.load_config.load_format == LOAD_FORMAT


@register_model_loader(LOAD_FORMAT)
class LanguageModelLoader(DefaultModelLoader):
    """vLLM's loader of files, without the weights that the language model does not have."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(replace(load_config, load_format="hf"))

    def get_all_weights(self, model_config: Any, model: Any) -> Generator[tuple[str, Tensor], None, None]:
        yield from text_weights(super().get_all_weights(model_config, model))
