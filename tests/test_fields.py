"""Every field of OSDConfig is honoured, refused by name, warned about, or left to TRL and transformers."""

from dataclasses import fields

import pytest
from transformers import TrainingArguments
from trl import DistillationConfig

from osd.train import OSDConfig
from osd.train.fields import HONOURED, NO_EFFECT, OF_A_SERVER, OF_THE_ENGINE, REFUSED, TRLS_OWN, default, warn_beside_engine

OURS = {field.name for field in fields(OSDConfig)} - {field.name for field in fields(DistillationConfig)}
TRLS = {field.name for field in fields(DistillationConfig)} - {field.name for field in fields(TrainingArguments)}
KNOWN = {field.name: field for field in fields(OSDConfig)}

# Another value of each field that OSD reads, and other fields that it needs.
VALUES = {
    "alpha_max": 0.5,
    "alpha_max_end": (0.5, {"alpha_schedule": "linear"}),
    "alpha_method": "entropy",
    "alpha_min": 0.25,
    "alpha_min_end": (0.5, {"alpha_schedule": "linear"}),
    "alpha_schedule": ("cosine", {"alpha_max_end": 0.5}),
    "alpha_schedule_steps": (7, {"alpha_schedule": "linear", "alpha_max_end": 0.5}),
    "beta": 0.5,
    "divergence": "skew_kl",
    "engine_kwargs": {"dtype": "float32"},
    "fixed_alpha": (0.3, {"alpha_method": "fixed"}),
    "fixed_alpha_end": (0.3, {"alpha_method": "fixed", "alpha_schedule": "linear"}),
    "generation_kwargs": {"min_tokens": 2},
    "kl_clip": 3.0,
    "mixture": ("linear", {"alpha_method": "fixed"}),
    "model_init_kwargs": {"revision": "v2"},
    "num_speculative_tokens": 4,
    "skew": (0.3, {"divergence": "skew_kl"}),
    "student_engine_kwargs": {"revision": "v3"},
    "teacher_engine_kwargs": {"quantization": "fp8"},
    "teacher_model_init_kwargs": ({"dtype": "float32"}, {"teacher_signal": "recompute"}),
    "teacher_model_revision": "v1",
    "temperature": 0.5,
    "trust_remote_code": True,
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_max_model_length": 4096,
    "vllm_model_impl": "transformers",
    "vllm_structured_outputs_regex": "w[0-9]+",
    "vllm_tensor_parallel_size": 2,
}
# Read by the trainer, the renderer or the generator; each has its test there.
ELSEWHERE = {
    *("chat_template_kwargs", "drop_bad_rows", "enable_chat_template", "privileged_template"),
    *("student_system_prompt", "teacher_system_prompt", "teacher_model_name_or_path", "teacher_signal", "teacher_topk"),
    *("importance_clip", "importance_correction", "num_iterations", "privilege_gap_steps", "privilege_gap_tokens"),
    *("mix_fraction", "mix_tokens", "vllm_enable_sleep_mode"),
    *("max_completion_length", "min_p", "repetition_penalty", "top_k", "top_p"),
    *("async_generation", "async_weight_updates", "max_staleness", "vllm_mode", *OF_A_SERVER),
}


def config(tmp_path, **given):
    return OSDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **given)


def read(args):
    """Everything that OSD derives from a configuration."""
    derived = (args.schedule(), args.loss_divergence(), args.pair_kwargs(), args.sampling_kwargs())
    return repr((*derived, args.student_init_kwargs(), args.teacher_init_kwargs()))


def other(name):
    """A value of another kind than the default."""
    was = default(KNOWN[name])
    if isinstance(was, bool):
        return not was
    return {"vllm_mode": "server", "include_for_metrics": ["loss"], "train_sampling_strategy": "sequential"}.get(
        name, 7 if was is None or isinstance(was, (int, float)) else "other"
    )


def test_a_field_that_trl_adds_must_be_classed():
    classes = [set(REFUSED), set(NO_EFFECT), set(HONOURED), set(TRLS_OWN)]
    unknown = TRLS - set.union(*classes)
    assert not unknown, f"TRL has new fields {sorted(unknown)}: add each to a table of trainers/fields.py"
    assert sum(map(len, classes)) == len(set.union(*classes)), "a field is in two tables"
    assert not (set(HONOURED) | set(TRLS_OWN) | set(OF_THE_ENGINE)) - set(KNOWN)


@pytest.mark.parametrize("name", sorted((set(HONOURED) | OURS) - ELSEWHERE))
def test_an_honoured_field_changes_the_run(tmp_path, name):
    value, needs = given if isinstance(given := VALUES[name], tuple) else (given, {})
    if name in ("alpha_max_end", "alpha_min_end", "fixed_alpha_end"):  # a schedule needs some end
        base = {**needs, name: 0.75}
    else:
        base = {key: other for key, other in needs.items() if key != "alpha_max_end" or name != "alpha_schedule"}
    assert read(config(tmp_path, **needs, **{name: value})) != read(config(tmp_path, **base))


def test_every_field_that_osd_reads_has_a_test():
    assert set(VALUES) | ELSEWHERE == (set(HONOURED) | OURS)


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(KNOWN)))
def test_a_refused_field_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}=.* cannot be used: .{{9}}"):
        config(tmp_path, **{name: other(name)})


@pytest.mark.parametrize("name", sorted(set(NO_EFFECT) & set(KNOWN)))
def test_a_field_without_effect_warns(tmp_path, name):
    with pytest.warns(UserWarning, match=rf"{name}=.* has no effect: .{{9}}"):
        config(tmp_path, **{name: other(name)})


@pytest.mark.parametrize("name", OF_THE_ENGINE)
def test_an_engine_option_beside_a_running_engine_warns(tmp_path, name):
    with pytest.warns(UserWarning, match=f"{name}=.* has no effect beside engine="):
        warn_beside_engine(config(tmp_path, **{name: VALUES[name]}))


def test_defaults_neither_warn_nor_fail(tmp_path, recwarn):
    warn_beside_engine(config(tmp_path))
    assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)]
