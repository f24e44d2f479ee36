"""The choice of k on engines whose times and acceptance are known: it finds the best k, and costs little where none pays.

And the start of an engine that chooses.
"""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from osd.engine.draft_choice import DraftChooser
from osd.engine.engine import PairPrompt
from osd.engine.speculation import expected_tokens
from tests.pairs import start

MOST = 6


def cycle(rng: random.Random, acceptance: float, drafts: int) -> int:
    """Return how many tokens a request gets from a cycle."""
    tokens = 1
    while tokens <= drafts and rng.random() < acceptance:
        tokens += 1
    return tokens


def simulate(
    *, student: float, teacher: float, acceptance: float, tokens: int, batch: int = 8
) -> tuple[float, float, list[int]]:
    """Return (seconds, seconds without drafts, k of each step) of decoding that many tokens per request.

    Steps take 5% longer or shorter, and one of a hundred is interrupted.
    """
    chooser, rng = DraftChooser(MOST), random.Random(0)
    chosen = [0]  # with async scheduling the next step is chosen before this one is observed
    seconds = done = 0.0
    while done < tokens:
        chosen.append(chooser.choose(batch))
        k = chosen[-2]
        took = (teacher + (k + 1) * student) * rng.uniform(0.95, 1.05)
        got = [cycle(rng, acceptance, k) for _ in range(batch)]
        seconds, done = seconds + took, done + sum(got) / batch
        chooser.observe(k, took * (4 if rng.random() < 0.01 else 1), got)
    return seconds, done * (teacher + student), chosen


@pytest.mark.parametrize("tokens", [128, 4000])
@pytest.mark.parametrize(
    ("student", "acceptance"), [(0.1, 0.9), (0.1, 0.7), (0.2, 0.8), (0.05, 0.95), (0.5, 0.95)], ids=lambda v: str(v)
)
def test_it_soon_finds_the_best_number_of_drafts(student, acceptance, tokens):
    def per_token(k: int) -> float:
        return (1 + (k + 1) * student) / expected_tokens(acceptance, k) / (1 + student)

    seconds, without, chosen = simulate(student=student, teacher=1.0, acceptance=acceptance, tokens=tokens)
    best = min(per_token(k) for k in range(MOST + 1))
    assert seconds / without < best + (0.25 if tokens == 128 else 0.05) * (1 - best)
    if tokens == 4000:
        assert statistics.mean(map(per_token, chosen[-200:])) < 1.03 * best


@pytest.mark.parametrize("tokens", [100, 300, 3000])
@pytest.mark.parametrize(("student", "acceptance"), [(1.0, 0.3), (2.0, 0.6), (0.5, 0.1)])
def test_where_no_draft_pays_it_loses_less_than_three_percent(student, acceptance, tokens):
    seconds, without, _ = simulate(student=student, teacher=1.0, acceptance=acceptance, tokens=tokens)
    assert seconds / without < 1.03


@pytest.mark.parametrize("batch", [1, 8])
def test_it_follows_a_pair_whose_agreement_changes(batch):
    chooser, rng, chosen, speed = DraftChooser(MOST), random.Random(0), [], []
    for acceptance in (0.95, 0.1, 0.95):
        seconds = tokens = 0.0
        for _ in range(1500):
            chosen.append(k := chooser.choose(batch))
            got = [cycle(rng, acceptance, k) for _ in range(batch)]
            seconds, tokens = seconds + 1 + (k + 1) * 0.25, tokens + sum(got) / batch
            chooser.observe(k, 1 + (k + 1) * 0.25, got)
        speed.append(tokens / seconds * 1.25)  # 1: without drafts
    assert statistics.mean(chosen[1400:1500]) > 4
    assert speed[1] > 0.9
    assert speed[2] > 0.9 * speed[0]


def test_batches_of_another_size_are_chosen_for_on_their_own():
    chooser, rng, chosen = DraftChooser(MOST), random.Random(0), dict[int, list[int]]({4: [], 100: []})
    for _ in range(400):
        for batch, student in ((4, 0.1), (100, 20.0)):
            for _ in range(3):
                k = chooser.choose(batch)
                chooser.observe(k, 1 + (k + 1) * student, [cycle(rng, 0.8, k) for _ in range(batch)])
                chosen[batch].append(k)
    assert statistics.mean(chosen[4][-600:]) > 3
    assert statistics.mean(chosen[100][-600:]) < 0.2


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
