"""Training of a sharded student against a server, in two processes: FSDP1, FSDP2 and DeepSpeed ZeRO-3 on gloo."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.exact import completion_logits
from tests.launches import fsdp_on_a_cpu, in_float32, launch
from tests.served import KEY

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
            pytest.skip("needs deepspeed: make test-sharded")
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
