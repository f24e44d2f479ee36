"""OSDConfig refuses what cannot work before a model loads; every shipped YAML parses; unknown keys are errors."""

import math
import re
import shlex
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from trl import DistillationConfig

from osd.core import MixingConfig
from osd.data.parse import data_keys, split_sections
from osd.data.parse import parse as parse_data
from osd.data.settings import CompareConfig, GenerateConfig
from osd.train import OSDConfig
from osd.train._compat import check_trl
from osd.train.data import DataArguments, load_data
from osd.train.train_osd import parse, training_keys

CONFIGS = sorted(Path(__file__).parent.parent.joinpath("configs").glob("*.yaml"))
CPU = ["--use_cpu", "true", "--bf16", "false"]


def config(tmp_path, **given):
    return OSDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **given)


# -- the shipped files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_parses(path):
    data, args, model = parse(["--config", str(path), *CPU])
    written = yaml.safe_load(path.read_text())
    holders = (data, args, model)
    for key, value in split_sections(written)[0].items():
        if key in ("bf16", "report_to"):  # overridden above; and transformers turns "none" into a list
            continue
        [got] = [getattr(holder, key) for holder in holders if hasattr(holder, key)]
        assert getattr(got, "value", got) == value, key
    assert args.mixing()
    assert model.model_name_or_path
    assert data.dataset_name


@pytest.mark.parametrize("settings_class", [GenerateConfig, CompareConfig])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_serves_the_data_commands(path, settings_class):
    argv = ["--config", str(path), "--output", "data"]
    settings = parse_data(settings_class, argv, training_keys=training_keys)
    written = yaml.safe_load(path.read_text())
    top, sections = split_sections(written)
    assert sections["generate"], "a shipped config shows what generation can be told"
    for key, value in {**top, **sections["generate"]}.items():
        if hasattr(settings, key):
            assert getattr(settings, key) == value, key
    assert settings.model_name_or_path == written["model_name_or_path"]


def test_the_commands_of_the_usage_page_parse(tmp_path, monkeypatch):
    text = (CONFIGS[0].parent.parent / "docs" / "usage.md").read_text()
    monkeypatch.chdir(tmp_path)
    [written] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    Path("generate.yaml").write_text(written)
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(lines) >= 7
    for line in lines:
        program, command, *argv = shlex.split(line)
        assert program == "osd"
        if command != "inspect":
            settings_class = {"generate": GenerateConfig, "compare": CompareConfig}[command]
            settings = parse_data(settings_class, argv, training_keys=set)
            assert settings.teacher_template_list()[1].startswith("{prompt}")
    for key in re.findall(r"`--(\w+)", text):
        assert key in data_keys() | {"input", "num_processes", "help", "config"}, key


def test_each_command_reads_its_own_keys(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIGS[0].read_text() + "  seed: 7\ncompare:\n  num_samples: 3\nnum_samples: 5\nseed: 6\n")
    _, train, _ = parse(["--config", str(path), *CPU])
    generate, compare = (
        parse_data(settings_class, ["--config", str(path), "--output", "data"], training_keys=training_keys)
        for settings_class in (GenerateConfig, CompareConfig)
    )
    assert (train.seed, generate.seed, compare.seed) == (6, 7, 7)
    assert (generate.num_samples, compare.num_samples) == (1, 3)  # a section wins over the top level


@pytest.mark.parametrize(
    ("line", "key"),
    [("alpha_metod: fixed", "alpha_metod"), ("  num_sample: 2", "num_sample"), ("compare:\n  shard: 0/2", "shard")],
)
def test_a_key_that_no_command_knows_is_refused_by_every_command(tmp_path, line, key):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIGS[0].read_text() + line + "\n")
    for settings_class in (GenerateConfig, CompareConfig):
        with pytest.raises(ValueError, match=key):
            parse_data(settings_class, ["--config", str(path), "--output", "data"], training_keys=training_keys)
    with pytest.raises(ValueError, match=key):
        parse(["--config", str(path), *CPU])


def test_shared_keys_mean_the_same_to_training():
    """A data setting that training has too must have training's type, and its default unless there is a reason."""
    ours = {f.name: f for f in fields(GenerateConfig)}
    shared = data_keys() & {f.name for f in fields(OSDConfig)}
    assert len(shared) >= 20
    differing = {f.name for f in fields(OSDConfig) if f.name in shared and f.name in ours and f.default != ours[f.name].default}
    assert differing == {"vllm_gpu_memory_utilization"}  # generation has the GPU to itself


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_key_of_a_shipped_config_is_commented(path):
    previous = ""
    for line in path.read_text().splitlines():
        if ":" in line.split("#")[0]:
            commented = (
                "#" in line or line.rstrip().endswith("generate:") or previous.startswith("#") or "system_prompt" in line
            )
            assert commented, f"{path.name}: {line}"
        previous = line


def test_there_are_the_three_configs():
    assert [path.name for path in CONFIGS] == ["base.yaml", "distillation.yaml", "math_qa.yaml", "server.yaml"]


def test_flags_win_over_the_file():
    _, args, _ = parse(["--config", str(CONFIGS[0]), *CPU, "--max_completion_length", "7", "--alpha_max", "0.25"])
    assert (args.max_completion_length, args.alpha_max) == (7, 0.25)


def test_engine_arguments_as_a_flag():
    _, args, _ = parse(["--config", str(CONFIGS[0]), *CPU, "--engine_kwargs", '{"dtype": "float32"}'])
    assert args.pair_kwargs()["engine_kwargs"]["dtype"] == "float32"


def test_the_model_and_the_data_must_be_named(tmp_path):
    with pytest.raises(ValueError, match=r"dataset_name \(or datasets\) and model_name_or_path must be set"):
        parse(["--output_dir", str(tmp_path), *CPU])


# -- OSDConfig ----------------------------------------------------------------------------------------------------------


def test_mixing_is_what_was_configured(tmp_path):
    args = config(tmp_path, alpha_method="entropy", alpha_min=0.1, alpha_max=0.9)
    assert args.mixing() == MixingConfig(alpha_method="entropy", alpha_min=0.1, alpha_max=0.9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha_method": "kl_simmetry"}, "alpha_method='kl_simmetry'"),
        ({"alpha_min": 0.6, "alpha_max": 0.4}, "alpha_min"),
        ({"alpha_max": 1.5}, "alpha_max"),
        ({"fixed_alpha": -0.1, "alpha_method": "fixed"}, "fixed_alpha"),
        ({"mixture": "harmonic"}, "mixture='harmonic'"),
        ({"temperature": 0.0}, "temperature=0.0 divides the logits"),
        ({"max_completion_length": 0}, "max_completion_length=0"),
        ({"generation_kwargs": {"n": 2}}, r"generation_kwargs\['n'\]"),
        ({"use_vllm": False}, "use_vllm=False"),
        ({"vllm_server_base_url": "http://x"}, "vllm_server_base_url='http://x' without vllm_mode='server'"),
        pytest.param(
            {"vllm_enable_sleep_mode": True},
            "vllm_enable_sleep_mode=True needs an NVIDIA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
        ),
        ({"teacher_model_init_kwargs": {"dtype": "auto"}}, "use teacher_engine_kwargs"),
        ({"max_tool_calling_iterations": 3}, "tools are not supported"),
        ({"privileged_template": "{}"}, "a literal brace is written twice"),
        ({"beta": 2.0}, "beta must be in"),
        ({"teacher_signal": "top_k"}, "teacher_signal='top_k' is unknown; use one of recorded, topk, recompute"),
        (
            {"teacher_signal": "topk", "teacher_topk": 0},
            "teacher_topk=0 is out of range; use a whole number, from 1 to the size",
        ),
        ({"teacher_signal": "topk", "teacher_topk": 1.5}, "teacher_topk=1.5 is not a whole number; correct its type"),
        (
            {"teacher_signal": "topk", "generation_kwargs": {"temperature": 0.7}},
            r"temperature=1.0 and generation_kwargs temperature=0.7: .* set temperature=0.7, or teacher_signal='recorded'",
        ),
        (
            {"teacher_signal": "topk", "temperature": 0.7, "generation_kwargs": {"temperature": 0}},
            r"generation_kwargs temperature=0: log-probabilities of temperature 1 are recorded.* set temperature=1, or",
        ),
        ({"teacher_signal": "topk", "teacher_model_init_kwargs": {"dtype": "auto"}}, "use teacher_engine_kwargs"),
        ({"divergence": "skewkl"}, "divergence='skewkl' is unknown; use one of jsd, skew_kl, skew_reverse_kl"),
        ({"divergence": "skew_kl", "skew": 1.0}, "skew=1.0 is out of range; use a number between 0 and 1"),
        ({"kl_clip": 0.0}, "kl_clip=0.0 is out of range; use a positive number of nats"),
        ({"importance_correction": "tokens"}, "use one of none, token, prefix, sequence"),
        ({"importance_correction": "token", "importance_clip": -1.0}, "importance_clip=-1.0 is out of range"),
        ({"importance_correction": "token", "generation_kwargs": {"temperature": 0}}, "greedy samples have no importance"),
        ({"num_iterations": 0}, "num_iterations=0 is out of range"),
        ({"privilege_gap_steps": -1}, "privilege_gap_steps=-1 is out of range"),
        ({"privilege_gap_tokens": 0}, "privilege_gap_tokens=0 is out of range"),
        ({"mix_tokens": -1}, "mix_tokens=-1 is out of range"),
        ({"mix_tokens": "1"}, "mix_tokens='1' is not a whole number or null; correct its type"),
        ({"kl_clip": "1"}, "kl_clip='1' is not a number or null"),
        ({"async_generation": "no"}, "async_generation='no' is not true or false"),
        ({"max_staleness": True}, "max_staleness=True is not a whole number"),
        ({"max_staleness": None}, "max_staleness=None is not a whole number; correct"),
        ({"num_iterations": 1.5}, "num_iterations=1.5 is not a whole number"),
        ({"teacher_topk": True}, "teacher_topk=True is not a whole number"),
        ({"vllm_server_timeout": "60"}, "vllm_server_timeout='60' is not a number"),
        ({"vllm_server_timeout": 0}, "vllm_server_timeout=0 is out of range; use a positive number of seconds"),
        ({"vllm_server_timeout": math.inf}, "vllm_server_timeout=inf is out of range; use a positive number of seconds"),
        ({"vllm_server_port": 99999}, "vllm_server_port=99999 is out of range; use a port"),
        ({"vllm_group_port": 0}, "vllm_group_port=0 is out of range; use a port"),
        ({"mix_fraction": 1.5}, "mix_fraction=1.5 is out of range; use a probability"),
        ({"alpha_schedule": "step"}, "alpha_schedule='step' is unknown; use one of constant, linear, cosine"),
        ({"alpha_schedule": "linear"}, "nothing to move with alpha_method='kl_symmetry'; set alpha_min_end or alpha_max_end"),
        ({"alpha_schedule": "linear", "alpha_method": "fixed", "alpha_max_end": 0.9}, "set fixed_alpha_end"),
        ({"alpha_schedule": "linear", "alpha_max_end": 2.0}, "at the end of the alpha schedule, alpha_max=2.0"),
        ({"alpha_schedule": "linear", "alpha_min": 0.5, "alpha_max_end": 0.2}, "end of the alpha schedule, alpha_min=0.5"),
        ({"alpha_schedule": "linear", "alpha_max_end": 0.0, "alpha_schedule_steps": 0}, "alpha_schedule_steps=0 is out of"),
    ],
)
def test_bad_values_are_refused_by_name(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **given)


def test_a_weight_without_effect_warns(tmp_path):
    with pytest.warns(UserWarning, match="no effect"):
        config(tmp_path, fixed_alpha=0.3)


BEHIND = {"async_generation": True, "vllm_mode": "server"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"divergence": "skew_kl", "beta": 0.5}, "beta=0.5 has no effect without divergence='jsd'"),
        ({"skew": 0.2}, "skew=0.2 has no effect without divergence='skew_kl'"),
        ({"teacher_topk": 8}, "teacher_topk=8 has no effect without teacher_signal='topk'"),
        ({"importance_clip": 3.0}, "importance_clip=3.0 has no effect without importance_correction"),
        ({"alpha_max_end": 0.0}, "alpha_max_end=0.0 has no effect without alpha_schedule"),
        (BEHIND | {"max_staleness": 2}, "max_staleness=2 with async_weight_updates='between' and num_iterations=1 acts as 1"),
        (
            BEHIND | {"async_weight_updates": "running", "max_staleness": 3, "num_iterations": 2},
            "max_staleness=3 with async_weight_updates='running' and num_iterations=2 acts as 2",
        ),
        ({"privilege_gap_tokens": 8}, "privilege_gap_tokens=8 has no effect without privilege_gap_steps"),
        ({"num_iterations": 2, "save_strategy": "no"}, "num_iterations=2 without importance_correction trains on samples of"),
        ({"importance_correction": "prefix", "top_p": 0.9}, "with top_p=0.9: tokens that top_p excludes get no weight"),
        ({"importance_correction": "prefix", "generation_kwargs": {"top_k": 5}}, "top_k=5: tokens that top_k excludes get"),
    ],
)
def test_what_has_no_effect_or_stays_biased_warns(tmp_path, given, message):
    with pytest.warns(UserWarning, match=message):
        config(tmp_path, **given)


def test_what_is_in_order_does_not_warn(tmp_path, recwarn):
    config(tmp_path, importance_correction="prefix", importance_clip=None, num_iterations=2, generation_kwargs={"top_k": -1})
    config(tmp_path, teacher_signal="recompute", teacher_model_init_kwargs={"dtype": "bfloat16"})
    config(tmp_path, teacher_signal="topk", teacher_topk=8, generation_kwargs={"temperature": 0})
    config(tmp_path, alpha_schedule="cosine", alpha_max_end=0.0, divergence="skew_reverse_kl", skew=0.2, kl_clip=4.0)
    assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]


def test_a_schedule_moves_the_bounds_and_keeps_their_order(tmp_path):
    args = config(tmp_path, alpha_schedule="linear", alpha_min=0.1, alpha_max_end=0.1, alpha_schedule_steps=7)
    steps = [args.schedule().at(step, max_steps=100) for step in range(12)]
    assert steps[0] == args.mixing()
    assert [mixing.alpha_max for mixing in steps[:8]] == pytest.approx([1 - 0.9 * step / 7 for step in range(8)])
    assert all(mixing.alpha_min == pytest.approx(0.1) and mixing.alpha_min <= mixing.alpha_max for mixing in steps)
    assert [mixing.alpha_max for mixing in steps[7:]] == pytest.approx([0.1] * 5)
    fixed = config(tmp_path, alpha_method="fixed", alpha_schedule="cosine", fixed_alpha=1.0, fixed_alpha_end=0.0)
    assert [fixed.schedule().at(step, 4).fixed_alpha for step in range(5)] == pytest.approx(
        [1, 0.8536, 0.5, 0.1464, 0], abs=1e-4
    )


def test_engine_arguments_win_over_trls_fields(tmp_path):
    args = config(
        tmp_path,
        vllm_max_model_length=128,
        teacher_model_revision="v1",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        engine_kwargs={"max_model_len": 64},
        teacher_engine_kwargs={"quantization": "fp8"},
    )
    kwargs = args.pair_kwargs()
    assert kwargs["engine_kwargs"]["max_model_len"] == 64
    assert kwargs["engine_kwargs"]["max_num_seqs"] == 16
    assert kwargs["teacher_kwargs"] == {"revision": "v1", "quantization": "fp8"}
    assert kwargs["student_kwargs"] == {}


def test_every_field_has_a_help_text():
    inherited = {field.name for field in fields(DistillationConfig)}
    own = [field for field in fields(OSDConfig) if field.name not in inherited]
    assert len(own) >= 12
    for field in own:
        assert field.metadata["help"], field.name


# -- data files and versions --------------------------------------------------------------------------------------------


def test_a_local_file_and_another_prompt_column(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "w7", "answer": "w8"}\n')
    train, test = load_data(DataArguments(dataset_name=str(path), prompt_column="question"), evaluate=False)
    assert train[0] == {"prompt": "w7", "answer": "w8"}
    assert test is None


@pytest.mark.parametrize(
    ("given", "evaluate", "message"),
    [
        ({"dataset_name": "absent.jsonl"}, False, "'absent.jsonl' does not exist"),
        ({"prompt_column": "nothing"}, False, "prompt_column='nothing' cannot be renamed"),
        ({}, True, "no evaluation set: set dataset_test_name or test_split_size"),
    ],
)
def test_data_that_is_not_there_is_refused(tmp_path, given, evaluate, message):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "w7"}\n')
    with pytest.raises(ValueError, match=message):
        load_data(DataArguments(**{"dataset_name": str(path), **given}), evaluate=evaluate)


def test_the_installed_trl_is_supported():
    assert check_trl().startswith("1.16.")


@pytest.mark.parametrize("version", ["1.15.3", "1.17.0", "2.0.0"])
def test_another_trl_is_refused_by_name(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda _: version)
    with pytest.raises(ImportError, match=rf"needs TRL 1.16.x, and TRL {version} is installed"):
        check_trl()


def test_no_trl_is_refused(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(ImportError, match="no TRL is installed"):
        check_trl()
