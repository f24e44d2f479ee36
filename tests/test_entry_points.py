"""The entry script under `accelerate launch`, and the training example, each as a user starts it: a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_engine_kwargs

ROOT = Path(__file__).parent.parent


def run(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # as `make setup` installs it, but for this checkout
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"question": f"w{i} w{i + 1}", "answer": f"w{i + 30}"} for i in range(7, 19)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tmp_path, tiny_pair, data):
    path = tmp_path / "config.yaml"
    settings = {
        "model_name_or_path": str(tiny_pair[1]),
        "teacher_model_name_or_path": str(tiny_pair[0]),
        "dataset_name": str(data),
        "dataset_test_name": str(data),
        "prompt_column": "question",
        "enable_chat_template": True,
        "privileged_template": "{prompt} {answer}",
        "engine_kwargs": tiny_engine_kwargs(),
        "max_completion_length": 4,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "output_dir": str(tmp_path / "out"),
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def launch(*arguments):
    return run("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "trainers/train_osd.py", *arguments)


def test_osd_train_launches_trains_evaluates_and_saves(config, tmp_path, tiny_pair):
    status, out, err = run("-m", "osd", "train", "--config", config, "--learning_rate", "1e-2")
    assert status == 0, out + err
    assert f"trained model in {tmp_path / 'out'}; next: " in out
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    name = "osd/engine/weights_version"
    assert [entry[name] for entry in state["log_history"] if name in entry] == [1, 2]
    assert [entry["eval_osd/alpha/max"] for entry in state["log_history"] if "eval_osd/alpha/max" in entry] == [0]
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_pair[1], tmp_path / "out"))
    assert not before.lm_head.weight.equal(after.lm_head.weight)


def test_a_wrong_key_ends_the_launch_with_its_name(config):
    config.write_text(config.read_text() + "alpha_metod: fixed\n")
    status, _, err = launch("--config", config)
    assert status != 0
    assert "osd train: error: unknown key 'alpha_metod'" in err


@pytest.mark.slow
def test_the_training_example(tiny_pair, data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps({"prompt": r["question"], "privileged_context": r["answer"]}) + "\n" for r in rows))
    flags = ["--student", tiny_pair[1], "--teacher", tiny_pair[0], "--data", data, "--steps", 2, "--cpu"]
    status, out, err = run("examples/train.py", *flags, "--output", tmp_path / "out")
    assert status == 0, out + err
    assert (tmp_path / "out" / "model.safetensors").is_file()
