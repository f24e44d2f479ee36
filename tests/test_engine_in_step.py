"""Two sides in step on the real engine: tiny caches and budgets change when things are computed, never what is sampled."""

from __future__ import annotations

import random

import pytest
import torch

from osd.engine.engine import PairEngine, PairPrompt
from osd.engine.request import PairOptions
from tests.exact import completion_logits, penalised, q_star
from tests.pairs import collect, start, step, submit, watch

MAX_TOKENS = 40


def prompts(count: int = 24) -> list[PairPrompt]:
    """Up to 150 tokens a side, in blocks of 32; some share a prefix of two blocks on one side only."""
    rng = random.Random(7)
    shared = [rng.randrange(7, 64) for _ in range(64)]
    pairs = []
    for n in range(count):
        sides = [[rng.randrange(7, 64) for _ in range(rng.randint(1, 80))] for _ in range(2)]
        if n % 3 == 0:
            side = (n // 3) % 2
            sides[side] = shared + sides[side]
        pairs.append(PairPrompt(teacher_token_ids=sides[0], student_token_ids=sides[1]))
    return pairs


@pytest.fixture(scope="module")
def unconstrained(tiny_pair) -> list[list[int]]:
    """Greedy completions of an engine with room for everything, one step at a time."""
    with start(tiny_pair, async_scheduling=False) as engine:
        completions = engine.generate(prompts(), sampling=dict(max_tokens=MAX_TOKENS, temperature=0.0))
    return [c.token_ids for c in completions]


@pytest.fixture(scope="module")
def model_paths(tiny_pair, unconstrained):
    """The models of `engine`, which starts when the engine of ``unconstrained`` is closed."""
    return tiny_pair


def cramped(teacher_tokens: int, student_tokens: int) -> dict:
    """An engine whose sides split their prefills differently and hold about two of the requests at once."""
    return dict(
        engine_kwargs=dict(max_num_seqs=8, num_gpu_blocks_override=13),
        teacher_kwargs={"max_num_batched_tokens": teacher_tokens},
        student_kwargs={"max_num_batched_tokens": student_tokens},
    )


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize(
        "engine", [cramped(34, 50), cramped(50, 34)], ids=["slow teacher prefill", "slow student prefill"], indirect=True
    ),
]


def run_with_random_arrivals(engine: PairEngine, schedule: int, mix_tokens: int | None = None, **sampling):
    """Submit the prompts in random order and at random times; return each one's completion and record, by prompt index."""
    rng = random.Random(schedule)
    order, options = rng.sample(range(24), 24), PairOptions(record=True, mix_tokens=mix_tokens)
    pending, names, finished = list(order), {}, {}
    while pending or engine._frontend.busy:
        for _ in range(min(rng.randint(0, 3), len(pending))):
            prompt = prompts()[pending.pop(0)]
            names |= submit(engine, [prompt], dict(max_tokens=MAX_TOKENS) | sampling, options)
        for _ in range(rng.randint(1, 10)):
            finished |= step(engine)
    return dict(zip(order, collect(engine, names, finished), strict=True))


def test_greedy_results_do_not_depend_on_the_schedule(engine, unconstrained, monkeypatch):
    seen = watch(engine, monkeypatch)
    for schedule in range(6):
        results = run_with_random_arrivals(engine, schedule, temperature=0.0)
        assert {i: list(output.token_ids) for i, (output, _) in results.items()} == dict(enumerate(unconstrained))
    # The schedules must have been hard, or the comparison proves nothing.
    for side in ("teacher", "student"):
        for event in ("preempted", "ahead in prefill", "ahead in decoding", "hits"):
            assert seen[f"{side} {event}"] > 0, seen


def test_seeded_results_do_not_depend_on_the_schedule(engine):
    """A rejected sample must not advance a request's random numbers."""
    runs = [run_with_random_arrivals(engine, schedule, temperature=1.0, seed=99) for schedule in (1, 2, 3)]
    tokens = [[list(run[i][0].token_ids) for i in range(24)] for run in runs]
    differing = sum(not (a == b == c) for a, b, c in zip(*tokens, strict=True))
    assert differing == 0


def test_records_are_exact_under_a_hard_schedule(engine, models):
    """Every position appears once, in order, with both models' log-probabilities: none skipped, sampled twice or stale."""
    models = dict(zip(("logp_teacher", "logp_theta"), models, strict=True))
    for i, (output, record) in run_with_random_arrivals(engine, 5, temperature=1.0).items():
        token = torch.tensor(output.token_ids)[:, None]
        assert len(record) == len(output.token_ids)
        for name, ids in (("logp_teacher", prompts()[i].teacher_token_ids), ("logp_theta", prompts()[i].student_token_ids)):
            expected = completion_logits(models[name], ids, output.token_ids).log_softmax(-1).gather(-1, token)[:, 0]
            torch.testing.assert_close(getattr(record, name).double(), expected, atol=1e-3, rtol=0)


def preempted(seen) -> bool:
    return bool(seen["teacher preempted"] and seen["student preempted"])


def test_penalties_count_the_students_prompt_after_a_preemption(engine, models, monkeypatch):
    """vLLM counts a resumed request's tokens anew, from the teacher's prompt and what was sampled."""
    penalties, seen = dict(repetition=1.3, presence=0.4, frequency=0.2), watch(engine, monkeypatch)
    results = run_with_random_arrivals(engine, 3, ignore_eos=True, **{f"{name}_penalty": x for name, x in penalties.items()})
    assert preempted(seen)
    for i, (output, record) in results.items():
        sides = prompts()[i].teacher_token_ids, prompts()[i].student_token_ids
        expected = penalised(q_star(models, sides, output.token_ids), sides[1], output.token_ids, **penalties)
        expected = expected.log_softmax(-1).gather(-1, torch.tensor(output.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(record.logp_draw.double(), expected, atol=1e-3, rtol=1e-3)


def test_mixed_tokens_are_counted_across_preemptions(engine, monkeypatch):
    seen = watch(engine, monkeypatch)
    results = run_with_random_arrivals(engine, 4, mix_tokens=15, ignore_eos=True)
    assert preempted(seen)
    for _, record in results.values():
        assert ((record.alpha > 0).nonzero()[:, 0] == torch.arange(15)).all()
        assert len(record) == MAX_TOKENS
