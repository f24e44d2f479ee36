"""The record of a real model agrees with transformers, each side on its own prompt, under chunked prefill and preemption.

Float32, SmolLM2-135M-Instruct on both sides. Bound 1e-3 on every log-probability.
"""

from __future__ import annotations

import pytest
import torch

from osd.engine.engine import PairPrompt
from osd.engine.request import PairOptions
from osd.prompts import encode
from tests.exact import completion_logits
from tests.pairs import collect, step, submit, watch

pytestmark = pytest.mark.gpu

QUESTIONS = [
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Explain in one sentence why the sky is blue.",
    "What is 12 + 30?",
    "Give me a word that rhymes with 'light'.",
    "Who wrote Romeo and Juliet?",
]


ENGINE = dict(
    engine_kwargs=dict(max_num_seqs=4, kv_cache_memory_bytes=1 << 30, num_gpu_blocks_override=12),
    # Chunked prefill at different places on either side, and too few blocks for four of these requests.
    teacher_kwargs={"max_num_batched_tokens": 48},
    student_kwargs={"max_num_batched_tokens": 33},
)


@pytest.fixture(scope="module")
def model_paths(smollm2):
    return smollm2, smollm2


def prompt_pairs(tokenizer) -> list[PairPrompt]:
    """The teacher reads a long instruction that the student does not."""
    pairs = []
    for question in QUESTIONS:
        privileged = [{"role": "system", "content": "You are a careful expert. " * 12}, {"role": "user", "content": question}]
        plain = [{"role": "user", "content": question}]
        pairs.append(PairPrompt(teacher_token_ids=encode(tokenizer, privileged), student_token_ids=encode(tokenizer, plain)))
    return pairs


def test_both_policies_log_probabilities_agree_with_transformers(engine, models, monkeypatch):
    pairs = prompt_pairs(engine.tokenizer)
    seen = watch(engine, monkeypatch)
    sampling = dict(max_tokens=60, temperature=1.0, seed=0, ignore_eos=True)
    names, finished, pending = {}, {}, list(pairs)
    while pending or engine._frontend.busy:
        if pending:  # one more arrives every few steps
            names |= submit(engine, [pending.pop(0)], sampling, PairOptions(record=True))
        for _ in range(4):
            finished |= step(engine)
    worst = 0.0
    for pair, (output, record) in zip(pairs, collect(engine, names, finished), strict=True):
        ids = output.token_ids
        for column, prompt in (("logp_teacher", pair.teacher_token_ids), ("logp_theta", pair.student_token_ids)):
            logp = completion_logits(models[0], prompt, ids).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
            worst = max(worst, (getattr(record, column).double() - logp).abs().max().item())
        assert record.chernoff_gap(engine.config.mixing).max() < 1e-3
    assert seen["teacher preempted"] + seen["student preempted"] > 0, "the schedule was meant to preempt"
    assert worst < 1e-3
