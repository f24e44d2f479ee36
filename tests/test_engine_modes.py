"""A pair in vLLM's other modes: the engine core in its own process, and tensor parallelism of two.

Each mode runs in a process of its own (vLLM reads its environment at import) and must give the records of the in-process
engine: equal greedy tokens, log-probabilities to 1e-4, and weights that follow a sync.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
from osd.engine.engine import PairConfig, PairEngine, PairPrompt
from tests.tiny import tiny_engine_kwargs

def signal(record):
    assert (record.teacher_hidden_TH is None) != (record.teacher_topk_TX is None)
    return record.teacher_topk_TX if record.teacher_hidden_TH is None else record.teacher_hidden_TH

def main():
    teacher, student, out, tensor_parallel = sys.argv[1:5]
    kwargs = tiny_engine_kwargs(tensor_parallel_size=int(tensor_parallel))
    prompts = [PairPrompt(teacher_token_ids=[7 + i, 9, 10], student_token_ids=[30, 31 + i] * 20) for i in range(6)]
    weights = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).state_dict()
    with PairEngine(PairConfig(teacher=teacher, student=student, engine_kwargs=kwargs)) as engine:
        runs = []
        for sync in (False, True):
            if sync:
                assert engine.load_student_weights(weights.items()) == 1
            greedy = engine.generate(prompts, sampling=dict(max_tokens=20, temperature=0.0, ignore_eos=True), hidden=True)
            seeded = engine.generate(prompts, sampling=dict(max_tokens=20, seed=4, ignore_eos=True, stop=["w20"]), topk=4)
            runs += [greedy, seeded]
        rows = [[(c.token_ids, c.record.values_TR, signal(c.record), c.weights_version) for c in r] for r in runs]
        torch.save(rows, out)

if __name__ == "__main__":
    main()
"""


def run(tmp_path: Path, tiny_pair, name: str, *, multiprocessing: int, tensor_parallel: int):
    script, out = tmp_path / "run.py", tmp_path / f"{name}.pt"
    script.write_text(SCRIPT)
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": str(multiprocessing), "PYTHONPATH": os.getcwd()}
    if tensor_parallel > 1:
        env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(i % os.cpu_count()) for i in range(tensor_parallel))
    command = [sys.executable, str(script), *map(str, tiny_pair), str(out), str(tensor_parallel)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def in_process(tmp_path_factory, tiny_pair):
    return run(tmp_path_factory.mktemp("mode"), tiny_pair, "inproc", multiprocessing=0, tensor_parallel=1)


@pytest.mark.parametrize(
    ("multiprocessing", "tensor_parallel"),
    [
        pytest.param(1, 1, id="own process", marks=pytest.mark.slow),
        pytest.param(0, 2, id="two ranks", marks=pytest.mark.slow),
        pytest.param(1, 2, id="both"),
    ],
)
def test_every_mode_of_the_engine_samples_the_same(tmp_path, tiny_pair, in_process, multiprocessing, tensor_parallel):
    runs = run(tmp_path, tiny_pair, "other", multiprocessing=multiprocessing, tensor_parallel=tensor_parallel)
    for expected, got in zip(in_process, runs, strict=True):
        for row, other in zip(expected, got, strict=True):
            (ids, values, signal, version), (other_ids, other_values, other_signal, other_version) = row, other
            assert (other_ids, other_version) == (ids, version)
            torch.testing.assert_close(other_values, values, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(other_signal, signal, atol=1e-3, rtol=1e-3)
    # After the sync the student is the teacher's model: the run was not of stale weights.
    assert [version for *_, version in runs[2]] == [1] * 6
    assert not torch.allclose(runs[0][0][1][:3], runs[2][0][1][:3], atol=1e-3)
