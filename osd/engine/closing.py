"""Closing a pair: the memory of both models goes back to the process, which may start another."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

from osd.engine.forward import SteadyForward

workers: weakref.WeakSet[ClosingPair] = weakref.WeakSet()  # of this process, and not shut down yet


class ClosingPair:
    """What :class:`osd.engine.worker.PairWorker` changes of vLLM's worker to shut down; a mix-in before it."""

    model_runner: Any
    student_runner: Any

    def init_device(self) -> None:
        workers.add(self)
        super().init_device()  # type: ignore[misc]

    def shutdown(self) -> None:
        """Give the memory of both models and their caches back, whoever holds on to this worker or to a model: the process may
        go on without them, and a traceback has frames of both.

        vLLM's own knows of one runner, and trusts that nobody holds its model; torch's compiler does, where it is registered.
        """
        workers.discard(self)
        runners = [runner for name in ("student_runner", "model_runner") if (runner := getattr(self, name, None))]
        models = [runner.get_model() for runner in runners if getattr(runner, "model", None) is not None]
        for runner in runners:
            runner.execute_model_state = None
            if isinstance(steady := vars(runner).get("execute_model"), SteadyForward):
                steady.remove()
        for name in ("student_weights", "student_adapter", "sampler", "student_sampler", "planner", "records"):
            self.__dict__.pop(name, None)
        try:
            if len(runners) == 2:
                self.student_runner.shutdown()
        finally:
            try:
                super().shutdown()  # type: ignore[misc]  # waits for the device
            finally:
                for model in models:
                    _let_go(model)


@torch.inference_mode()
def _let_go(model: torch.nn.Module) -> None:
    """Unregister a compiled model from torch's compiler, and free its weights under whoever holds it.

    Not its buffers: vLLM's models of a process share rotary caches.
    """
    for module in model.modules():
        if isinstance(module, TorchCompileWithNoGuardsWrapper):
            module.cleanup()
    for parameter in model.parameters():
        parameter.data = parameter.new_empty(0)
