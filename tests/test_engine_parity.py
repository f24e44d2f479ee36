"""The record of a real model agrees with transformers, each side on its own prompt, whatever the schedule was.

Float32, SmolLM2-135M-Instruct on both sides. Bound 1e-3 on every log-probability.
"""

from __future__ import annotations

import pytest
import torch

from osd.engine.engine import PairConfig, PairEngine, PairPrompt
from osd.engine.request import PairOptions
from osd.prompts import encode
from tests.exact import completion_logits, reference

pytestmark = pytest.mark.gpu

QUESTIONS = [
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Explain in one sentence why the sky is blue.",
    "What is 12 + 30?",
    "Give me a word that rhymes with 'light'.",
    "Who wrote Romeo and Juliet?",
]


@pytest.fixture(scope="module")
def engine(smollm2):
    config = PairConfig(
        teacher=str(smollm2),
        student=str(smollm2),
        engine_kwargs=dict(
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            block_size=32,
            max_num_seqs=4,
            kv_cache_memory_bytes=1 << 30,
            gpu_memory_utilization=0.2,
            num_gpu_blocks_override=12,
        ),
        # Chunked prefill at different places on either side, and too few blocks for four of these requests.
        teacher_kwargs={"max_num_batched_tokens": 48},
        student_kwargs={"max_num_batched_tokens": 33},
    )
    with PairEngine(config) as engine:
        yield engine


def prompt_pairs(tokenizer) -> list[PairPrompt]:
    """The teacher reads a long instruction that the student does not."""
    pairs = []
    for question in QUESTIONS:
        privileged = [{"role": "system", "content": "You are a careful expert. " * 12}, {"role": "user", "content": question}]
        plain = [{"role": "user", "content": question}]
        pairs.append(PairPrompt(teacher_token_ids=encode(tokenizer, privileged), student_token_ids=encode(tokenizer, plain)))
    return pairs


def test_both_policies_log_probabilities_agree_with_transformers(engine, smollm2):
    pairs = prompt_pairs(engine.tokenizer)
    scheduler = engine._engine.engine_core.engine_core.scheduler
    params = engine._sampling_params(
        pairs, dict(max_tokens=60, temperature=1.0, seed=0, ignore_eos=True), PairOptions(record=True)
    )
    names, outputs, preempted = {}, {}, 0
    pending = list(zip(pairs, params, strict=True))
    while pending or engine._engine.has_unfinished_requests():
        if pending:  # one more arrives every few steps
            pair, param = pending.pop(0)
            names |= engine._submit([pair], [param])
        for _ in range(4):
            outputs |= {o.request_id: o.outputs[0] for o in engine._engine.step() if o.finished}
            preempted = max([preempted, *(r.num_preemptions for r in scheduler.requests.values())])
    records = engine._take_records()
    model = reference(smollm2)
    worst = 0.0
    for pair, (name, internal) in zip(pairs, names.items(), strict=True):
        ids = outputs[name].token_ids
        record = records[internal].of_tokens(len(ids))
        for column, prompt in (("logp_teacher", pair.teacher_token_ids), ("logp_theta", pair.student_token_ids)):
            logp = completion_logits(model, prompt, ids).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
            worst = max(worst, (getattr(record, column).double() - logp).abs().max().item())
        assert record.chernoff_gap(engine.config.mixing).max() < 1e-3
    assert preempted > 0, "the schedule was meant to preempt"
    assert worst < 1e-3
