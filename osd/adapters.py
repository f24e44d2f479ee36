"""PEFT adapters: the plain model's parameters with the active adapters merged into copies, under the plain model's names.

TRL merges the whole model and unmerges it afterwards, `w += d; w -= d`, which moves the frozen weights by a rounding error at
every sync. Here a layer is merged into a copy; the frozen weights keep every bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One parameter of the plain model.

    Attributes:
        name: in the plain model.
        parameter: the value without adapters (of a module in `modules_to_save`: the trained one).
        layer: the PEFT layer whose active adapters change this parameter, or None.
        leaf: the parameter's name inside the layer's base module.
    """

    name: str
    parameter: Tensor
    layer: Any = None
    leaf: str = ""

    @property
    def changes(self) -> bool:
        """True if training may change this weight. A bias beside a plain LoRA matrix is not changed by the adapter."""
        adapted = self.layer is not None and (self.leaf == "weight" or not _is_plain(self.layer))
        return adapted or self.parameter.requires_grad

    def merged(self) -> Tensor:
        """The value that the model computes with; a copy if an adapter changes it."""
        if self.layer is None or (self.leaf != "weight" and _is_plain(self.layer)):
            return self.parameter.detach()
        return merge_plain(self.layer) if _is_plain(self.layer) else merge_by_peft(self.layer, self.leaf)


def plain_weights(model: Any) -> list[Weight]:
    """List every parameter of the model under its PEFT adapters, a parameter that several modules share once.

    A shared parameter that an adapter changes for one of its modules only is listed once for each: the adapter unties them.
    """
    found: dict[tuple[int, Any], Weight] = {}
    for weight in _walk(model.get_base_model(), ""):
        found.setdefault((id(weight.parameter), _identity(weight.layer, model)), weight)
    return list(found.values())


def _walk(module: nn.Module, name: str, layer: Any = None, leaf: str = "") -> Iterator[Weight]:
    if isinstance(module, BaseTunerLayer):
        if layer is not None:
            raise ValueError(f"the student has two adapters inside each other on {name}; merge one of them into the model")
        yield from _walk(module.base_layer, name, module if _acts(module) else None)  # type: ignore[arg-type]
        return
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _walk(_chosen(module), name, layer, leaf)
        return
    for own, parameter in module._parameters.items():
        if parameter is not None:
            yield Weight(name=_join(name, own), parameter=parameter, layer=layer, leaf=_join(leaf, own))
    for own, child in module._modules.items():
        if child is not None:
            yield from _walk(child, _join(name, own), layer, _join(leaf, own))


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _acts(layer: Any) -> bool:
    """Return True if the layer computes with an adapter that is not merged into its base weight already."""
    return not (layer.disable_adapters or layer.merged) and any(
        adapter in getattr(layer, kind)
        for adapter, kind in itertools.product(layer.active_adapters, layer.adapter_layer_names)
        if isinstance(getattr(layer, kind, None), (nn.ModuleDict, nn.ParameterDict))
    )


def _chosen(wrapper: Any) -> nn.Module:
    """The module that a wrapper of PEFT computes with: a trained copy, an adapter for some tokens, or the original."""
    if not isinstance(wrapper, ModulesToSaveWrapper):
        return wrapper.token_adapter
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return wrapper.original_module
    return wrapper.modules_to_save[wrapper.active_adapters[0]]


def _identity(layer: Any, model: Any) -> Any:
    """A key that is equal for layers which PEFT keeps tied, and else differs from layer to layer."""
    if isinstance(layer, TrainableTokensLayer):
        return id(layer.tied_adapter or layer)
    if layer is None:
        return None
    configs = [model.peft_config[adapter] for adapter in layer.active_adapters if adapter in model.peft_config]
    return "tied" if all(getattr(config, "ensure_weight_tying", False) for config in configs) else id(layer)


# -- merging ------------------------------------------------------------------------------------------------------------


def _is_plain(layer: Any) -> bool:
    """LoRA's A and B on a matrix, and nothing else: no variant (DoRA, ...), no bias of the adapter."""
    return (
        type(layer) is LoraLinear
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and type(layer.base_layer) in (nn.Linear, Conv1D)
    )


@torch.no_grad()
def merge_plain(layer: Any) -> Tensor:
    """Merge a plain LoRA layer with its active adapters: W + Σ scaling·B·A as a new tensor, one or two launches per adapter.

    As in PEFT the product has the dtype of A and B. The sum is rounded to the dtype of W once per adapter.
    """
    merged = layer.base_layer.weight
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        a, b, scaling = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
        left, right = (a.t(), b.t()) if layer.fan_in_fan_out else (b, a)
        if left.dtype == merged.dtype:
            merged = torch.addmm(merged, left, right, alpha=scaling)
        else:
            out = torch.empty_like(merged, requires_grad=False)
            merged = torch.add(merged, left @ right, alpha=scaling, out=out)
    return merged.detach()


@torch.no_grad()
def merge_by_peft(layer: Any, leaf: str) -> Tensor:
    """Return a copy of one parameter with its active adapters merged by PEFT; restore the layer bit for bit."""
    base: nn.Module = layer.get_base_layer()
    kept = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    layer.merge()
    try:
        return base.get_parameter(leaf).detach().clone()
    finally:
        layer.unmerge()
        for name, tensor in kept.items():
            base.get_parameter(name).data.copy_(tensor)


# -- adapters that the engine's plain student cannot follow -------------------------------------------------------------


def check_mergeable(model: Any) -> None:
    """Refuse adapters that are not a change of the plain model's weights.

    Raises:
        ValueError: trained parameters outside the model's layers (prompt tuning, routers), or a kind of layer that PEFT cannot
            merge (4-bit, activated LoRA, ...), by name.
    """
    weights = plain_weights(model)
    reached = {id(weight.parameter) for weight in weights}
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            reached.update(id(parameter) for parameter in module.parameters())  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in reached:
            raise ValueError(
                f"the student trains {name}, which no weight of the plain model can express, so its engine would sample "
                "without it; use an adapter on the model's layers, such as LoraConfig"
            )
    for weight in _one_of_each_kind(weights):
        _check_merges(weight)


def _one_of_each_kind(weights: list[Weight]) -> list[Weight]:
    kinds: dict[Any, Weight] = {}
    for weight in weights:
        if weight.layer is not None:
            variants = getattr(weight.layer, "lora_variant", {}).values()
            kinds.setdefault((type(weight.layer), *(type(variant) for variant in variants)), weight)
    return list(kinds.values())


def _check_merges(weight: Weight) -> None:
    if weight.parameter.is_meta or not weight.parameter.numel():  # in shards: the first sync checks it
        return
    try:
        weight.merged()
    except Exception as error:
        kind = f"{type(weight.layer).__module__}.{type(weight.layer).__name__}"
        raise ValueError(
            f"the student's adapter on {weight.name} ({kind}) cannot be merged into a copy ({error}), and its engine has no "
            "adapters of its own; use plain LoRA or DoRA on a model that is not quantized"
        ) from error
