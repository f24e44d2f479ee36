"""TwoModelWorker: one vLLM worker process that holds two model runners on the same device.

``self.model_runner`` is the teacher's, built by vLLM. ``self.student_runner`` is built here from the student's ``VllmConfig``.
Each has its own weights, KV cache, compile artefacts and CUDA graphs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.kv_cache_interface import KVCacheConfig

from osd.engine.backend import cpu
from osd.engine.backend.configuration import StudentCache, request_bytes, shared_length, student_vllm_config
from osd.engine.backend.output_layer import output_layer_rows, whole_output_layer
from osd.engine.backend.release import free, release_transformers_classes
from osd.engine.backend.side_scheduler import zeroed_blocks
from osd.engine.backend.student_weights import StudentWeights
from osd.engine.backend.weight_transfer import transfer_engine

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

# Attributes of vLLM's Worker that it reads when it builds, profiles or warms up its model runner.
_CONFIG_ATTRIBUTES = ("model_config", "cache_config", "load_config", "scheduler_config", "compilation_config")

workers: weakref.WeakSet[TwoModelWorker] = weakref.WeakSet()  # those of this process that are not shut down yet


class TwoModelWorker(Worker):
    """vLLM's worker of this platform with a second model: building, memory, weights, sleep and shutdown of both."""

    vllm_config: VllmConfig
    distributed_init_method: str
    model_runner: Any
    student_runner: Any

    # -- building both sides ----------------------------------------------------------------------------------------

    def init_device(self) -> None:
        workers.add(self)
        cpu.install_kernels()
        self.distributed_init_method = cpu.init_method_of_this_run(self.distributed_init_method)
        self.student_config = student_vllm_config(self.vllm_config)
        super().init_device()
        with set_current_vllm_config(self.student_config):
            self.student_runner = type(self.model_runner)(self.student_config, self.device)
        self.student_weights = StudentWeights(self.student_runner, self.student_config, self.as_student)
        self._student_graph_pool: Any = None

    @contextmanager
    def as_student(self) -> Iterator[None]:
        """Run the body with the student in the teacher's place, so that vLLM's own worker code serves both.

        The student's CUDA graphs get their own memory pool: vLLM's one pool is only for graphs that never run at the same time.
        """
        platform: Any = type(current_platform)
        own = {name: getattr(self, name) for name in ("vllm_config", "model_runner", *_CONFIG_ATTRIBUTES)}
        self.vllm_config, self.model_runner = self.student_config, self.student_runner
        for name in _CONFIG_ATTRIBUTES:
            setattr(self, name, getattr(self.student_config, name))
        graph_pool, platform._global_graph_pool = platform._global_graph_pool, self._student_graph_pool
        try:
            with set_current_vllm_config(self.student_config):
                yield
        finally:
            self._student_graph_pool, platform._global_graph_pool = platform._global_graph_pool, graph_pool
            for name, value in own.items():
                setattr(self, name, value)

    def load_model(self, **kwargs: Any) -> None:
        # vLLM would make its weight transfer engine for the teacher.
        with mock.patch.object(self.vllm_config, "weight_transfer_config", None):
            super().load_model(**kwargs)
        self.weight_transfer_engine = transfer_engine(self.vllm_config, self.device, self.student_weights.add)
        with self.as_student(), cpu.keep_weights():
            super().load_model(**kwargs)
        for runner in (self.model_runner, self.student_runner):
            release_transformers_classes(runner.get_model())

    def get_kv_cache_spec(self) -> dict[str, Any]:
        config, teacher = self.student_config, super().get_kv_cache_spec()
        current_platform.update_block_size_for_backend(config)  # vLLM's executors do it for the teacher
        with self.as_student():
            specs = super().get_kv_cache_spec()
            resolve_kv_cache_layout(config, [self.get_supported_kv_cache_layouts()], specs.values())
        self.student_cache = StudentCache(specs, config.cache_config)
        return self.student_cache.carried_by(teacher)

    def set_kv_cache_layout(self, layout: str, *args: Any) -> None:
        super().set_kv_cache_layout(layout, *args)
        with self.as_student():
            super().set_kv_cache_layout(self.cache_config.kv_cache_layout, *args)

    def determine_available_memory(self) -> int:
        """Return bytes for the teacher's KV cache, such that as many requests of the student's fit beside it."""
        with self._profile_both():
            total = super().determine_available_memory()
        length = shared_length(self.vllm_config, self.student_config)
        teacher = request_bytes(self.vllm_config, self.model_runner.get_kv_cache_spec(), length)
        student = request_bytes(self.student_config, self.student_cache.specs, length)
        return total * teacher // (teacher + student)

    @contextmanager
    def _profile_both(self) -> Iterator[None]:
        """Make vLLM's memory profile count both models' weights and activations."""
        runner = self.model_runner
        profile_teacher, weights = runner.profile_run, getattr(runner, "model_memory_usage", 0)

        def profile_both(*args: Any, **kwargs: Any) -> None:
            with self.as_student():
                self.student_runner.profile_run(*args, **kwargs)
            profile_teacher(*args, **kwargs)

        runner.profile_run = profile_both
        runner.model_memory_usage = weights + getattr(self.student_runner, "model_memory_usage", 0)
        try:
            yield
        finally:
            del runner.profile_run
            runner.model_memory_usage = weights

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        student, _ = self.student_cache.plan(self.student_config, self.vllm_config, kv_cache_config)
        with zeroed_blocks():
            super().initialize_from_config(kv_cache_config)
            with self.as_student():
                super().initialize_from_config(student)

    def warm_up_student(self) -> None:
        with self.as_student(), mock.patch.object(self, "_maybe_activate_jit_monitor", create=True):
            super().compile_or_warm_up_model()

    # -- weights ----------------------------------------------------------------------------------------------------

    def load_student_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]] | bytes, partial: bool = False) -> int:
        """Replace every weight of the student, or with ``partial`` those given; return the new version."""
        return self.student_weights.load(named_tensors, partial=partial)

    # vLLM's weight transfer: the same load in three calls, from a trainer in another process.

    def start_weight_update(self, partial: bool = False) -> int:
        """Begin a load of the student's weights, also after one that never finished; return the new version."""
        if self.weight_transfer_engine is None:
            raise RuntimeError("this engine takes no weights: it was started without weight_transfer_config")
        self.student_weights.begin(partial=partial)
        self._weight_update_active = False
        super().start_weight_update()
        return self.student_weights.version

    def finish_weight_update(self) -> int:
        """End a load; return the version.

        Raises:
            ValueError: parameters are missing.
        """
        super().finish_weight_update()
        return self.student_weights.end()

    def teacher_lm_head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the teacher's output layer, weight [V, H] and bias [V] or None: by reference, or gathered from its shards."""
        return whole_output_layer(self.model_runner.get_model(), self.model_config)

    def teacher_head_rows(self, start: int, stop: int) -> bytes:
        """Return rows ``start`` to ``stop`` of the teacher's output layer as bytes, or those of them that this rank has."""
        return output_layer_rows(self.model_runner.get_model(), self.model_config, start, stop)

    # -- sleep ------------------------------------------------------------------------------------------------------

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager:
        """Return where the weights or the KV cache of the model being built are allocated."""
        is_student = self.model_runner is getattr(self, "student_runner", None)
        if not (is_student and self.vllm_config.model_config.enable_sleep_mode):
            return super()._maybe_get_memory_pool_context(tag)
        # vLLM's own raises: it takes the teacher's weights for those of another engine.
        return _allocator().use_memory_pool(tag=tag)

    def sleep(self, level: int = 1) -> None:
        """Free the memory of both sides' weights and caches; the weights are backed up on the host, the caches are lost."""
        if level != 1:
            raise ValueError(f"sleep level={level}: a pair sleeps at level 1, which keeps both models on the host")
        super().sleep(level)

    @torch.inference_mode()
    def wake_up(self, tags: list[str] | None = None) -> None:
        """Restore both models and zero both KV caches: attention multiplies masked slots by 0, and 0 × NaN is NaN."""
        if tags is not None:
            raise ValueError(f"wake_up tags={tags}: a pair wakes up whole; leave them out")
        torch.accelerator.empty_cache()  # return what a trainer in this process no longer uses
        super().wake_up(tags)
        for runner in (self.model_runner, self.student_runner):
            for cache in runner.kv_caches:  # a layer's tensor, or the list of its recurrent states
                for tensor in cache if isinstance(cache, list) else [cache]:
                    tensor.zero_()

    # -- the end ----------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Free both models and their KV caches even if something still references them (a traceback, torch.compile)."""
        workers.discard(self)
        runners = [runner for name in ("student_runner", "model_runner") if (runner := getattr(self, name, None))]
        models = [runner.get_model() for runner in runners if getattr(runner, "model", None) is not None]
        for runner in runners:
            runner.execute_model_state = None
        try:
            if len(runners) == 2:
                self.student_runner.shutdown()
        finally:
            try:
                super().shutdown()  # waits for the device
            finally:
                for model in models:
                    free(model)


def _allocator() -> Any:
    from vllm.device_allocator import get_mem_allocator_instance  # loads CUDA's runtime

    return get_mem_allocator_instance()
