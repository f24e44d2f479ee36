"""PairConfig: two models, their mixing, and the vLLM engine arguments of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from osd.core import MixingConfig, speculative_tokens, suggest

ADDITIONAL_CONFIG_KEY = "osd"
WORKER_CLS = "osd.engine.backend.worker.PairWorker"
SCHEDULER_CLS = "osd.engine.backend.scheduler.PairScheduler"
SPECULATIVE_WORKER_CLS = "osd.engine.backend.speculative_worker.SpeculativeWorker"
SPECULATIVE_SCHEDULER_CLS = "osd.engine.backend.speculative_scheduler.SpeculativeScheduler"
WEIGHT_TRANSFERS = ("nccl", "http")  # backends of weight_transfer_config
# The only values of these arguments that a pair can use, and why.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "pipeline_parallel_size": ((1,), "the paired engine has no pipeline parallelism"),
    "prefill_context_parallel_size": ((1,), "the pair's KV caches are not split over ranks by tokens"),
    "decode_context_parallel_size": ((1,), "the pair's KV caches are not split over ranks by tokens"),
    "runner": (("auto", "generate"), "a pair generates text"),
    "convert": (("auto", "none"), "a pair generates text"),
}
# Values that vLLM does not check until its workers have started.
_EXECUTORS = ("mp", "ray", "uni", "external_launcher")
_MAPPINGS = ("additional_config", "hf_overrides", "weight_transfer_config")
_SMALLEST = {"seed": 0, "kv_cache_memory_bytes": 1}
MOST_CHOSEN = 8  # drafts with num_speculative_tokens="auto"

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
    "speculative_config": "in a pair the student drafts; set num_speculative_tokens instead",
    "spec_method": "in a pair the student drafts; set num_speculative_tokens instead",
    "spec_model": "in a pair the student drafts; set num_speculative_tokens instead",
    "spec_tokens": "in a pair the student drafts; set num_speculative_tokens instead",
    "diffusion_config": "a pair draws one token after the other",
    "kv_transfer_config": "the paired engine has no KV transfer",
    "kv_offloading_size": "the paired engine has no KV transfer",
    "ec_transfer_config": "a pair reads text, without an encoder",
    "mm_encoder_only": "a pair reads text, without an encoder",
    "kv_events_config": "events of the student's cache would be taken for the teacher's",
    "enable_lora": "the engine has no LoRA layers; OSDTrainer merges the student's adapter at every sync",
    "enable_return_routed_experts": "the per-token record travels in its place",
    "aux_output_config": "the per-token record travels in its place",
    "watermark_config": "the pair draws its own tokens, without a watermark",
    "return_sampling_mask": "the pair draws its own tokens, by none of vLLM's masks",
    "use_fp64_gumbel": "the pair draws its own tokens, not by Gumbel noise",
    "enable_trace_replay": "the pair draws its own tokens, and replays none",
    "enable_batch_sharded_sampling": "every rank draws all tokens of a pair",
    "enable_dbo": "the pair's batches are not split",
    "ubatch_size": "the pair's batches are not split",
    "enable_eplb": "vLLM would move the experts of one model, and a weight sync would not find them",
    "enable_elastic_ep": "vLLM would move the experts of one model, and a weight sync would not find them",
    "pooler_config": "a pair generates text",
    "sleep_mode_offload_cudagraph": "the two models' CUDA graphs would share one memory pool",
}


def transfer_backend(weight_transfer_config: Any) -> str:
    """Return the backend of a configuration, as a mapping or as vLLM's object."""
    given = weight_transfer_config
    return given.get("backend", "nccl") if isinstance(given, dict) else given.backend


def largest_number(num_speculative_tokens: int | str) -> int:
    """Return the largest number of drafts of a cycle: "auto" chooses up to `MOST_CHOSEN`."""
    return MOST_CHOSEN if isinstance(num_speculative_tokens, str) else num_speculative_tokens


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
        num_speculative_tokens: how many tokens the student drafts, which the teacher then verifies in one pass: 0 (none) to 16,
            or "auto", which measures acceptance and times while it runs and chooses up to 8 for each batch size. Completions
            follow the same distribution for every value. A seed gives the same completion for all numbers from 1 on, another
            one for 0, and with "auto" one that depends on what was measured.

    Raises:
        ValueError: an engine argument that the pair sets itself, does not support, or that cannot differ between the sides; a
            number of drafts out of range.
    """

    teacher: str
    student: str
    mixing: MixingConfig = field(default_factory=MixingConfig)
    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    student_kwargs: dict[str, Any] = field(default_factory=dict)
    overlap: bool = True
    num_speculative_tokens: int | str = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_speculative_tokens", speculative_tokens(self.num_speculative_tokens))
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
            if key in _MAPPINGS and isinstance(value, str):
                raise ValueError(f'{name}[{key!r}]={value!r} is not a mapping; write {{"key": "value"}}')
            if key in _SMALLEST and isinstance(value, int) and value < _SMALLEST[key]:
                raise ValueError(f"{name}[{key!r}]={value!r} is too small; use {_SMALLEST[key]} or more")
            if (
                key == "distributed_executor_backend"
                and isinstance(value, str)
                and value not in _EXECUTORS
                and "." not in value
            ):
                raise ValueError(f"{name}[{key!r}]={value!r} is unknown; use one of {', '.join(_EXECUTORS)}")
            if (
                key == "weight_transfer_config"
                and value is not None
                and (backend := transfer_backend(value)) not in WEIGHT_TRANSFERS
            ):
                raise ValueError(f"{name}[{key!r}] has the backend {backend!r}; use one of {', '.join(WEIGHT_TRANSFERS)}")
            if key in _ONLY and value not in _ONLY[key][0]:
                allowed, reason = _ONLY[key]
                raise ValueError(f"{name}[{key!r}]={value!r}: {reason}; use {' or '.join(map(str, allowed))}")
            if key not in known:
                raise ValueError(f"{name}[{key!r}] is not an engine argument of the installed vLLM{suggest(key, known)}")

    def side_kwargs(self, side: str) -> dict[str, Any]:
        """Return the engine arguments of one side, "teacher" or "student"."""
        return {**self.engine_kwargs, **(self.teacher_kwargs if side == "teacher" else self.student_kwargs)}

    def _graph_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return arguments that, beside ``kwargs``, make the teacher's CUDA graphs wide enough for drafts.

        vLLM captures twice ``max_num_seqs`` tokens, at most 512, because it takes a request for one token. A user's own sizes
        stay.
        """
        compilation, requests = kwargs.get("compilation_config", {}), kwargs.get("max_num_seqs")
        drafts = largest_number(self.num_speculative_tokens)
        if not drafts or requests is None or not isinstance(compilation, dict):
            return {}
        size = {"max_cudagraph_capture_size": min(2 * requests * (1 + drafts), 512)}
        own = {"max_cudagraph_capture_size", "cudagraph_capture_sizes"} & compilation.keys()
        return {} if own else {"compilation_config": compilation | size}

    def teacher_engine_args(self) -> dict[str, Any]:
        """Return the arguments of the vLLM engine: the teacher's, with the pair plugged in."""
        kwargs = self.side_kwargs("teacher")
        kwargs |= self._graph_kwargs(kwargs)
        section = {
            "student": {**self.side_kwargs("student"), "model": self.student, "weight_transfer_config": None},
            "mixing": self.mixing.to_dict(),
            "overlap": self.overlap,
            "num_speculative_tokens": self.num_speculative_tokens,
        }
        speculative = self.num_speculative_tokens != 0
        return {
            **kwargs,
            "model": self.teacher,
            "worker_cls": SPECULATIVE_WORKER_CLS if speculative else WORKER_CLS,
            "scheduler_cls": SPECULATIVE_SCHEDULER_CLS if speculative else SCHEDULER_CLS,
            "additional_config": {**kwargs.pop("additional_config", {}), ADDITIONAL_CONFIG_KEY: section},
        }
