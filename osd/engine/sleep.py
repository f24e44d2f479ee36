"""Sleep mode for a pair: both models' weights and KV caches off the GPU, and back, at the same addresses.

vLLM's level 1 backs up what was allocated under the tag "weights" in host memory, and drops everything else. Both models have
that tag: beside the student's weights, which a sync could bring back, there is memory that nothing could (rotary caches,
ALiBi slopes, constants of the attention). Both KV caches are dropped, and vLLM's engine core resets both prefix caches with
them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


class SleepingPair:
    """What :class:`osd.engine.worker.PairWorker` changes of vLLM's worker to sleep; a mix-in before it."""

    model_runner: Any
    student_runner: Any
    vllm_config: Any
    device: torch.device

    @property
    def _can_sleep(self) -> bool:
        return self.vllm_config.model_config.enable_sleep_mode

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager:
        """Where the weights or the KV cache of the model that is being built are allocated."""
        if self.model_runner is not getattr(self, "student_runner", None) or not self._can_sleep:
            return super()._maybe_get_memory_pool_context(tag)  # type: ignore[misc]
        # vLLM's own would take the teacher's weights for another engine's; and it keeps one pool per tag alive.
        return _allocator().use_memory_pool(tag=f"student_{tag}")

    def _keep_cublas_awake(self) -> None:
        """cuBLAS allocates a workspace at its first use, which must not be in a pool: a trainer uses it meanwhile."""
        if self._can_sleep:
            torch.mm(torch.zeros(8, 8, device=self.device), torch.zeros(8, 8, device=self.device))

    def _back_up_student(self) -> None:
        """From now on, what the student has allocated is backed up in sleep, as the teacher's is."""
        if self._can_sleep:
            for data in _allocator().pointer_to_data.values():
                if data.tag == "student_weights":
                    data.tag = "weights"

    def sleep(self, level: int = 1) -> None:
        """Give the memory of both sides' weights and caches back.

        Raises:
            ValueError: another level than 1; vLLM's level 2 would lose the teacher.
        """
        if level != 1:
            raise ValueError(f"sleep level={level}: a pair sleeps at level 1, which keeps both models on the host")
        super().sleep(level)  # type: ignore[misc]

    @torch.inference_mode()
    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take the memory again, both models as they were and the caches zero: attention multiplies what it masks by zero,
        and whatever else the memory holds would do, but for NaN.

        Raises:
            ValueError: ``tags`` that leave a part asleep.
        """
        if tags is not None:
            raise ValueError(f"wake_up tags={tags}: a pair wakes up whole; leave them out")
        torch.accelerator.empty_cache()  # what a trainer in this process no longer uses
        super().wake_up(tags)  # type: ignore[misc]
        for runner in (self.model_runner, self.student_runner):
            for cache in runner.kv_caches:
                cache.zero_()


def _allocator() -> Any:
    from vllm.device_allocator import get_mem_allocator_instance  # loads CUDA's runtime, so only where it is used

    return get_mem_allocator_instance()
