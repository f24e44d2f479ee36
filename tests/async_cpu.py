"""Async scheduling on a CPU, for tests: vLLM turns it off there, and CI could not run the engine as GPUs run it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def allow_async_scheduling() -> None:
    """Let an engine on a CPU use async scheduling if its arguments say ``async_scheduling=True``."""
    import osd.engine.backend  # noqa: F401, I001  selects model runner V2, so it comes before vLLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    wanted = SimpleNamespace(now=False)
    create = EngineArgs.create_engine_config
    platform = type(current_platform)
    check = platform.check_and_update_config

    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        before, wanted.now = wanted.now, self.async_scheduling is True
        try:
            return create(self, *args, **kwargs)
        finally:
            wanted.now = before

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        check(vllm_config)
        if wanted.now:
            vllm_config.scheduler_config.async_scheduling = True

    EngineArgs.create_engine_config = create_engine_config
    platform.check_and_update_config = classmethod(check_and_update_config)
