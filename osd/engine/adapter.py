"""The student's LoRA adapter in its engine, beside frozen weights: one slot of vLLM's LoRA layers, which all requests use.

A sync writes A and B into the layers' own buffers, where CUDA graphs find them. vLLM's registry of adapters only ever holds
zeros, under the one id that every request names: it loads an id once and keeps what it loaded, which would go stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

from torch import Tensor
from vllm.config.lora import LoRAConfig, MaxLoRARanks
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.request import LoRARequest
from vllm.lora.utils import replace_submodule

# With this, a request of the student's goes through the adapter. Nothing is read from the path.
ADAPTER = LoRARequest(lora_name="osd-student", lora_int_id=1, lora_path="/osd/has/no/file/of/it")
_SLOT = 0
_RANKS = sorted(get_args(MaxLoRARanks))


def adapter_kwargs(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The student's engine arguments for an adapter on linear layers, whose ranks are given by their names.

    Raises:
        ValueError: a rank above vLLM's limit.
    """
    rank = max(ranks.values())
    if rank > _RANKS[-1]:
        raise ValueError(f"the adapter has rank r={rank}, and vLLM's LoRA layers at most {_RANKS[-1]}; use lora_sync='merged'")
    return {
        "enable_lora": True,
        "max_lora_rank": next(limit for limit in _RANKS if limit >= rank),
        "lora_target_modules": sorted({name.rpartition(".")[2] for name in ranks}),
    }


def check_holds(student_kwargs: Mapping[str, Any], adapter: Mapping[str, Any]) -> None:
    """Raise a ValueError if a student with these engine arguments has no place for an adapter that needs those."""
    if not (
        student_kwargs.get("enable_lora")
        and set(student_kwargs["lora_target_modules"]).issuperset(adapter["lora_target_modules"])
        and student_kwargs.get("max_lora_rank", LoRAConfig.max_lora_rank) >= adapter["max_lora_rank"]
    ):
        raise ValueError(f"lora_sync='adapter': the running engine was not started with student_kwargs={dict(adapter)!r}")


class StudentAdapter:
    """The adapter of a runner whose ``VllmConfig`` has LoRA; of any other, none, and nothing can be loaded.

    Made after vLLM's warm-up, which ends by removing every adapter.

    Raises:
        ValueError: ``lora_target_modules`` names layers that are not linear.
    """

    def __init__(self, runner: Any) -> None:
        self._layers: dict[str, Any] = {}
        if not runner.lora_config:
            return
        self._manager = runner.lora_manager._adapter_manager
        self._layers = self._manager.modules
        if others := [n for n, layer in self._layers.items() if not isinstance(layer, BaseLinearLayerWithLoRA)]:
            raise ValueError(f"student_kwargs['lora_target_modules'] has {others[0]!r}, which is not a linear layer; remove it")
        runner.lora_manager.add_dummy_lora(ADAPTER, rank=_RANKS[0])
        runner.pin_lora(ADAPTER.lora_int_id)  # into the slot, for good: vLLM would fill it anew from the registry

    def load(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the adapter; layers that are not given have none afterwards.

        Args:
            named_tensors: of every adapted layer, by the name that it has in transformers, ``NAME.lora_A.weight`` [r, in] and
                ``NAME.lora_B.weight`` [out, r]; the scaling is part of B.

        Raises:
            ValueError: a tensor that no layer of the engine's takes, or of another shape; nothing has changed then.
        """
        given = dict(named_tensors)
        found = {name: self._take(name, layer, given) for name, layer in self._layers.items()}
        if given:
            raise ValueError(
                f"the engine's student has no place for {len(given)} tensors of the adapter: {sorted(given)[:3]} ...; start it "
                "with student_kwargs enable_lora=True and these layers in lora_target_modules (linear ones only)"
            )
        for name, layer in self._layers.items():
            a, b = found[name]
            packed = name in self._manager.packed_modules
            if any(part is not None for part in a):
                layer.set_lora(_SLOT, a if packed else a[0], b if packed else b[0])
            else:
                layer.reset_lora(_SLOT)
        if self._layers:
            self._manager._last_mapping = None  # of rows to slots: upload it anew, as vLLM's reset_lora_state does

    def _take(self, name: str, layer: Any, given: dict[str, Tensor]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """A and B of a layer, or of each part of a fused one (q, k, v; gate, up), taken out of what is given."""
        parts = self._manager.packed_modules.get(name, [name])
        if len(parts) != layer.n_slices:
            return [None], [None]  # fused in another way than its parts: what is given for it stays over
        a = [given.pop(f"{part}.lora_A.weight", None) for part in parts]
        b = [given.pop(f"{part}.lora_B.weight", None) for part in parts]
        for part, a_part, b_part, *places in zip(parts, a, b, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
            if a_part is not None and b_part is not None:
                _check_shapes(part, a_part, b_part, *(place[_SLOT, 0] for place in places))
            elif a_part is not b_part:
                raise ValueError(f"the adapter of {part} has one of lora_A and lora_B, and not the other")
        return a, b

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """The model without its LoRA layers, so that ``load_weights`` finds every parameter under its own name."""
        for name, layer in self._layers.items():
            replace_submodule(self._manager.model, name, layer.base_layer)
        try:
            yield
        finally:
            for name, layer in self._layers.items():
                replace_submodule(self._manager.model, name, layer)


def _check_shapes(part: str, a: Tensor, b: Tensor, place_a: Tensor, place_b: Tensor) -> None:
    """vLLM would copy a smaller matrix into a corner of its buffers without a word."""
    (limit, inputs), outputs = place_a.shape, place_b.shape[0]
    if a.shape[1] != inputs or b.shape[0] != outputs or not a.shape[0] == b.shape[1] <= limit:
        raise ValueError(
            f"the adapter of {part} is {list(a.shape)} and {list(b.shape)}, and the engine's student takes [r, {inputs}] and "
            f"[{outputs}, r] with r up to {limit} (max_lora_rank)"
        )
