"""What the walk over a live student yields: the names and shapes that its engine has, and LoRA merged without touching it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM


def expected_shapes(student: str, kwargs: dict[str, Any]) -> dict[str, torch.Size] | None:
    """Name and shape of every parameter that transformers gives this model, without its weights.

    Args:
        student: path or model id of the engine's student.
        kwargs: its engine arguments.

    Returns:
        None where that cannot be known: the arguments change the architecture, or transformers cannot build it.
    """
    if kwargs.get("hf_overrides"):
        return None
    options = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(student, **options), trust_remote_code=kwargs.get("trust_remote_code", False)
            )
    except ValueError:  # no causal language model of this configuration; vLLM may know one
        return None
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def checked(
    named_tensors: Iterable[tuple[str, Tensor]], shapes: dict[str, torch.Size], student: str
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, up to the first that does not belong to the engine's student.

    vLLM drops some names that it does not know without a word (an untied `lm_head` of a model that ties it).

    Raises:
        ValueError: naming the parameter, and what the engine has instead.
    """
    for name, tensor in named_tensors:
        if name not in shapes:
            close = difflib.get_close_matches(name, shapes, n=1)
            raise ValueError(
                f"the live student's parameter {name!r} is not one of {student!r}, which its engine was started with"
                f"{f' (which has {close[0]!r})' if close else ''}: a wrapper has renamed it, or the architectures differ. Give "
                "OSDGeneration the model that the wrapper wraps, and start the engine from the model that is trained"
            )
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"the live student's parameter {name!r} has shape {list(tensor.shape)}, and {list(shapes[name])} in "
                f"{student!r}, which its engine was started with. Start the engine from the model that is trained (save it "
                "first, if its embeddings were resized or its layers changed)"
            )
        yield name, tensor


def merged_parameters(model: Any, *, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the model under a PEFT adapter, the adapter merged into it, under the model's own names.

    With `trained_only`, those alone that training changes: of layers that have an adapter, or trained themselves.

    TRL merges the whole model and unmerges it afterwards, `w += d; w -= d`, which moves the frozen weights by a rounding
    error at every sync. Here one layer at a time is merged, copied and put back as it was, to the bit.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, parameter in model.named_parameters():
        if model.prefix in name or "original_module" in name:
            continue  # the adapter itself; what `modules_to_save` replaced
        holder, _, leaf = name.rpartition(".base_layer.")
        layer = model.get_submodule(holder) if holder else None
        if trained_only and layer is None and not parameter.requires_grad:
            continue
        tensor = _merged(layer, leaf) if isinstance(layer, BaseTunerLayer) else parameter.detach()
        yield name.removeprefix("base_model.model.").replace(".base_layer", "").replace("modules_to_save.default.", ""), tensor


def frozen_state(model: Any) -> list[tuple[int, int]]:
    """Changes when a frozen parameter of the model is written to or replaced, but for writes through `.data`."""
    return [(p.data_ptr(), p._version) for p in model.parameters() if not p.requires_grad]


@torch.no_grad()
def _merged(layer: Any, leaf: str) -> Tensor:
    """One parameter of a layer with its active adapters merged, as a copy; the layer is left as it was."""
    base: nn.Module = layer.get_base_layer()
    kept = {name: parameter.detach().clone() for name, parameter in base.named_parameters(recurse=False)}
    layer.merge()
    try:
        return base.get_parameter(leaf).detach().clone()
    finally:
        layer.unmerge()
        for name, tensor in kept.items():
            base.get_parameter(name).data.copy_(tensor)
