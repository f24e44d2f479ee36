"""PairConfig: two models, their mixing, and the vLLM engine arguments of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from osd.core import MixingConfig, suggest

ADDITIONAL_CONFIG_KEY = "osd"
WORKER_CLS = "osd.engine.backend.worker.PairWorker"
SCHEDULER_CLS = "osd.engine.backend.scheduler.PairScheduler"

# The pair sets these itself.
RESERVED_KWARGS = ("worker_cls", "scheduler_cls", "model")
# Both sides run in one engine, so these cannot differ between them.
SHARED_KWARGS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "distributed_executor_backend",
    "async_scheduling",
    "max_num_seqs",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "enable_sleep_mode",
)
# Refused: a clear error is better than a wrong distribution.
UNSUPPORTED_KWARGS = {
    "speculative_config": "the paired engine has no speculative decoding",
    "kv_transfer_config": "the paired engine has no KV transfer",
    "kv_events_config": "events of the student's cache would be taken for the teacher's",
    "enable_lora": "the engine has no LoRA layers; OSDTrainer merges the student's adapter at every sync",
    "enable_return_routed_experts": "the per-token record travels in its place",
    "weight_transfer_config": "vLLM would load the student's weights into the teacher",
    "watermark_config": "the pair draws its own tokens, without a watermark",
    "sleep_mode_offload_cudagraph": "the two models' CUDA graphs would share one memory pool",
}


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """Two models, their mixing, and the vLLM engine arguments of each.

    Attributes:
        teacher, student: path or model id; both must have the same tokenizer.
        mixing: how α is chosen and how the two policies are mixed.
        engine_kwargs: vLLM ``EngineArgs`` for both sides (``max_model_len``, ``dtype``, ``gpu_memory_utilization``: the
            memory of both together, ...).
        teacher_kwargs, student_kwargs: overrides for one side (``quantization``, ``max_model_len``, ...).
        overlap: on a GPU, run the student's forward pass beside the teacher's where possible (one device, dense models).

    Raises:
        ValueError: an engine argument that the pair sets itself, does not support, or that cannot differ between the sides.
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

    @staticmethod
    def _check_kwargs(name: str, kwargs: dict[str, Any]) -> None:
        from osd.engine.backend.configuration import engine_argument_names

        known = engine_argument_names()
        for key, value in kwargs.items():
            if key in RESERVED_KWARGS:
                raise ValueError(f"{name}[{key!r}] is set by the pair itself; remove it")
            if key in UNSUPPORTED_KWARGS and value:
                raise ValueError(f"{name}[{key!r}]={value!r} is not supported: {UNSUPPORTED_KWARGS[key]}; remove it")
            if key == "pipeline_parallel_size" and value != 1:
                raise ValueError(f"{name}[{key!r}]={value!r}: the paired engine has no pipeline parallelism; use 1")
            if key not in known:
                raise ValueError(f"{name}[{key!r}] is not an engine argument of the installed vLLM{suggest(key, known)}")

    def side_kwargs(self, side: str) -> dict[str, Any]:
        """Return the engine arguments of one side, "teacher" or "student"."""
        return {**self.engine_kwargs, **(self.teacher_kwargs if side == "teacher" else self.student_kwargs)}

    def teacher_engine_args(self) -> dict[str, Any]:
        """Return the arguments of the vLLM engine: the teacher's, with the pair plugged in."""
        kwargs = self.side_kwargs("teacher")
        section = {
            "student": {**self.side_kwargs("student"), "model": self.student},
            "mixing": self.mixing.to_dict(),
            "overlap": self.overlap,
        }
        return {
            **kwargs,
            "model": self.teacher,
            "worker_cls": WORKER_CLS,
            "scheduler_cls": SCHEDULER_CLS,
            "additional_config": {**kwargs.pop("additional_config", {}), ADDITIONAL_CONFIG_KEY: section},
        }
