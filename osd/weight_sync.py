"""Sync the trainer's live student into its engine: the `sync_weights()` half of TRL's generator contract."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from transformers import AutoConfig, AutoModelForCausalLM
from trl.generation.vllm_generation import VLLMGeneration

if TYPE_CHECKING:
    from osd.engine.engine import PairConfig, PairEngine

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


class LiveStudent(VLLMGeneration):
    """TRL's generator with its walk over the parameters (FSDP, DeepSpeed ZeRO-3), and a pair's engine at the end of it.

    Attributes:
        engine: the pair whose student follows `model`; `pair`: what it was started from, or the same engine.
        lora_sync: "merged" or "adapter", as in `osd.generation.OSDGeneration`.
        sync_seconds: of the syncs since somebody set it to 0.
    """

    engine: PairEngine
    pair: PairConfig | PairEngine
    lora_sync: str
    sync_seconds: float = 0.0
    _synced: bool = False
    _asked: tuple[Any, bool] = None, False  # a model, and whether it has an adapter
    _last_sync: tuple[int, list[tuple[int, int]]] | None = None  # weights version, and the frozen weights' state

    def sync_weights(self) -> None:
        """Push the live student into its engine, in one call; its prefix cache is reset, the teacher's is not.

        Of a student under LoRA, only the layers with an adapter are pushed again after the first sync, merged on the way; or
        its A and B alone, with `lora_sync="adapter"`. An engine that sleeps is woken first.
        The next batch says how long it took. If it fails, `generate` refuses to sample until a sync succeeds.

        Raises:
            ValueError: a parameter that the engine's student does not have, or in another shape; parameters missing.
        """
        start = time.perf_counter()
        self._synced = False
        self.engine.wake_up()
        partial = self._walks_adapter and self._only_adapter_moved()
        # Generators, so that sharded parameters are gathered one at a time while vLLM copies them.
        parameters = self._iter_lora_params(trained_only=True) if partial else self._iter_named_params()
        if self._shapes is not None:
            parameters = checked(parameters, self._shapes, self.engine.config.student)
        adapter = adapter_parameters(self.model) if self.lora_sync == "adapter" else ()
        stay = not (self._adapted or self._sharded)  # the others make each tensor as it is asked for
        try:
            version = self.engine.load_student_weights(parameters, partial=partial)
        except BaseException:
            self._last_sync = None
            self._unmerge_adapter()
            raise
        if self._walks_adapter:
            self._last_sync = version, frozen_state(self.model)  # after it: merging may move what it puts back
        self._synced = True
        self.sync_seconds += time.perf_counter() - start

    @cached_property
    def _shapes(self) -> dict[str, torch.Size] | None:
        config = self.engine.config
        return expected_shapes(config.student, {**config.engine_kwargs, **config.student_kwargs})

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._walks_adapter:
            return self._iter_lora_params()
        if self._sharded:
            return super()._iter_named_params()
        return ((self._fix_param_name_to_vllm(name), p.data) for name, p in self.model.named_parameters())

    def _iter_lora_params(self, *, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        return lora_parameters(self.model, merged=self.lora_sync == "merged", trained_only=trained_only)

    def _iter_fsdp1_params(
        self, module: Any, prefix: str = "", visited: set[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        if visited is None:
            # FSDP takes the first module that is used for the root, and TRL's walk begins with the leaves: before the first
            # forward pass it would fail.
            with FSDP.summon_full_params(module, recurse=False, writeback=False):
                pass
        yield from super()._iter_fsdp1_params(module, prefix, visited)

    def _fix_param_name_to_vllm(self, name: str, extra_prefixes: list[str] | None = None) -> str:
        return super()._fix_param_name_to_vllm(name, [*(extra_prefixes or []), "_orig_mod."])  # torch.compile's

    def _only_adapter_moved(self) -> bool:
        """Since this object's last sync, nobody has pushed weights to the engine or written to the frozen ones."""
        engine = self.engine
        return engine.student_is_whole and self._last_sync == (engine.weights_version, frozen_state(self.model))

    @property
    def _walks_adapter(self) -> bool:
        """There is an adapter, and it is not merged by TRL's walk."""
        return self._adapted and not self._sharded

    @property
    def _adapted(self) -> bool:
        if self._asked[0] is not self.model:  # not every time: accelerate reads a package's metadata to answer, in about 1 ms
            self._asked = self.model, is_peft_model(self.model)
        return self._asked[1]

    @property
    def _sharded(self) -> bool:
        return self._dist.is_fsdp or self._dist.is_zero3

    def _unmerge_adapter(self) -> None:
        # TRL's walk merges LoRA before it and unmerges after it; a failure in between would leave the trained model merged.
        if self._adapted and self._sharded:
            self.model.unmerge_adapter()  # type: ignore[operator]

    def _adapter_kwargs(self) -> dict[str, Any]:
        """Engine arguments of a student that can hold the live one's adapter; a running engine must have them."""
        from osd.engine.adapter import adapter_kwargs, check_holds

        if not self._walks_adapter:
            raise ValueError("lora_sync='adapter' is for LoRA students (PEFT), not sharded (FSDP, ZeRO-3); use 'merged'")
        kwargs = adapter_kwargs(adapter_ranks(self.model))
        if (running := getattr(self.pair, "config", None)) is not None:
            check_holds(running.student_kwargs, kwargs)
        return kwargs
