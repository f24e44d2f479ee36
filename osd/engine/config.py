"""From a :class:`PairConfig` to vLLM's configuration of the teacher's engine and of the student inside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import SchedulerConfig, VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from osd.core import MixingConfig

ADDITIONAL_CONFIG_KEY = "osd"
WORKER_CLS = "osd.engine.worker.PairWorker"
SCHEDULER_CLS = "osd.engine.scheduler.PairScheduler"

# The pair owns these: a user's value would silently take the pair apart.
RESERVED_KWARGS = ("worker_cls", "scheduler_cls", "model")
# The two sides run as one: what these set must be the same for both.
SHARED_KWARGS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "distributed_executor_backend",
    "async_scheduling",
    "block_size",
    "max_num_seqs",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "enable_sleep_mode",
)
# Not implemented for a pair; a clear refusal beats a wrong distribution.
UNSUPPORTED_KWARGS = ("speculative_config", "kv_transfer_config")


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """Two models, how they are mixed, and the vLLM engine arguments of each.

    Attributes:
        teacher, student: path or model id; both must have the same tokenizer.
        mixing: how α is chosen and how the two policies are mixed.
        engine_kwargs: vLLM ``EngineArgs`` for both sides (``max_model_len``, ``dtype``, ``gpu_memory_utilization``: the
            memory of both together, ...).
        teacher_kwargs, student_kwargs: overrides for one side (``quantization``, ``max_model_len``, ...).
        overlap: on a GPU, run the student's forward beside the teacher's where the two can (one device, dense models).

    Raises:
        ValueError: an engine argument that the pair owns, cannot do, or that cannot differ between the sides.
    """

    teacher: str
    student: str
    mixing: MixingConfig = field(default_factory=MixingConfig)
    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    student_kwargs: dict[str, Any] = field(default_factory=dict)
    overlap: bool = True

    def __post_init__(self) -> None:
        for name in ("engine_kwargs", "teacher_kwargs", "student_kwargs"):
            self._check_kwargs(name, getattr(self, name))
        for name in ("teacher_kwargs", "student_kwargs"):
            for key in set(getattr(self, name)) & set(SHARED_KWARGS):
                raise ValueError(f"{name}[{key!r}] cannot differ between teacher and student; set it in engine_kwargs")
        self._check_lora()

    @staticmethod
    def _check_kwargs(name: str, kwargs: dict[str, Any]) -> None:
        for key in kwargs:
            if key in RESERVED_KWARGS:
                raise ValueError(f"{name}[{key!r}] is set by the pair itself; remove it")
            if key in UNSUPPORTED_KWARGS and kwargs[key]:
                raise ValueError(f"{name}[{key!r}]={kwargs[key]!r} is not supported by the paired engine; remove it")
            if key == "pipeline_parallel_size" and kwargs[key] != 1:
                raise ValueError(f"{name}[{key!r}]={kwargs[key]!r}: the paired engine has no pipeline parallelism; use 1")
            if key not in EngineArgs.__dataclass_fields__:
                raise ValueError(f"{name}[{key!r}] is not an engine argument of the installed vLLM")

    def _check_lora(self) -> None:
        """The student alone may have an adapter, on layers that are named, where vLLM's LoRA layers can compute it."""
        for name in ("engine_kwargs", "teacher_kwargs"):
            if getattr(self, name).get("enable_lora"):
                raise ValueError(f"{name}['enable_lora'] is not supported: only the student's engine can hold an adapter")
        if not self.student_kwargs.get("enable_lora"):
            return
        if not self.student_kwargs.get("lora_target_modules"):
            raise ValueError("student_kwargs['enable_lora'] needs 'lora_target_modules' beside it: the layers with an adapter")
        if self.engine_kwargs.get("tensor_parallel_size", 1) != 1:
            raise ValueError("student_kwargs['enable_lora'] is not supported with tensor_parallel_size > 1; merge the adapter")
        dtype = {**self.engine_kwargs, **self.student_kwargs}.get("dtype")
        if current_platform.is_cuda_alike() and dtype in ("float32", "float", torch.float32):
            raise ValueError(
                f"student_kwargs['enable_lora'] with dtype={str(dtype)!r}: vLLM's LoRA layers compute in 16 bits on a GPU; use "
                "'bfloat16', or merge the adapter"
            )

    def teacher_engine_args(self) -> dict[str, Any]:
        """Engine arguments of the engine as vLLM sees it: the teacher's, with the pair plugged in."""
        kwargs = {**self.engine_kwargs, **self.teacher_kwargs}
        additional = {**kwargs.pop("additional_config", {}), ADDITIONAL_CONFIG_KEY: self._additional_config()}
        return {
            **kwargs,
            "model": self.teacher,
            "worker_cls": WORKER_CLS,
            "scheduler_cls": SCHEDULER_CLS,
            "additional_config": additional,
        }

    def _additional_config(self) -> dict[str, Any]:
        student = {**self.engine_kwargs, **self.student_kwargs, "model": self.student}
        return {"student": student, "mixing": self.mixing.to_dict(), "overlap": self.overlap}


def mixing_config(teacher_config: VllmConfig) -> MixingConfig:
    """The mixing that the engine was built with."""
    return MixingConfig.from_dict(_pair_section(teacher_config)["mixing"])


def wants_overlap(teacher_config: VllmConfig) -> bool:
    """Whether the engine was asked to run the two forwards side by side."""
    return _pair_section(teacher_config)["overlap"]


def student_vllm_config(teacher_config: VllmConfig) -> VllmConfig:
    """The student's own ``VllmConfig``, made to run inside the teacher's workers.

    Weights, model, compilation and CUDA graphs are the student's; the process group and the block size are the teacher's, and
    so are the limits of a step where the student has none of its own.
    """
    own = {name: value for name, value in _pair_section(teacher_config)["student"].items() if value is not None}
    config = EngineArgs(**_step_limits(teacher_config.scheduler_config, own) | own).create_engine_config()
    config.parallel_config = teacher_config.parallel_config
    config.device_config = teacher_config.device_config
    config.scheduler_config.async_scheduling = teacher_config.scheduler_config.async_scheduling
    if config.lora_config is not None:
        config.compilation_config.cudagraph_specialize_lora = False  # all batches have the adapter: no graphs without it
    share_block_size(teacher_config, config)
    return config


def _step_limits(teacher: SchedulerConfig, own: dict[str, Any]) -> dict[str, int]:
    """The teacher's, as far as they fit the student's ``own`` engine arguments.

    A side that admits less than the other holds it up, and vLLM's defaults would: they depend on who asks, and are for `LLM` 8
    times what they are otherwise.
    """
    tokens = own.get("max_num_batched_tokens", teacher.max_num_batched_tokens)
    if own.get("enable_chunked_prefill") is False and "max_num_batched_tokens" not in own:
        tokens = max(tokens, EngineArgs(**own).create_model_config().max_model_len)  # prompts are not split
    return {"max_num_seqs": min(teacher.max_num_seqs, tokens), "max_num_batched_tokens": tokens}


def share_block_size(teacher_config: VllmConfig, student_config: VllmConfig) -> None:
    """Give the student the teacher's KV block size, which vLLM may settle only once the teacher's model is built."""
    student_config.cache_config.block_size = teacher_config.cache_config.block_size
    if student_config.cache_config.enable_prefix_caching != teacher_config.cache_config.enable_prefix_caching:
        # A request's block hasher belongs to the engine, so caching is on for both sides or for neither.
        student_config.cache_config.enable_prefix_caching = teacher_config.cache_config.enable_prefix_caching


def _pair_section(teacher_config: VllmConfig) -> dict[str, Any]:
    section = (teacher_config.additional_config or {}).get(ADDITIONAL_CONFIG_KEY)
    if section is None:
        raise ValueError(
            f'additional_config has no "{ADDITIONAL_CONFIG_KEY}" section: {WORKER_CLS} and {SCHEDULER_CLS} are a pair and '
            "are configured by PairConfig.teacher_engine_args()"
        )
    return section


__all__ = ["PairConfig", "mixing_config", "set_current_vllm_config", "share_block_size", "student_vllm_config", "wants_overlap"]
