"""Loads of a live student's weights into its engine's model."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

import torch

# A buffer in transformers, which no optimizer changes, and a parameter in vLLM: the bias that balances experts.
_CONSTANT = "e_score_correction_bias"


class WeightLoad:
    """One load of Hugging Face named tensors into a vLLM model, in one part or several."""

    def __init__(self, model: Any, *, partial: bool) -> None:
        """Begin a load; ``partial``: of some parameters, while the others stay as they are."""
        self.model, self.partial = model, partial
        self._given: set[tuple[str, ...]] = set()
        self._loaded: set[str] = set()

    @torch.no_grad()
    def add(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load these tensors."""
        self._loaded |= set(self.model.load_weights(self._watched(named_tensors)))

    def _watched(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_tensors:
            self._given.add(_place(name))
            yield name, tensor

    def check_complete(self) -> None:
        """Check that every parameter was loaded, unless the load is partial.

        Raises:
            ValueError: parameters, or parts of fused ones (q, k, v; gate, up), that the tensors did not cover.
        """
        if self.partial:
            return
        missing = {name for name, _ in self.model.named_parameters() if not name.endswith(_CONSTANT)} - self._loaded
        fused = [name for name in self._loaded if _place(name) not in self._given]  # the others came as one tensor
        missing |= {part for name in fused for part in _parts(self.model, name) if _place(part) not in self._given}
        if missing:
            raise ValueError(
                f"the weight sync left {len(missing)} of the student's parameters as they were: {sorted(missing)[:5]} ...; "
                "push every parameter under its Hugging Face name"
            )


def _parts(model: Any, name: str) -> list[str]:
    """Return the names that a fused vLLM parameter has in a checkpoint; none for a parameter that is not fused."""
    for fused, parts in getattr(model, "packed_modules_mapping", {}).items():
        if f".{fused}." in name:
            return [name.replace(f".{fused}.", f".{part}.") for part in parts]
    return []


def _place(name: str) -> tuple[str, ...]:
    """Return the indices and the last two words of a parameter's name: what vLLM and Hugging Face have in common."""
    words = name.split(".")
    return (*(word for word in words if word.isdigit()), *words[-2:])


def dump_weights(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> bytes:
    """Return named tensors as bytes: vLLM's messages between processes would turn tensors into lists."""
    buffer = io.BytesIO()
    torch.save({name: tensor.detach().cpu() for name, tensor in named_tensors}, buffer)
    return buffer.getvalue()


def load_weights(data: bytes) -> Iterable[tuple[str, torch.Tensor]]:
    """Return the named tensors of :func:`dump_weights`."""
    return torch.load(io.BytesIO(data), weights_only=True).items()
