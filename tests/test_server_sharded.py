"""Training against a server in two processes on gloo: students in shards (FSDP1, FSDP2, DeepSpeed ZeRO-3), and two nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.exact import completion_logits
from tests.launched import GREEDY
from tests.launches import fsdp_on_a_cpu, in_float32, launch
from tests.served import KEY, ROOT, free_port
from tests.training import ROWS, build_trainer, logged

pytestmark = pytest.mark.slow

STEPS = 4
FIELDS = {
    "async_generation": True,
    "async_weight_updates": "running",
    "max_staleness": 2,
    "max_steps": STEPS,
    "max_completion_length": 60,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "generation_kwargs": {"ignore_eos": True},
}
FSDP1 = {
    "fsdp_version": 1,
    "fsdp_use_orig_params": True,
    "fsdp_sync_module_states": False,
    "fsdp_reshard_after_forward": "FULL_SHARD",
}


def configuration(kind, path):
    """The configuration of accelerate, and the script that comes before the test's own."""
    if kind == "zero3":
        if find_spec("deepspeed") is None:
            pytest.skip("needs deepspeed: PYTHONPATH=build/deepspeed after make test-sharded")
        return in_float32("zero3", path, num_processes=2, use_cpu=True), []
    return fsdp_on_a_cpu(path, **(FSDP1 if kind == "fsdp1" else {})), ["tests/fsdp_cpu.py"]


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2", "zero3"])
def test_a_sharded_student_is_sampled_from_as_it_is(tiny_pair, server, tmp_path, monkeypatch, kind):
    """Under running requests, with evaluation in between.

    log π_θ of every token, against transformers with the live weights of the step that its age names.
    """
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv("OSD_TEST_URL", server.server.url)
    monkeypatch.setenv("OSD_TEST_FIELDS", json.dumps(FIELDS))
    config, before = configuration(kind, tmp_path / "accelerate.yaml")
    done = launch(config, *before, "tests/launched.py", "served", tmp_path, *tiny_pair)
    assert done.returncode == 0, done.stderr[:9000]
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = AutoModelForCausalLM.from_pretrained(tiny_pair[1]).eval()
    assert {one["kind"] for one in seen} == {"DistributedType." + ("DEEPSPEED" if kind == "zero3" else "FSDP")}
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert {step["elements"] for rank in ranks for step in rank} == {whole // 2}, "not sharded"
    assert seen[0]["loss"] == seen[1]["loss"]
    assert [len(step["rows"]) for rank in ranks for step in rank] == [2] * 2 * STEPS
    gaps = {}
    for at, step in enumerate(ranks[0]):
        model.load_state_dict(step["live"])
        for later, both in enumerate(zip(*ranks, strict=True)):
            for rank in both:
                for prompt, (token_ids, logp_T), age_T in zip(rank["prompts"], rank["rows"], rank["ages"], strict=True):
                    assert len(token_ids) == 60
                    own_T = age_T == later - at  # drawn from these weights
                    logp_TV = completion_logits(model, prompt, token_ids).log_softmax(-1)
                    gap_T = (logp_TV.gather(-1, torch.tensor(token_ids)[:, None])[:, 0] - logp_T).abs()
                    gaps.setdefault(True, []).extend(gap_T[own_T].tolist())
                    gaps.setdefault(False, []).extend(gap_T[~own_T].tolist())
    assert len(gaps[True]) == 60 * 4 * STEPS
    assert max(gaps[True]) < 1e-3
    assert max(gaps[False]) > 0.05, "the weights did not move: nothing was tested"
    assert max(int(age_T.max()) for rank in ranks for step in rank for age_T in step["ages"]) >= 1


def test_two_nodes_train_as_one_process(tiny_pair, server, tmp_path, monkeypatch):
    """`osd train` once per node, as docs/scaling.md says; both nodes are this machine."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    data, config = tmp_path / "train.jsonl", tmp_path / "config.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {"vllm_mode": "server", "vllm_server_base_url": server.server.url, "max_completion_length": 8, **GREEDY}
    settings |= {"teacher_model_name_or_path": str(tiny_pair[0]), "seed": 5}
    settings |= {"bf16": False, "use_cpu": True, "report_to": "none"}
    own = {"model_name_or_path": str(tiny_pair[1]), "dataset_name": str(data)}
    own |= {"per_device_train_batch_size": 2, "save_steps": 3}
    config.write_text(yaml.safe_dump({**settings, **own, "output_dir": str(tmp_path / "out"), "logging_steps": 1}))
    flags = ["--accelerate_config", "cpu_ddp", "--num_machines", "2", "--num_processes", "2", "--config", str(config)]
    flags += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "osd", "train", *flags, "--machine_rank", str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    history = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    with build_trainer(None, tiny_pair[1], tmp_path / "one", **settings) as one:
        one.train()
    assert [entry["loss"] for entry in history if "loss" in entry] == pytest.approx(logged(one, "loss"), rel=1e-4)
