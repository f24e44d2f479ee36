"""Pushing a live student into its engine."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from vllm.platforms import current_platform

logger = logging.getLogger(__name__)


@contextmanager
def keep_weights_live() -> Iterator[None]:
    """Load a model whose weights stay where ``load_weights`` can reach them.

    On a CPU, vLLM packs every linear layer for oneDNN after loading and drops the original, so a later ``load_weights``
    would fail on the empty parameters (and change nothing where it did not). The student keeps plain ones.
    Symptom: shape mismatch, or stale logits, after a weight sync. Versions: 0.26 to 0.31. To be removed when vLLM can
    reload packed weights in place.
    """
    if not current_platform.is_cpu():
        yield
        return

    def plain_linear(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = nn.functional.linear

    with mock.patch("vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", plain_linear):
        yield


def load_all_weights(model: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load Hugging Face named tensors into a vLLM model, every parameter of it.

    Raises:
        ValueError: parameters, or parts of fused ones (q, k, v; gate, up), that the tensors did not cover: half a student
            is not a student.
    """
    given: set[str] = set()

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_tensors:
            given.add(name)
            yield name, tensor

    loaded = set(model.load_weights(watched()))
    missing = {name for name, _ in model.named_parameters()} - loaded
    missing |= {part for name in loaded for part in _parts(model, name)} - given
    if missing:
        raise ValueError(
            f"the weight sync left {len(missing)} of the student's parameters as they were: {sorted(missing)[:5]} ...; "
            "push every parameter under its Hugging Face name"
        )


class WeightMap:
    """The student's weights in its engine, loaded again and again.

    vLLM's ``load_weights`` finds for each tensor the parameters, or the parts of fused ones, that it goes to; on a GPU the
    search takes several times as long as the copies. So the first sync is vLLM's own and is watched: every later one repeats
    the copies that it made. Where the first did anything but copy, there is no map, and every sync is ``load_weights``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.sources: dict[str, _Source] | None = None
        self._learnt = False

    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, partial: bool = False, at_once: bool = False) -> None:
        """Replace every weight, or with ``partial`` only those that are given; see ``PairEngine.load_student_weights``.

        Raises:
            ValueError: tensors that are missing, have names of their own, or are not as they were in the first sync.
        """
        if self.sources is not None:
            self._copy(self.sources, named_tensors, partial, at_once)
        elif partial:
            self.model.load_weights(named_tensors)
        elif self._learnt:
            load_all_weights(self.model, named_tensors)
        else:
            self._learn(named_tensors)

    def _learn(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        watch = _Watch(self.model)
        with watch:
            load_all_weights(self.model, watch.sources_of(named_tensors))
        self._learnt = True
        if problem := watch.problem():
            logger.warning("OSD: every weight sync of the student is one load_weights call, which is slower: %s", problem)
        else:
            self.sources = watch.sources

    @staticmethod
    def _copy(
        sources: dict[str, _Source], named_tensors: Iterable[tuple[str, torch.Tensor]], partial: bool, at_once: bool
    ) -> None:
        missing = dict.fromkeys(sources)
        parts: list[torch.Tensor] = []
        views: list[torch.Tensor] = []
        for name, tensor in named_tensors:
            if name not in sources:
                raise ValueError(f"the weight sync has {name!r}, which the first sync had not; push the same names every time")
            for part, view in sources[name].copies(name, tensor):
                if at_once:
                    parts.append(part)
                    views.append(view)
                else:
                    part.copy_(view, non_blocking=True)
            missing.pop(name, None)
        if missing and not partial:
            raise ValueError(
                f"the weight sync left out {len(missing)} tensors that the first had: {list(missing)[:5]} ...; "
                "push every parameter under its Hugging Face name"
            )
        if parts:
            torch._foreach_copy_(parts, views, non_blocking=True)


@dataclass
class _Source:
    """A named tensor and the places that it is copied to: (part of the model, (size, stride and offset in the tensor))."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    places: list[tuple[torch.Tensor, tuple[torch.Size, tuple[int, ...], int]]] = field(default_factory=list)

    def copies(self, name: str, tensor: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The copies to make of it: (part of the model, what goes there, a view of ``tensor`` if it lies as it did)."""
        if tensor.shape != self.shape or tensor.dtype != self.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} in this weight sync and was {self.dtype} {tuple(self.shape)} "
                "in the first; the engine's map holds for one shape and dtype, so keep them or start another engine"
            )
        if tensor.stride() != self.stride:
            tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=tensor.device).copy_(tensor)
        start, whole = tensor.storage_offset(), (self.shape, self.stride, 0)
        return [
            (part, tensor if view == whole else tensor.as_strided(view[0], view[1], start + view[2]))
            for part, view in self.places
        ]


class _Watch(TorchDispatchMode):
    """Writes down every copy from a named tensor into a model's parameters, and whatever else is written into them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sources: dict[str, _Source] = {}
        self._uncovered = {p.untyped_storage().data_ptr(): p.numel() for p in model.parameters()}
        self._given: dict[int, tuple[str, torch.Tensor]] = {}
        self._others: list[str] = []

    def sources_of(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_tensors:
            tensor = tensor.detach()
            self.sources[name] = _Source(tensor.shape, tensor.stride(), tensor.dtype)
            self._given[tensor.untyped_storage().data_ptr()] = name, tensor
            yield name, tensor

    def problem(self) -> str | None:
        """Why the copies alone do not make up the load, if they do not."""
        if self._others:
            return f"loading also did {sorted(set(self._others))[:3]}"
        bare = sum(count != 0 for count in self._uncovered.values())
        return f"{bare} of the model's parameters were not filled by copies" if bare else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        written = [a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info and s.alias_info.is_write]
        for part in written:
            if is_traceable_wrapper_subclass(part):
                continue  # a shard of the live student, which merges an adapter while it is walked; it has no storage to ask
            storage = part.untyped_storage().data_ptr()
            if storage not in self._uncovered:
                continue
            if func is torch.ops.aten.copy_.default and (given := self._given.get(args[1].untyped_storage().data_ptr())):
                name, tensor = given
                source = args[1]
                offset = source.storage_offset() - tensor.storage_offset()
                if not 0 <= offset <= offset + _span(source) <= _span(tensor):
                    self._others.append("copies out of a tensor's turn")
                self.sources[name].places.append((part.detach(), (source.shape, source.stride(), offset)))
            elif func is not torch.ops.aten.fill_.Scalar or args[1] != 0:  # zeros beyond the vocabulary stay zeros
                self._others.append(str(func))
            self._uncovered[storage] -= part.numel()
        return result


def _span(tensor: torch.Tensor) -> int:
    """How much of its storage a tensor reaches over, from its first element on."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _parts(model: nn.Module, name: str) -> list[str]:
    """The names that a fused vLLM parameter has in a checkpoint; empty for one that is not fused."""
    for fused, parts in getattr(model, "packed_modules_mapping", {}).items():
        if f".{fused}." in name:
            return [name.replace(f".{fused}.", f".{part}.") for part in parts]
    return []


def dump_weights(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> bytes:
    """Named tensors as bytes: vLLM's messages between processes would turn tensors into lists."""
    buffer = io.BytesIO()
    torch.save({name: tensor.detach().cpu() for name, tensor in named_tensors}, buffer)
    return buffer.getvalue()


def load_weights(data: bytes) -> Iterable[tuple[str, torch.Tensor]]:
    """The inverse of :func:`dump_weights`."""
    return torch.load(io.BytesIO(data), weights_only=True).items()
