"""vLLM's configuration of a pair: the teacher's engine, and the student inside it."""

from __future__ import annotations

from typing import Any

from vllm.config import SchedulerConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from osd.core import MixingConfig
from osd.engine.config import ADDITIONAL_CONFIG_KEY, SCHEDULER_CLS, WORKER_CLS


def engine_argument_names() -> set[str]:
    """Return the names of the installed vLLM's engine arguments."""
    return set(EngineArgs.__dataclass_fields__)


def mixing_config(teacher_config: VllmConfig) -> MixingConfig:
    """Return the mixing that the engine was built with."""
    return MixingConfig.from_dict(_pair_section(teacher_config)["mixing"])


def wants_overlap(teacher_config: VllmConfig) -> bool:
    """Return whether the engine was asked to run the two forward passes side by side."""
    return _pair_section(teacher_config)["overlap"]


def student_vllm_config(teacher_config: VllmConfig) -> VllmConfig:
    """Return the student's own ``VllmConfig``, made to run inside the teacher's workers.

    Weights, model, compilation and CUDA graphs are the student's. Process group, scheduling mode and block size are the
    teacher's, and so are the limits of a step where the student sets none.
    """
    own = {name: value for name, value in _pair_section(teacher_config)["student"].items() if value is not None}
    config = EngineArgs(**_step_limits(teacher_config.scheduler_config, own) | own).create_engine_config()
    config.parallel_config = teacher_config.parallel_config
    config.device_config = teacher_config.device_config
    config.scheduler_config.async_scheduling = teacher_config.scheduler_config.async_scheduling
    share_block_size(teacher_config, config)
    return config


def _step_limits(teacher: SchedulerConfig, own: dict[str, Any]) -> dict[str, int]:
    """Return the teacher's step limits, adapted to the student's ``own`` engine arguments.

    A side that admits less than the other holds it up. vLLM's defaults depend on the caller: 8 times larger for `LLM`.
    """
    tokens = own.get("max_num_batched_tokens", teacher.max_num_batched_tokens)
    if own.get("enable_chunked_prefill") is False and "max_num_batched_tokens" not in own:
        tokens = max(tokens, EngineArgs(**own).create_model_config().max_model_len)  # prompts are not split
    return {"max_num_seqs": min(teacher.max_num_seqs, tokens), "max_num_batched_tokens": tokens}


def share_block_size(teacher_config: VllmConfig, student_config: VllmConfig) -> None:
    """Give the student the teacher's KV block size, which vLLM may settle only once the teacher's model is built.

    Prefix caching is on for both sides or for neither: a request's block hasher belongs to the engine.
    """
    student_config.cache_config.block_size = teacher_config.cache_config.block_size
    student_config.cache_config.enable_prefix_caching = teacher_config.cache_config.enable_prefix_caching


def student_kv_cache_config(student_config: VllmConfig, num_blocks: int) -> KVCacheConfig:
    """Return the student's KV cache as its scheduler needs it: one group of full attention.

    The scheduler has no model to ask; :class:`osd.engine.backend.worker.PairWorker` checks the model's own specs against this.
    """
    model = student_config.model_config
    spec = FullAttentionSpec(
        block_size=student_config.cache_config.block_size,
        num_kv_heads=model.get_num_kv_heads(student_config.parallel_config),
        head_size=model.get_head_size(),
        dtype=model.dtype,
    )
    group = KVCacheGroupSpec(layer_names=["student"], kv_cache_spec=spec)
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[group])


def plan_kv_cache(config: VllmConfig, specs: dict[str, Any], available: int) -> KVCacheConfig:
    """Return vLLM's plan of one model's KV cache in ``available`` bytes, as its engine core makes it."""
    try:  # 0.33
        from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs

        more = [get_global_kv_cache_groups(config, [specs])]
    except ImportError:  # 0.32
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

        more = []
    [planned] = get_kv_cache_configs(config, [specs], [available], *more)
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
