"""The rewind rule on the real engine: tiny caches and budgets change when things are computed, never what is sampled."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from osd.engine.engine import PairConfig, PairEngine, PairPrompt
from osd.engine.request import PairOptions
from tests.exact import completion_logits, reference
from tests.tiny import tiny_engine_kwargs

pytestmark = pytest.mark.gpu

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
    """Greedy completions of an engine with room for everything, one step at a time (closed before the next one starts)."""
    kwargs = tiny_engine_kwargs(async_scheduling=False)
    teacher, student = map(str, tiny_pair)
    with PairEngine(PairConfig(teacher=teacher, student=student, engine_kwargs=kwargs)) as engine:
        completions = engine.generate(prompts(), sampling=dict(max_tokens=MAX_TOKENS, temperature=0.0))
    return [c.token_ids for c in completions]


@pytest.fixture(scope="module", params=[(34, 50), (50, 34)], ids=["slow teacher prefill", "slow student prefill"])
def cramped(tiny_pair, unconstrained, request):
    """An engine whose sides chunk their prefills differently and hold about two of the requests at once."""
    teacher, student = map(str, tiny_pair)
    kwargs = tiny_engine_kwargs(max_num_seqs=8, num_gpu_blocks_override=13)
    config = PairConfig(
        teacher=teacher,
        student=student,
        engine_kwargs=kwargs,
        teacher_kwargs={"max_num_batched_tokens": request.param[0]},
        student_kwargs={"max_num_batched_tokens": request.param[1]},
    )
    with PairEngine(config) as engine:
        yield engine


def run_with_random_arrivals(engine: PairEngine, schedule: int, **sampling):
    """Submit the prompts in random order and at random times; returns outputs and records by prompt index."""
    rng = random.Random(schedule)
    order = rng.sample(range(24), 24)
    pending = [prompts()[i] for i in order]
    params = engine._sampling_params(pending, dict(max_tokens=MAX_TOKENS) | sampling, PairOptions(record=True))
    names: dict[str, str] = {}
    outputs = {}
    while pending or engine._engine.has_unfinished_requests():
        for _ in range(rng.randint(0, 3)):
            if pending:
                names |= engine._submit([pending.pop(0)], [params.pop(0)])
        for _ in range(rng.randint(1, 10)):
            outputs |= {o.request_id: o.outputs[0] for o in engine._engine.step() if o.finished}
    records = engine._take_records()
    return {
        index: (outputs[name], records[internal].of_tokens(len(outputs[name].token_ids)))
        for index, (name, internal) in zip(order, names.items(), strict=True)
    }


def watch(engine: PairEngine, monkeypatch) -> Counter:
    """Count preemptions, prefix hits and rewinds by side."""
    seen: Counter = Counter()
    scheduler = engine._engine.engine_core.engine_core.scheduler
    for side, name in ((scheduler, "teacher"), (scheduler.student, "student")):
        preempt = side._preempt_request

        def counted(*args, preempt=preempt, name=name, **kwargs):
            seen[f"{name} preempted"] += 1
            return preempt(*args, **kwargs)

        monkeypatch.setattr(side, "_preempt_request", counted)
    schedule = scheduler.schedule

    def scheduled(*args, **kwargs):
        output = schedule(*args, **kwargs)
        step = output.osd
        for name, side, out, ahead in (
            ("teacher", scheduler, output, step.teacher_ahead),
            ("student", scheduler.student, step.student_output, step.student_ahead),
        ):
            seen[f"{name} ahead in prefill"] += sum(not side.requests[i].num_output_tokens for i in ahead)
            seen[f"{name} ahead in decoding"] += sum(side.requests[i].num_output_tokens > 0 for i in ahead)
            seen[f"{name} hits"] += sum(r.num_computed_tokens > 0 for r in out.scheduled_new_reqs)
        return output

    monkeypatch.setattr(scheduler, "schedule", scheduled)
    return seen


def test_greedy_results_do_not_depend_on_the_schedule(cramped, unconstrained, monkeypatch):
    seen = watch(cramped, monkeypatch)
    for schedule in range(6):
        results = run_with_random_arrivals(cramped, schedule, temperature=0.0)
        assert {i: list(output.token_ids) for i, (output, _) in results.items()} == dict(enumerate(unconstrained))
    # The schedules must have been hard, or the comparison proves nothing.
    for side in ("teacher", "student"):
        for event in ("preempted", "ahead in prefill", "ahead in decoding", "hits"):
            assert seen[f"{side} {event}"] > 0, seen


def test_seeded_results_do_not_depend_on_the_schedule(cramped):
    """A discarded sample must not advance a request's random generator."""
    runs = [run_with_random_arrivals(cramped, schedule, temperature=1.0, seed=99) for schedule in (1, 2, 3)]
    tokens = [[list(run[i][0].token_ids) for i in range(24)] for run in runs]
    differing = sum(not (a == b == c) for a, b, c in zip(*tokens, strict=True))
    assert differing == 0


def test_records_are_exact_under_a_hard_schedule(cramped, tiny_pair):
    """Every position once, in order, with both models' log-probabilities there: nothing skipped, sampled twice or stale."""
    models = dict(zip(("logp_teacher", "logp_theta"), map(reference, tiny_pair), strict=True))
    for i, (output, record) in run_with_random_arrivals(cramped, 5, temperature=1.0).items():
        token = torch.tensor(output.token_ids)[:, None]
        assert len(record) == len(output.token_ids)
        for name, ids in (("logp_teacher", prompts()[i].teacher_token_ids), ("logp_theta", prompts()[i].student_token_ids)):
            expected = completion_logits(models[name], ids, output.token_ids).log_softmax(-1).gather(-1, token)[:, 0]
            torch.testing.assert_close(getattr(record, name).double(), expected, atol=1e-3, rtol=0)
