"""vLLM's configuration of a pair: the teacher's engine, and the student inside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from pydantic import ValidationError
from vllm import ModelRegistry, envs
from vllm.config import CacheConfig, SchedulerConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMError
from vllm.model_executor.model_loader import get_model_loader
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.kv_cache_interface import KVCacheConfig

from osd.core import MixingConfig
from osd.engine.backend.language_model import as_text
from osd.engine.config import ADDITIONAL_CONFIG_KEY, SCHEDULER_CLS, WORKER_CLS, PairConfig, largest_number
from osd.engine.request import SideLimits

_PLENTY = 1 << 50  # bytes


def engine_argument_names() -> set[str]:
    """Return the names of the installed vLLM's engine arguments."""
    return set(EngineArgs.__dataclass_fields__)


def supported_architectures() -> set[str]:
    """Return the names of the model classes that the installed vLLM has of its own."""
    return set(ModelRegistry.get_supported_archs())


def context_lengths(config: PairConfig) -> dict[str, int]:
    """Return the longest sequence of "teacher" and "student" in tokens, prompt and completion; loads no weights.

    Raises:
        ValueError: a model that vLLM has no implementation of, or a max_model_len over the model's own.
    """
    models = {"teacher": config.teacher, "student": config.student}
    with mock.patch.object(envs, "VLLM_ENABLE_V1_MULTIPROCESSING", True, create=True):  # no engine: no warning about its seed
        lengths = {}
        for side, model in models.items():
            with refusals(f"{side}_kwargs: " if getattr(config, f"{side}_kwargs") else ""):
                arguments = EngineArgs(**as_text({**config.side_kwargs(side), "model": model}))
                lengths[side] = arguments.create_model_config().max_model_len
        return lengths


def check_engine_args(arguments: EngineArgs, *, headless: bool = False) -> None:
    """Make both sides' configurations from the pair's ``arguments``; load no weights.

    Raises:
        ValueError: an engine argument that vLLM refuses, in one line.
    """
    with refusals():
        config = arguments.create_engine_config(headless=headless)
        get_model_loader(config.load_config)
    with refusals("the student's engine arguments: "):
        get_model_loader(student_vllm_config(config).load_config)


@contextmanager
def refusals(of: str = "") -> Iterator[None]:
    """Raise what vLLM's checks refuse, by whatever exception, as a `ValueError` of one line that begins with ``of``."""
    try:
        yield
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError, VLLMError) as error:
        raise ValueError(of + refusal(error)) from error


def refusal(error: BaseException) -> str:
    """Return in one line why vLLM refuses an argument: its name, value and reason, as far as the error has them."""
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    if isinstance(error, ValidationError):
        text = "; ".join(_described(fault) for fault in error.errors())
    if uninspected := re.search(r"architectures \['(\w+)'.* failed to be inspected", text):
        text = _import_failure(uninspected[1]) or text
    return " ".join(text.split()) or "vLLM refuses it by an assertion"


def _import_failure(architecture: str) -> str:
    """Return why vLLM cannot import one of its model classes here, which its log alone says; empty if it can."""
    registered = ModelRegistry.models[architecture]
    try:
        registered.load_model_cls()
    except Exception as error:  # of any module that the class imports
        return f"vLLM's {architecture} cannot be imported here: {error}"
    return ""


def _described(fault: Any) -> str:
    """Return one of pydantic's findings as "name=value: reason"; a finding about a whole configuration has neither."""
    reason, name = fault["msg"].removeprefix("Value error, "), ".".join(map(str, fault["loc"]))
    return f"{name}={fault['input']!r:.100}: {reason}" if name else reason


def mixing_config(teacher_config: VllmConfig) -> MixingConfig:
    """Return the mixing that the engine was built with."""
    return MixingConfig.from_dict(_pair_section(teacher_config)["mixing"])


def wants_overlap(teacher_config: VllmConfig) -> bool:
    """Return whether the engine was asked to run the two forward passes side by side."""
    return _pair_section(teacher_config)["overlap"]


def chooses_drafts(teacher_config: VllmConfig) -> bool:
    """Return whether the engine chooses the number of drafts itself."""
    return _pair_section(teacher_config)["num_speculative_tokens"] == "auto"


def most_drafts(teacher_config: VllmConfig) -> int:
    """Return how many tokens the student drafts at most in a cycle."""
    return largest_number(_pair_section(teacher_config)["num_speculative_tokens"])


def student_vllm_config(teacher_config: VllmConfig) -> VllmConfig:
    """Return the student's own ``VllmConfig``, made to run inside the teacher's workers.

    Weights, model, KV cache, compilation and CUDA graphs are the student's. Process group and scheduling mode are the
    teacher's. So are the limits of a step, unless the student sets its own.
    """
    own = as_text({name: value for name, value in _pair_section(teacher_config)["student"].items() if value is not None})
    config = EngineArgs(**_step_limits(teacher_config.scheduler_config, own) | own).create_engine_config()
    config.parallel_config = teacher_config.parallel_config
    config.device_config = teacher_config.device_config
    config.scheduler_config.async_scheduling = teacher_config.scheduler_config.async_scheduling
    return config


def _step_limits(teacher: SchedulerConfig, own: dict[str, Any]) -> dict[str, int]:
    """Return the teacher's step limits, adapted to the student's ``own`` engine arguments.

    A side that admits less than the other holds it up. vLLM's defaults depend on the caller: 8 times larger for `LLM`.
    """
    tokens = own.get("max_num_batched_tokens", teacher.max_num_batched_tokens)
    if own.get("enable_chunked_prefill") is False and "max_num_batched_tokens" not in own:
        tokens = max(tokens, EngineArgs(**own).create_model_config().max_model_len)  # prompts are not split
    return {"max_num_seqs": min(teacher.max_num_seqs, tokens), "max_num_batched_tokens": tokens}


@dataclass(frozen=True)
class StudentCache:
    """The student's KV cache: known to its worker, sent to its scheduler, which may be in another process.

    Attributes:
        specs: vLLM's ``KVCacheSpec`` of each layer.
        config: the student's ``CacheConfig`` once its model is built: block sizes and layout are settled only then.
    """

    specs: dict[str, Any]
    config: CacheConfig

    @classmethod
    def of(cls, kv_cache_config: KVCacheConfig) -> StudentCache:
        """Return the student's cache that travels in the teacher's."""
        names = (name for group in kv_cache_config.kv_cache_groups for name in group.layer_names)
        return next(name.student for name in names if isinstance(name, _Carrier))

    def carried_by(self, teacher: dict[str, Any]) -> dict[str, Any]:
        """Return the teacher's cache specs by layer. The name of the first carries this object to the scheduler.

        Whatever runs the workers, vLLM's engine core asks them for these specs, and hands the names to the scheduler.
        """
        first, *others = teacher
        return {_Carrier.make(first, self): teacher[first], **{name: teacher[name] for name in others}}

    def plan(self, config: VllmConfig, teacher: VllmConfig, kv_cache_config: KVCacheConfig) -> tuple[KVCacheConfig, int]:
        """Plan the student's KV cache for as many requests as the teacher's ``kv_cache_config`` holds.

        Args:
            config, teacher: the configurations of the student and of the teacher.

        Returns:
            The plan, and the block size of the student's scheduler in tokens.
        """
        length = shared_length(teacher, config)
        ours = request_blocks(config, plan_kv_cache(config, self.specs), length)
        theirs = request_blocks(teacher, kv_cache_config, length)
        cache_config = config.cache_config
        cache_config.num_gpu_blocks_override = -(-kv_cache_config.num_blocks * ours // theirs)
        planned = plan_kv_cache(config, self.specs)
        cache_config.num_gpu_blocks, planned.kv_cache_layout = planned.num_blocks, cache_config.kv_cache_layout
        specs = [group.kv_cache_spec for group in planned.kv_cache_groups]
        cache_config.block_size = min(spec.block_size for spec in [spec for spec in specs if spec.prefix_cacheable] or specs)
        block_size, planned.hash_block_size = resolve_kv_cache_block_sizes(planned, config)
        return planned, block_size


class _Carrier(str):
    """The name of a layer of the teacher, and the student's cache."""

    student: StudentCache

    @classmethod
    def make(cls, name: str, student: StudentCache) -> _Carrier:
        carrier = cls(name)
        carrier.student = student
        return carrier


def side_limits(teacher_config: VllmConfig, student_config: VllmConfig) -> dict[str, SideLimits]:
    """Return the vocabulary and the context of "teacher" and "student"."""
    models = {"teacher": teacher_config.model_config, "student": student_config.model_config}
    return {
        side: SideLimits(vocab_size=model.get_vocab_size(), max_model_len=model.max_model_len) for side, model in models.items()
    }


def shared_length(*configs: VllmConfig) -> int:
    """Return the longest sequence that both sides can hold, in tokens."""
    return min(config.model_config.max_model_len for config in configs)


def request_blocks(config: VllmConfig, kv_cache_config: KVCacheConfig, length: int) -> int:
    """Return how many blocks of a KV cache one request of ``length`` tokens takes."""
    with mock.patch.object(config.model_config, "max_model_len", length):
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        return sum(-(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes) for spec in specs)


def request_bytes(config: VllmConfig, specs: dict[str, Any], length: int) -> int:
    """Return how many bytes of KV cache one request of ``length`` tokens takes."""
    planned = plan_kv_cache(config, specs)
    return request_blocks(config, planned, length) * (planned.kv_cache_tensors[0].size // planned.num_blocks)


def plan_kv_cache(config: VllmConfig, specs: dict[str, Any]) -> KVCacheConfig:
    """Return vLLM's plan of one model's KV cache: of ``num_gpu_blocks_override`` blocks, or of very many without it."""
    try:  # 0.33
        from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs

        more = [get_global_kv_cache_groups(config, [specs])]
    except ImportError:  # 0.32
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

        more = []
    with mock.patch.object(config.model_config, "original_max_model_len", None):  # the length fits: the teacher's was fitted
        [planned] = get_kv_cache_configs(config, [specs], [_PLENTY], *more)
    return planned


def eos_ids(config: VllmConfig) -> set[int]:
    """Return the end-of-sequence ids that a model declares: its generation config's, or else its config's."""
    declared = config.model_config.try_get_generation_config().get("eos_token_id")
    if declared is None:
        declared = getattr(config.model_config.hf_text_config, "eos_token_id", None)
    if declared is None:
        return set()
    return {declared} if isinstance(declared, int) else set(declared)


def _pair_section(teacher_config: VllmConfig) -> dict[str, Any]:
    section = (teacher_config.additional_config or {}).get(ADDITIONAL_CONFIG_KEY)
    if section is None:
        raise ValueError(
            f'additional_config has no "{ADDITIONAL_CONFIG_KEY}" section: {WORKER_CLS} and {SCHEDULER_CLS} belong together and '
            "are configured by PairConfig.teacher_engine_args()"
        )
    return section
