"""Sleep mode for a pair: both models' weights and KV caches off the GPU, and back, at the same addresses.

vLLM's level 1 backs up what was allocated under the tag "weights" in host memory and drops everything else. The teacher's
weights keep that tag and come back as they were. The student's have another one and are dropped, since they are pushed anew
before the next sample is drawn; until then the worker refuses to sample. Both KV caches are dropped, and vLLM's engine core
resets both prefix caches with them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

_STUDENT = "student_"


class SleepingPair:
    """What :class:`osd.engine.worker.PairWorker` changes of vLLM's worker to sleep; a mix-in before it."""

    model_runner: Any
    student_runner: Any
    weights_loaded: bool
    vllm_config: Any
    _student_buffers: dict[str, torch.Tensor]

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager:
        if self.model_runner is not getattr(self, "student_runner", None) or not self._can_sleep:
            return super()._maybe_get_memory_pool_context(tag)  # type: ignore[misc]
        from vllm.device_allocator import get_mem_allocator_instance

        # vLLM's own would refuse: it takes the teacher's weights for another engine's.
        return get_mem_allocator_instance().use_memory_pool(tag=_STUDENT + tag)

    @property
    def _can_sleep(self) -> bool:
        return self.vllm_config.model_config.enable_sleep_mode

    def sleep(self, level: int = 1) -> None:
        """Give the memory of both sides' weights and caches back.

        Raises:
            ValueError: another level than 1; vLLM's level 2 would lose the teacher.
        """
        if level != 1:
            raise ValueError(f"sleep level={level}: a pair sleeps at level 1, which keeps the teacher's weights on the host")
        self.weights_loaded = False
        self._student_buffers = {name: buffer.cpu() for name, buffer in self._student_model.named_buffers()}
        super().sleep(level)  # type: ignore[misc]

    @torch.inference_mode()
    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take memory again: the teacher's weights as they were; of the student's only its buffers; zeros in both caches.

        Whatever the memory holds would do in the place of zeros, but for NaN: attention multiplies what it masks by zero.
        """
        assert tags is None, "PairEngine wakes all of it"
        super().wake_up(tags)  # type: ignore[misc]
        for parameter in self._student_model.parameters():
            parameter.zero_()
        for name, buffer in self._student_model.named_buffers():
            buffer.copy_(self._student_buffers[name])
        for runner in (self.model_runner, self.student_runner):
            for cache in runner.kv_caches:
                cache.zero_()
            runner.post_kv_cache_wake_up()
        torch.accelerator.synchronize()

    @property
    def _student_model(self) -> torch.nn.Module:
        return self.student_runner.get_model()
