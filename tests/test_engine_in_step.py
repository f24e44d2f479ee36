"""Two sides in step on the real engine: tiny caches and budgets change when things are computed, never what is sampled."""

from __future__ import annotations

import pytest
import torch

from tests.exact import completion_logits, penalised, q_star
from tests.pairs import MAX_TOKENS, cramped, hard_prompts, preempted, run_with_random_arrivals, start, watch


@pytest.fixture(scope="module")
def unconstrained(tiny_pair) -> list[list[int]]:
    """Greedy completions of an engine with room for everything, one step at a time."""
    with start(tiny_pair, async_scheduling=False) as engine:
        completions = engine.generate(hard_prompts(), sampling=dict(max_tokens=MAX_TOKENS, temperature=0.0))
    return [c.token_ids for c in completions]


@pytest.fixture(scope="module")
def model_paths(tiny_pair, unconstrained):
    """The models of `engine`, which starts when the engine of ``unconstrained`` is closed."""
    return tiny_pair


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize(
        "engine",
        [
            pytest.param(cramped(34, 50), id="slow teacher prefill"),
            pytest.param(cramped(50, 34), id="slow student prefill"),
            pytest.param(cramped(50, 34) | dict(num_speculative_tokens=3), id="drafts", marks=pytest.mark.slow),
        ],
        indirect=True,
    ),
]


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
        for name, ids in (
            ("logp_teacher", hard_prompts()[i].teacher_token_ids),
            ("logp_theta", hard_prompts()[i].student_token_ids),
        ):
            expected = completion_logits(models[name], ids, output.token_ids).log_softmax(-1).gather(-1, token)[:, 0]
            torch.testing.assert_close(getattr(record, name).double(), expected, atol=1e-3, rtol=0)


def test_penalties_count_the_students_prompt_after_a_preemption(engine, models, monkeypatch):
    """vLLM counts a resumed request's tokens anew, from the teacher's prompt and what was sampled."""
    penalties, seen = dict(repetition=1.3, presence=0.4, frequency=0.2), watch(engine, monkeypatch)
    results = run_with_random_arrivals(engine, 3, ignore_eos=True, **{f"{name}_penalty": x for name, x in penalties.items()})
    assert preempted(seen)
    for i, (output, record) in results.items():
        sides = hard_prompts()[i].teacher_token_ids, hard_prompts()[i].student_token_ids
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
