"""Async scheduling on a CPU, for tests: vLLM turns it off there, and the engine that GPUs run could not be tested in CI.

Only what touches CUDA streams is replaced. The schedulers, the queue of steps in flight, the placeholders for tokens that are
not on the host yet and the runners' bookkeeping are vLLM's own, and so is the order in which a step is scheduled, run and
read back.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform


class _Placeholder:
    """A CUDA event or stream on a machine where everything has already happened."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def _nothing(self, *args: object, **kwargs: object) -> None:
        pass

    record = synchronize = wait_stream = _nothing


def allow_async_scheduling() -> None:
    """Let an engine on a CPU have async scheduling if its arguments say ``async_scheduling=True``."""
    wanted = SimpleNamespace(now=False)
    create = EngineArgs.create_engine_config
    platform = type(current_platform)
    check = platform.check_and_update_config

    def create_engine_config(self, *args, **kwargs):
        before, wanted.now = wanted.now, self.async_scheduling is True
        try:
            return create(self, *args, **kwargs)
        finally:
            wanted.now = before

    def check_and_update_config(cls, vllm_config):
        check(vllm_config)
        if wanted.now:
            vllm_config.scheduler_config.async_scheduling = True

    EngineArgs.create_engine_config = create_engine_config
    platform.check_and_update_config = classmethod(check_and_update_config)
    torch.cuda.Event = torch.cuda.Stream = _Placeholder
    torch.cuda.current_stream = _Placeholder
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
