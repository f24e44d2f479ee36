"""Tables of the fields of TRL and transformers: refused, without effect, or (TRL's) honoured.

Fields of transformers' TrainingArguments that are in no table work as without OSD. `tests/test_fields.py` walks over all
fields of OSDConfig: a field that a new TRL adds belongs to one of the tables.
"""

from __future__ import annotations

import warnings
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osd.train.config import OSDConfig

# A value other than the default is an error, with this reason.
REFUSED = {
    "cache_implementation": "completions come from vLLM, not from transformers",
    "max_tool_calling_iterations": "tools are not supported",
    "auto_find_batch_size": "TRL's sampler keeps the first batch size; lower per_device_train_batch_size",
    "fp16_full_eval": "it changes the student's dtype in evaluation, and its engine keeps the first",
    "bf16_full_eval": "it changes the student's dtype in evaluation, and its engine keeps the first",
    "use_vllm": "completions come from vLLM; leave it true",
    "ds3_gather_for_generation": "vLLM needs the student's parameters gathered; leave it true",
}

_NO_METRICS = "evaluation computes a loss and the metrics of sampling only"

# A value other than the default is a warning, with this reason.
NO_EFFECT = {
    "label_smoothing_factor": "the targets are the teacher's distributions",
    "label_names": "there are no labels",
    "data_seed": "the order of the data follows seed",
    "train_sampling_strategy": "use shuffle_dataset",
    "length_column_name": "rows are not grouped by length",
    "include_for_metrics": _NO_METRICS,
    "batch_eval_metrics": _NO_METRICS,
    "eval_accumulation_steps": _NO_METRICS,
    "eval_do_concat_batches": _NO_METRICS,
    "eval_use_gather_object": _NO_METRICS,
    "do_predict": _NO_METRICS,
}

# The pair engine takes these from the configuration; a running engine has its own.
OF_THE_ENGINE = (
    "vllm_gpu_memory_utilization",
    "vllm_max_model_length",
    "vllm_model_impl",
    "vllm_tensor_parallel_size",
    "engine_kwargs",
    "teacher_engine_kwargs",
    "student_engine_kwargs",
    "num_speculative_tokens",
)

# A value other than the default is an error unless vllm_mode is "server".
OF_A_SERVER = (
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
)

# TRL's fields that OSD reads itself.
HONOURED = (
    "beta",
    "chat_template_kwargs",
    "generation_kwargs",
    "max_completion_length",
    "min_p",
    "model_init_kwargs",
    "repetition_penalty",
    "teacher_model_init_kwargs",
    "teacher_model_name_or_path",
    "teacher_model_revision",
    "temperature",
    "top_k",
    "top_p",
    "trust_remote_code",
    "vllm_enable_sleep_mode",
    "vllm_gpu_memory_utilization",
    "vllm_max_model_length",
    "vllm_mode",
    "vllm_model_impl",
    "vllm_structured_outputs_regex",
    "vllm_tensor_parallel_size",
    *OF_A_SERVER,
)

# TRL's fields that its trainer honours without OSD's help.
TRLS_OWN = (
    "disable_dropout",
    "log_completions",
    "log_unique_prompts",
    "num_completions_to_print",
    "pad_to_multiple_of",
    "shuffle_dataset",
)


def check_fields(args: OSDConfig) -> None:
    """Refuse fields that an OSD run cannot honour, and warn about fields without effect.

    Raises:
        ValueError: naming the field, the value and the reason.
    """
    for name, why in REFUSED.items():
        if changed(args, name):
            raise ValueError(f"{name}={getattr(args, name)!r} cannot be used: {why}")
    for name in OF_A_SERVER if args.vllm_mode != "server" else ():
        if changed(args, name):
            raise ValueError(f"{name}={getattr(args, name)!r} without vllm_mode='server'; set that too, or remove {name}")
    for name, why in NO_EFFECT.items():
        if changed(args, name):
            warnings.warn(f"{name}={getattr(args, name)!r} has no effect: {why}", stacklevel=5)
    if args.do_eval and args.eval_strategy == "no":
        warnings.warn("do_eval=True has no effect: set eval_strategy to 'steps' or 'epoch'", stacklevel=5)


def warn_beside_engine(args: OSDConfig) -> None:
    """Warn about engine options that a running engine (`engine=`, or a server) does not take."""
    for name in OF_THE_ENGINE:
        if changed(args, name):
            warnings.warn(
                f"{name}={getattr(args, name)!r} has no effect beside engine= or vllm_mode='server': the running engine keeps "
                "the options it was started with",
                stacklevel=4,
            )


def changed(args: OSDConfig, name: str) -> bool:
    """Return whether a field has another value than its default; False for fields that this transformers does not have."""
    field = args.__dataclass_fields__.get(name)
    return field is not None and _plain(getattr(args, name)) != _plain(default(field))


def default(field: Any) -> Any:
    """Return the default of a dataclass field."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)  # of an enumeration
    return None if value in ("", [], {}) else value
