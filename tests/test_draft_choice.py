"""The choice of k on engines whose times and acceptance are known: it finds the best k, and costs little where none pays.

And the start of an engine that chooses.
"""

from __future__ import annotations

import random

import pytest
import torch

from osd.engine.draft_choice import DraftChooser
from osd.engine.engine import PairPrompt
from osd.engine.speculation import expected_tokens
from tests.pairs import start

MOST = 6


def simulate(*, student: float, teacher: float, acceptance: float, tokens: int, batch: int = 32, noise: float = 0.05):
    """Return (seconds, seconds without drafts, the last k) of decoding that many tokens per request."""
    chooser, rng = DraftChooser(MOST), random.Random(0)
    pending = [0]  # with async scheduling the next step is chosen before this one is observed
    seconds = done = 0.0
    while done < tokens:
        pending.append(chooser.choose(batch))
        k = pending.pop(0)
        took = (teacher + (k + 1) * student) * rng.uniform(1 - noise, 1 + noise)
        got = expected_tokens(acceptance, k) * rng.uniform(0.9, 1.1)
        seconds, done = seconds + took, done + got
        chooser.observe(batch, k, took, got)
    return seconds, done * (teacher + student), k


@pytest.mark.parametrize(
    ("student", "acceptance"), [(0.1, 0.9), (0.1, 0.7), (0.2, 0.8), (0.05, 0.95), (0.5, 0.95)], ids=lambda v: str(v)
)
def test_it_ends_near_the_best_number_of_drafts(student, acceptance):
    def per_token(k: int) -> float:
        return (1 + (k + 1) * student) / expected_tokens(acceptance, k)

    seconds, without, last = simulate(student=student, teacher=1.0, acceptance=acceptance, tokens=4000)
    best = min(per_token(k) for k in range(MOST + 1)) / (1 + student)
    assert per_token(last) < 1.05 * best * (1 + student)
    assert seconds / without < best + 0.1


@pytest.mark.parametrize("tokens", [100, 300, 3000])
@pytest.mark.parametrize(("student", "acceptance"), [(1.0, 0.3), (2.0, 0.6), (0.5, 0.1)])
def test_where_no_draft_pays_it_loses_less_than_three_percent(student, acceptance, tokens):
    seconds, without, _ = simulate(student=student, teacher=1.0, acceptance=acceptance, tokens=tokens)
    assert seconds / without < 1.03


def test_batches_of_another_size_are_chosen_for_on_their_own():
    chooser = DraftChooser(MOST)
    for _ in range(400):
        for _ in range(3):
            k = chooser.choose(4)
            chooser.observe(4, k, 1 + (k + 1) * 0.1, expected_tokens(0.9, k))
        for _ in range(3):
            k = chooser.choose(100)
            chooser.observe(100, k, (1 + (k + 1)) * 2.0, expected_tokens(0.1, k))
    assert chooser.choose(4) >= 3
    assert chooser.choose(100) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="every engine runs this on a GPU")
def test_vllms_warm_up_for_a_gpu_runs_with_drafts(tiny_pair, monkeypatch):
    """vLLM warms up on GPUs alone, with a grammar's masks for every position of a cycle."""
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    cold, masks = CPUWorker.compile_or_warm_up_model, []

    def warm(worker):
        runner = worker.model_runner
        masks.append((runner.structured_outputs_worker.mask_stride, runner.decode_query_len))
        warmup_kernels(runner, worker.execute_model, worker.sample_tokens)
        return cold(worker)

    monkeypatch.setattr(CPUWorker, "compile_or_warm_up_model", warm)
    prompts = [PairPrompt(teacher_token_ids=[9, 10], student_token_ids=[11])] * 4
    with start(tiny_pair, dict(num_speculative_tokens="auto")) as engine:
        assert masks == [(1, 1), (9, 9)]  # the student's, the teacher's
        completions = engine.generate(prompts, sampling=dict(max_tokens=8, ignore_eos=True))
        assert [len(completion.token_ids) for completion in completions] == [8] * 4
