"""The language model inside a multimodal checkpoint: its configuration, and the names of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Prefixes in multimodal checkpoints, and those of the same weights in a checkpoint of the language model alone.
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "model.text_model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}


def is_multimodal(config: Any) -> bool:
    """Return whether a transformers configuration has several parts, one of them the language model's."""
    return config.get_text_config() is not config


def text_architecture(config: Any) -> str | None:
    """Return the class of the language model in a multimodal checkpoint; None if transformers has no such class."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get_text_config().model_type)


def text_parameters(model: Any) -> list[Any]:
    """Return a (transformers) model's parameters; for a multimodal model, those of its language model alone."""
    parts = [model.get_decoder(), model.get_output_embeddings()] if is_multimodal(model.config) else [model]
    return list({id(parameter): parameter for part in parts for parameter in part.parameters()}.values())


def text_config(config: Any) -> Any:
    """Return the configuration of the language model in a multimodal checkpoint; any other configuration as it is."""
    if not is_multimodal(config):
        return config
    text = config.get_text_config()
    text.architectures = [text_architecture(config)]
    text.dtype = text.dtype or config.dtype
    # Where they differ the checkpoint has both matrices: the whole model's default is not the language model's.
    text.tie_word_embeddings = bool(text.tie_word_embeddings and config.tie_word_embeddings)
    return text


def text_name(name: str) -> str | None:
    """Return the name that a weight of a multimodal checkpoint has in the language model; None if it has no such weight."""
    for prefix, own in _PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return None


def text_weights(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the language model in a multimodal checkpoint, under the language model's names."""
    return ((own, tensor) for name, tensor in named_tensors if (own := text_name(name)) is not None)
