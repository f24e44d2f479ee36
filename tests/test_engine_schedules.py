"""Greedy tokens of the real engine against transformers in float64, under schedules that preempt, split and reorder.

The twin of test_scheduler.py's simulation, with models. α is found by bisection (tests/exact.py); a token is wrong if another
one is more likely by more than 1e-4 in log q*. No token may be wrong.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from osd.engine.engine import PairEngine, PairPrompt
from osd.engine.request import PairOptions
from tests.exact import not_greedy, q_star, reference
from tests.pairs import runners, start, step, submit, watch
from tests.tiny import save_tokenizer

pytestmark = pytest.mark.gpu


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A schedule.

    Attributes:
        requests: how many.
        prompt, completion: shortest and longest, in tokens.
        shared: tokens that all prompts of both sides begin with.
        abort: requests that are aborted, by the step after which they are.
        engine: engine arguments.
        drafts: how many tokens the student drafts.
        expect: events of `tests.pairs.watch` that must occur, or the schedule proves nothing.
    """

    requests: int
    engine: dict
    expect: tuple[str, ...]
    prompt: tuple[int, int] = (3, 90)
    completion: tuple[int, int] = (4, 40)
    shared: int = 0
    abort: tuple[tuple[int, int], ...] = ()
    student: str = "llama"
    drafts: int = 0


# 13 blocks of 32, one of which vLLM keeps: a longest request (90 + 70 tokens) takes 5 of 12.
PREEMPT = ("teacher preempted", "student preempted", "rows in another order")
SCENARIOS = {
    "plain": Scenario(requests=3, prompt=(5, 12), completion=(6, 12), engine=dict(max_num_batched_tokens=256), expect=()),
    "chunked": Scenario(
        requests=8, engine=dict(max_num_batched_tokens=24), expect=("teacher ahead in prefill", "student ahead in prefill")
    ),
    "preempt": Scenario(
        requests=10,
        completion=(20, 70),
        engine=dict(num_gpu_blocks_override=13, max_num_batched_tokens=48),
        expect=PREEMPT,
    ),
    "other architecture": Scenario(
        requests=8,
        completion=(10, 60),
        shared=32,
        student="qwen",
        engine=dict(num_gpu_blocks_override=13, max_num_batched_tokens=40),
        expect=(*PREEMPT, "teacher hits", "student hits"),
    ),
    "abort": Scenario(
        requests=8,
        abort=((9, 0), (25, 3)),
        engine=dict(num_gpu_blocks_override=13, max_num_batched_tokens=40),
        expect=("teacher ahead in prefill",),
    ),
    "sync": Scenario(
        requests=8,
        completion=(20, 60),
        engine=dict(num_gpu_blocks_override=13, max_num_batched_tokens=48, async_scheduling=False),
        expect=PREEMPT,
    ),
    "drafts": Scenario(
        requests=10,
        completion=(10, 60),
        shared=32,
        abort=((9, 0), (25, 3)),
        student="qwen",
        engine=dict(num_gpu_blocks_override=13, max_num_batched_tokens=40),
        drafts=4,
        expect=(*PREEMPT, "teacher hits", "student hits"),
    ),
    "sync drafts": Scenario(
        requests=8,
        completion=(20, 60),
        engine=dict(num_gpu_blocks_override=13, max_num_batched_tokens=48, async_scheduling=False),
        drafts=2,
        expect=PREEMPT,
    ),
}


SLOW = ("plain", "other architecture", "sync drafts")  # the others cover their parts


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A student of another architecture, with biases, grouped heads, three layers and tied embeddings."""
    path = tmp_path_factory.mktemp("qwen")
    save_tokenizer(path, 64)
    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    Qwen2ForCausalLM(config).float().save_pretrained(path)
    return path


def requests_of(scenario: Scenario, rng: random.Random) -> list[tuple[PairPrompt, int]]:
    head = [rng.randrange(7, 64) for _ in range(scenario.shared)]

    def ids() -> list[int]:
        return head + [rng.randrange(7, 64) for _ in range(rng.randint(*scenario.prompt))]

    return [
        (PairPrompt(teacher_token_ids=ids(), student_token_ids=ids()), rng.randint(*scenario.completion))
        for _ in range(scenario.requests)
    ]


def sample(engine: PairEngine, scenario: Scenario, requests: list[tuple[PairPrompt, int]]) -> dict[int, list[int]]:
    """Admit a request every third step; return the completions that were not aborted, by request."""
    names: dict[int, tuple[str, str]] = {}
    finished, steps = {}, 0
    while len(names) < len(requests) or engine._frontend.busy:
        if len(names) < len(requests) and (steps % 3 == 0 or not engine._frontend.busy):
            prompt, length = requests[len(names)]
            sampling = dict(temperature=0.0, max_tokens=length, ignore_eos=True)
            [names[len(names)]] = submit(engine, [prompt], sampling, PairOptions()).items()
        finished |= step(engine)
        steps += 1
        for _, request in (entry for entry in scenario.abort if entry[0] == steps):
            engine._frontend.abort([names[request][1]])
    aborted = {request for _, request in scenario.abort}
    return {i: finished[name].token_ids for i, (name, _) in names.items() if i not in aborted}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SCENARIOS])
def test_no_token_is_wrong(tiny_pair, qwen, monkeypatch, name):
    scenario = SCENARIOS[name]
    paths = tiny_pair[0], (qwen if scenario.student == "qwen" else tiny_pair[1])
    models, requests = [reference(path) for path in paths], requests_of(scenario, random.Random(0))
    with start(paths, dict(num_speculative_tokens=scenario.drafts), max_num_seqs=6, **scenario.engine) as engine:
        seen = watch(engine, monkeypatch)
        completions = sample(engine, scenario, requests)
        step(engine)
        for side in (engine._frontend.scheduler, engine._frontend.scheduler.student):
            assert not side.requests
            assert side.kv_cache_manager.usage == 0
        # The last to end are reported with the next step.
        assert all(len(runner.req_states.req_id_to_index) <= 6 for runner in runners(engine).values())
        monkeypatch.undo()
    for i, tokens in completions.items():
        prompt, length = requests[i]
        assert len(tokens) == length
        assert not not_greedy(q_star(models, (prompt.teacher_token_ids, prompt.student_token_ids), tokens), tokens), i
    assert not [event for event in scenario.expect if not seen[event]], seen
