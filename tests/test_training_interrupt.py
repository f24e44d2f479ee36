"""Ctrl-C ends the training command with status 130, and every checkpoint that it leaves is whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from osd.engine.wire import STATE_ROUTE
from osd.train.checkpointing import RUN_FILE, resolve
from tests.served import KEY, running
from tests.tiny import tiny_engine_kwargs

ROOT = Path(__file__).parent.parent
DEADLINE = 120  # seconds; a process that hangs fails the test

PROGRAM = """
import sys, time
from transformers import TrainerCallback
from osd.train import train_osd, trainer

place = sys.argv.pop(1)

class Marks(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and place == "training":
            print("HERE", flush=True)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3 and place == "batches in flight":
            print("HERE", flush=True)
            time.sleep(60)

class Marked(trainer.OSDTrainer):
    def _start(self, planned):
        if place == "loading":
            print("HERE", flush=True)
        else:
            self.add_callback(Marks())
        super()._start(planned)

train_osd.OSDTrainer = Marked
train_osd.command()
"""


@pytest.mark.parametrize("place", ["loading", "training", pytest.param("batches in flight", marks=pytest.mark.slow)])
def test_sigint_to_the_process_group_ends_training_with_130(tmp_path, tiny_pair, place, request):
    data, config, out = tmp_path / "train.jsonl", tmp_path / "config.yaml", tmp_path / "out"
    data.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(7, 39)))
    settings = {
        "model_name_or_path": str(tiny_pair[1]),
        "teacher_model_name_or_path": str(tiny_pair[0]),
        "dataset_name": str(data),
        "engine_kwargs": tiny_engine_kwargs(),
        "max_completion_length": 4,
        "max_steps": 100_000,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "save_total_limit": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "output_dir": str(out),
    }
    if place == "batches in flight":
        server = request.getfixturevalue("server")
        settings |= {"vllm_mode": "server", "vllm_server_base_url": server.server.url, "max_completion_length": 200}
        settings |= {"async_generation": True, "async_weight_updates": "running", "max_staleness": 2}
        settings |= {"generation_kwargs": {"ignore_eos": True}}
        del settings["engine_kwargs"]
    config.write_text(yaml.safe_dump(settings))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, place, "--config", str(config)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "VLLM_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert any(line.startswith("HERE") for line in process.stdout), process.stderr.read()[-2000:]
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
    finally:
        process.poll() is None and os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, err[-2000:]
    assert "osd train: interrupted; `--resume_from_checkpoint last` goes on" in err
    assert "Traceback" not in err
    if place == "batches in flight":
        deadline = time.monotonic() + DEADLINE
        while server.http.get(STATE_ROUTE).json()["trainer"] is not None or running(server):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    if place != "loading":
        last = Path(resolve("last", str(out)))
        assert json.loads((last / RUN_FILE).read_text())["weights_version"] >= 2
        assert (last / "model.safetensors").is_file()
        assert (last / "trainer_state.json").is_file()
