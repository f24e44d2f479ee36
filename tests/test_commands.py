"""The `osd` command line: help, dry runs, quiet runs, configs by name, `osd env`, and how `osd train` launches."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from osd import cli, environment, launch, terminal
from osd.data import configs
from osd.data.settings import CompareConfig, GenerateConfig
from osd.report import requirements
from osd.train import train_osd
from tests.fake_pair import FakePair
from tests.tiny import tiny_engine_kwargs

ROOT = Path(__file__).parent.parent
ROWS = [{"question": f"w{i} w{i + 1}", "answer": f"w{i}"} for i in range(7, 23)]


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Flags of a data command whose engine is a fake."""
    monkeypatch.setattr("osd.data.pair.EnginePair", FakePair)
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "[1]\n")
    given = {"model_name_or_path": "s", "teacher_model_name_or_path": "t", "prompt_column": "question", "input": path}
    given |= {"privileged_template": "{prompt} w41 {answer}", "answer_column": "answer", "max_completion_length": 6}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


# -- help and mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "settings"), [("generate", GenerateConfig), ("compare", CompareConfig)])
def test_short_help_is_a_part_of_the_whole(command, settings, capsys):
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, flag])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        shown[flag] = {field.name for field in fields(settings) if f"--{field.name} " in text}
        assert "--help-all" in text
    assert shown["--help-all"] == {field.name for field in fields(settings)}
    assert {"input", "output", "dry_run", "quiet"} <= shown["--help"]
    assert len(shown["--help"]) < 20


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generat"], "unknown command 'generat' (did you mean 'generate'?)"),
        (["generate", "--config", "math_q"], "config='math_q' does not exist (did you mean 'math_qa'?)"),
        (["compare", "--config", str(ROOT / "configs/bas.yaml")], "(did you mean '" + str(ROOT / "configs/base.yaml")),
        (["inspect", str(ROOT / "test")], f"does not exist (did you mean '{ROOT / 'tests'}'?)"),
        (["inspect", "x", "--show", "1"], "unrecognized arguments: --show"),
        (["train", "--config", "math_q"], "config='math_q' does not exist (did you mean 'math_qa'?)"),
        (["train", "--config", "math_qa", "--accelerate_config", "fdsp2"], "(did you mean 'fsdp2'?)"),
        (["env", "--all"], "unknown argument '--all'"),
        (["generate", "--config", "math_qa", "--output", "x", "--answer_match", "fuzzy"], "answer_match='fuzzy' is unknown"),
        (["generate", "--num_sample", "2"], "unknown argument '--num_sample' (did you mean '--num_samples'?)"),
        (["generate", "--config", "absent.yaml"], "config='absent.yaml' does not exist"),
        (["generate", "--config"], "argument --config"),
        (["generate", "--config", str(ROOT / "docs")], "is not a file"),
        (["generate", "--config", str(ROOT / "theory/figures/ess.png")], "is not YAML in UTF-8"),
        (["generate", "--engine_kwargs", "{dtype"], "engine_kwargs='{dtype' is not a JSON object"),
        (["generate"], "model_name_or_path is not set"),
        (["generate", "--num_samples", "two"], "argument --num_samples"),
        (["inspect", "absent"], "'absent' has no data"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(train_osd, "parse", parsed_by([]))
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in err
    assert err.startswith("osd")
    assert err.count("\n") == 1


def test_missing_packages_of_the_pages_are_named_before_the_run(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name == "jinja2" else object())
    for argv in (["compare", *flags, "--output", str(tmp_path / "out")], ["inspect", "absent"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(argv)
        assert ended.value.code == 2
        assert "needs jinja2; install with: pip install 'optimal-sampling-distillation[report]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- dry and quiet runs, and what a run says at its end -----------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_dry_run_prints_both_prompts_and_neither_samples_nor_writes(command, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    started, before = FakePair.started, sorted(tmp_path.iterdir())
    cli.main([command, *flags, "--dry_run"])
    out = capsys.readouterr().out
    assert out.count("row ") == 3
    assert "student, 2 tokens:\n    w7 w8\n" in out
    assert "teacher, 4 tokens:\n    w7 w8 w41 w7\n  answer: w7\n" in out
    assert (FakePair.started, sorted(tmp_path.iterdir())) == (started, before)


def test_a_dry_run_names_a_rejected_row(flags, tmp_path, capsys):
    Path(flags[flags.index("--input") + 1]).write_text('{"question": "", "answer": "w8"}\n{"question": "w7", "answer": "w8"}\n')
    cli.main(["generate", *flags, "--dry_run"])
    out = capsys.readouterr().out
    assert "rejected: the student's prompt is empty" in out or "is empty" in out
    assert "w7 w41 w8" in out


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_run_ends_with_its_result_and_the_next_step(command, flags, tmp_path, capsys):
    cli.main([command, *flags, "--output", str(tmp_path / "out")])
    *_, result, step = capsys.readouterr().out.strip().splitlines()
    assert str(tmp_path / "out") in result or "rejected.jsonl" in result
    assert step.startswith("next: ")
    assert str(tmp_path / "out") in step


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_quiet_run_prints_nothing(command, flags, tmp_path, capsys):
    cli.main([command, *flags, "--quiet", "--output", str(tmp_path / "out")])
    assert capsys.readouterr() == ("", "")
    assert any((tmp_path / "out").iterdir())


def test_loading_says_what_loads_and_how_long_it_took(tmp_path, capsys):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "model.safetensors").touch()
    os.truncate(tmp_path / "big" / "model.safetensors", 2_500_000_000)
    with terminal.Loading(terminal.models(teacher=str(tmp_path / "big"), student="org/small")):
        pass
    err = capsys.readouterr().err
    assert f"loading teacher {tmp_path / 'big'} (2.5 GB), student org/small" in err
    assert "loaded in 0 s" in err
    with terminal.Loading("x", quiet=True):
        pass
    assert capsys.readouterr().err == ""


def test_a_real_run_prints_only_our_lines(tmp_path, tiny_pair):
    """Run the installed script as a user does: none of the test's variables are set, the engine has processes of its own."""
    script, data = tmp_path / "osd", tmp_path / "in.jsonl"
    script.write_text("from osd.cli import main\nif __name__ == '__main__':\n    main()\n")
    data.write_text('{"prompt": "w7 w8"}\n' * 4)
    given = {"teacher_model_name_or_path": tiny_pair[0], "model_name_or_path": tiny_pair[1], "max_completion_length": 4}
    given |= {"input": data, "output": tmp_path / "out", "engine_kwargs": json.dumps(tiny_engine_kwargs())}
    hidden = ("VLLM_", "PYTHONWARNINGS", "TORCH_CPP")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run(
        [sys.executable, script, "generate", *(str(text) for item in given.items() for text in (f"--{item[0]}", item[1]))],
        env=variables | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in re.split(r"[\r\n]", done.stderr) if line.strip()]
    ours = re.compile(r"\d+/\d+ samples|loading teacher |still loading after |loaded in ")
    assert [line for line in lines if not ours.match(line)] == []


# -- configs ------------------------------------------------------------------------------------------------------------


def test_a_name_is_a_shipped_config_and_a_file_comes_first(tmp_path, monkeypatch):
    assert set(configs.shipped()) == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert configs.find("math_qa").samefile(ROOT / "configs" / "math_qa.yaml")
    assert configs.find("ddp", folder="accelerate").samefile(ROOT / "configs" / "accelerate" / "ddp.yaml")
    monkeypatch.chdir(tmp_path)
    Path("math_qa").write_text("x: 1")
    assert configs.find("math_qa") == Path("math_qa")


def test_every_config_is_in_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert project["package-dir"]["osd.configs"] == "configs"
    assert "osd.configs" in project["packages"]
    found = {path for pattern in project["package-data"]["osd.configs"] for path in (ROOT / "configs").glob(pattern)}
    assert found == {path for path in (ROOT / "configs").rglob("*") if path.is_file()}


# -- osd train ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Arguments of the `accelerate launch` that a command would run, on a machine with `gpus` GPUs."""

    def run(*argv, gpus=0):
        seen = []
        with monkeypatch.context() as patched:
            patched.setattr(train_osd, "parse", parsed_by(seen))
            patched.setattr(launch, "_replace_process", seen.append)
            patched.setattr("torch.cuda.device_count", lambda: gpus)
            patched.setattr("accelerate.commands.config.config_args.default_config_file", "absent")
            for name in launch.LAUNCHED:
                patched.delenv(name, raising=False)
            cli.main(["train", *argv])
        parsed, arguments = seen
        at = arguments.index("-m")
        assert arguments[at : at + 2] == ["-m", "osd.train.train_osd"]
        assert arguments[at + 2 :] == parsed
        return arguments[:at], parsed

    return run


def parsed_by(seen):
    """A stand-in for `train_osd.parse` that notes its arguments."""

    def parse(argv):
        seen.append(argv)
        return SimpleNamespace(dry_run="--dry_run" in argv), SimpleNamespace(use_cpu="--use_cpu" in argv), None

    return parse


def test_train_resolves_the_config_and_passes_all_flags(launched):
    _, given = launched("--config", "math_qa", "--learning_rate", "1e-5", "--use_cpu", "--columns=a b")
    assert Path(given[1]).samefile(ROOT / "configs" / "math_qa.yaml")
    assert given[2:] == ["--learning_rate", "1e-5", "--use_cpu", "--columns=a b"]


@pytest.mark.parametrize(
    ("argv", "gpus", "expected"),
    [
        ([], 0, ["--num_processes", "1", "--num_machines", "1", "--cpu"]),
        ([], 1, ["--num_processes", "1", "--num_machines", "1"]),
        ([], 4, ["--num_processes", "4", "--num_machines", "1", "--multi_gpu"]),
        (["--num_processes", "2"], 4, ["--num_processes", "2", "--num_machines", "1", "--multi_gpu"]),
        (["--use_cpu"], 4, ["--num_processes", "1", "--num_machines", "1", "--cpu"]),
    ],
)
def test_train_uses_the_devices_of_the_machine(argv, gpus, expected, launched):
    arguments, _ = launched(*argv, gpus=gpus)
    assert arguments == [*expected, "--mixed_precision", "no", "--dynamo_backend", "no"]


def test_train_takes_a_config_of_accelerate(launched):
    arguments, given = launched("--accelerate_config", "fsdp2", "--num_processes=2", "--bf16", "true", gpus=4)
    assert arguments == ["--config_file", str(configs.ROOT / "accelerate" / "fsdp2.yaml"), "--num_processes", "2"]
    assert given == ["--bf16", "true"]
    arguments, _ = launched("--num_processes", "2", "--use_cpu")
    assert arguments[1].endswith("cpu_ddp.yaml")


@pytest.mark.parametrize(
    ("variable", "flag"), [("LOCAL_RANK", None), ("ACCELERATE_MIXED_PRECISION", None), (None, "--dry_run")]
)
def test_train_runs_in_this_process_under_a_launcher_and_for_a_dry_run(variable, flag, monkeypatch):
    seen = []
    monkeypatch.setattr(train_osd, "command", seen.append)
    monkeypatch.setattr(train_osd, "parse", parsed_by([]))
    for name in launch.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "0")
    cli.main(["train", "--max_steps", "1", *([flag] if flag else [])])
    assert seen == [["--max_steps", "1", *([flag] if flag else [])]]


# -- osd env ------------------------------------------------------------------------------------------------------------


def test_env_reports_versions_devices_and_variables_without_secrets(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_API_KEY", "hunter2")
    cli.main(["env"])
    out = capsys.readouterr().out
    for line in ("osd: ", "python: ", "torch: ", "trl: ", "GPU", "vLLM: ", "VLLM_LOGGING_LEVEL=DEBUG", "VLLM_API_KEY=(hidden)"):
        assert line in out
    assert "hunter2" not in out


def test_env_goes_on_where_a_part_fails(monkeypatch):
    def broken():
        raise RuntimeError("no driver")

    monkeypatch.setattr("torch.cuda.is_available", broken)
    monkeypatch.setitem(sys.modules, "osd.engine.backend.versions", None)
    report = environment.report()
    assert "devices: cannot be read (RuntimeError: no driver)" in report
    assert "supported: cannot be read" in report
    assert "machine: " in report


@pytest.mark.parametrize(("status", "expected"), [(2, 2), (130, 130), (-9, 137)])
def test_the_launch_ends_with_the_status_of_the_training_process(monkeypatch, status, expected):
    def main():
        raise subprocess.CalledProcessError(status, ["python"])

    monkeypatch.setattr("accelerate.commands.launch.main", main)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            launch.accelerate_launch()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ended.value.code == expected
