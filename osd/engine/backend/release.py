"""Release of what vLLM's models hold on to: their memory, and the classes of transformers that they run."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import get_current_vllm_config_or_none


@torch.inference_mode()
def free(model: torch.nn.Module) -> None:
    """Unregister a model from torch's compiler and free its parameters in place; models share some buffers, so those stay."""
    for module in model.modules():
        if isinstance(module, TorchCompileWithNoGuardsWrapper):
            module.cleanup()
    for parameter in model.parameters():
        parameter.data = parameter.new_empty(0)


def release_transformers_classes(model: torch.nn.Module) -> None:
    """Let the process build transformers models of the classes that vLLM runs from transformers' code (GPT-NeoX, Phi).

    Symptom: "Current vLLM config is not set" from ``from_pretrained``. Cause: vLLM decorates the class itself, for
    torch.compile. Versions: 0.32, 0.33. To be removed when vLLM decorates a subclass (tests/test_architectures.py).
    """
    for cls in {type(module) for module in model.modules()}:
        if not cls.__module__.startswith("transformers.") or TorchCompileWithNoGuardsWrapper not in cls.__bases__:
            continue
        decorated: Any = cls.__init__
        closure = inspect.getclosurevars(decorated)
        if (original := closure.nonlocals.get("old_init")) is None:
            continue  # done for the other side

        def __init__(self: Any, *args: Any, decorated: Any = decorated, original: Any = original, **kwargs: Any) -> None:
            if get_current_vllm_config_or_none() is not None:
                decorated(self, *args, **kwargs)
            else:
                original(self, *args, **kwargs)
                self.do_not_compile = True

        def __call__(self: Any, *args: Any, called: Any = cls.__call__, **kwargs: Any) -> Any:
            # vLLM's `__call__` skips hooks.
            return (torch.nn.Module.__call__ if getattr(self, "do_not_compile", True) else called)(self, *args, **kwargs)

        cls.__init__, cls.__call__ = __init__, __call__  # type: ignore[misc, method-assign]
