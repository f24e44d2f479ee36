"""What the walk over a live student yields: the names and shapes that its engine has, and LoRA merged without touching it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

_PLAIN_LORA = "lora_sync='adapter' takes one adapter of LoRA's A and B on linear layers of the body; use lora_sync='merged'"


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
    from transformers.modeling_utils import set_zero3_state  # not public

    options = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    try:
        with torch.device("meta"), set_zero3_state():  # under DeepSpeed's ZeRO-3 too: whole, and nothing initialized
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


def lora_parameters(model: Any, *, merged: bool = True, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the model under a PEFT adapter, the adapter merged into it or not, under the model's own names.

    With `trained_only`, those alone that training changes: of layers whose adapter is merged, or trained themselves.

    TRL merges the whole model and unmerges it afterwards, `w += d; w -= d`, which moves the frozen weights by a rounding
    error at every sync. Here one layer at a time is merged, copied and put back as it was, to the bit.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, parameter in model.named_parameters():
        if model.prefix in name or "original_module" in name:
            continue  # the adapter itself; what `modules_to_save` replaced
        holder, _, leaf = name.rpartition(".base_layer.")
        layer = model.get_submodule(holder) if holder and merged else None
        if trained_only and layer is None and not parameter.requires_grad:
            continue
        yield _own_name(name), _merged(layer, leaf) if isinstance(layer, BaseTunerLayer) else parameter.detach()


def _own_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace("modules_to_save.default.", "")


def adapter_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The adapter alone: A, and B times its scaling, of every layer that has one, by the layer's name in the model.

    Raises:
        ValueError: as :func:`adapted_layers`; an adapter that is merged at the moment.
    """
    active = model.active_adapter
    for name, layer in adapted_layers(model).items():
        if layer.merged:
            raise ValueError(f"the adapter of the student's {name} is merged; call unmerge_adapter() before a sync")
        yield f"{name}.lora_A.weight", layer.lora_A[active].weight.detach()
        yield f"{name}.lora_B.weight", layer.lora_B[active].weight.detach() * layer.scaling[active]


def adapter_ranks(model: Any) -> dict[str, int]:
    """The rank of every layer's adapter, by the layer's name in the model; raises as :func:`adapted_layers`."""
    return {name: layer.r[model.active_adapter] for name, layer in adapted_layers(model).items()}


def adapted_layers(model: Any) -> dict[str, Any]:
    """PEFT's layers by their names in the model, if all that the model trains is LoRA's A and B on linear layers.

    Raises:
        ValueError: naming what there is beside them: DoRA and other variants, biases, whole modules, embeddings, the head.
    """
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    if len(model.active_adapters) != 1:
        raise ValueError(f"{model.active_adapters} are the student's active adapters; {_PLAIN_LORA}")
    active, head = model.active_adapter, model.get_base_model().get_output_embeddings()
    layers = {
        _own_name(name): layer
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and active in getattr(layer, "scaling", [active])
    }
    for name, layer in layers.items():
        if not isinstance(layer, Linear) or type(layer.get_base_layer()) is not nn.Linear or layer is head:
            raise ValueError(f"the student has an adapter on {name}, a {type(layer.get_base_layer()).__name__}; {_PLAIN_LORA}")
        if variant := layer.lora_variant.get(active):
            raise ValueError(f"the student's adapter of {name} is a {type(variant).__name__}; {_PLAIN_LORA}")
    plain = (f".lora_A.{active}.weight", f".lora_B.{active}.weight")
    for name, parameter in model.named_parameters():
        of_adapter = model.prefix in name and f".{active}." in name
        if (of_adapter or parameter.requires_grad) and not name.endswith(plain):
            raise ValueError(f"the student trains {name}, which is not A or B of its adapter; {_PLAIN_LORA}")
    return layers


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
