"""Pushing a live student into its engine."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from vllm.platforms import current_platform


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
