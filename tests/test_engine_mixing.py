"""How q* is made can differ by request, by position and over time: α per request, the first tokens only, new bounds."""

from __future__ import annotations

import pytest
import torch

from osd.core import MixingConfig
from osd.engine.engine import PairPrompt
from osd.engine.request import PairOptions
from tests.exact import completion_logits
from tests.pairs import run, submit

pytestmark = pytest.mark.gpu

PROMPTS = [PairPrompt(teacher_token_ids=[7 + i, 9, 10, 11] * (1 + i), student_token_ids=[30, 31 + i]) for i in range(4)]
SAMPLING = {"max_tokens": 12, "ignore_eos": True, "temperature": 1.0}


# Few tokens per step, so that the longer prompts are prefilled in pieces and requests reach a position at other steps.
ENGINE = {"engine_kwargs": dict(max_num_batched_tokens=16, enable_chunked_prefill=True, max_num_seqs=16)}


@pytest.mark.parametrize("limit", [0, 1, 5, 12, 40])
def test_the_first_tokens_are_mixed_and_the_others_are_the_students(engine, limit):
    for completion in engine.generate(PROMPTS, sampling=SAMPLING, mix_tokens=limit):
        record = completion.record
        assert (record.alpha[:limit] > 0).all()
        assert (record.alpha[limit:] == 0).all()
        torch.testing.assert_close(record.logq[limit:], record.logp_theta[limit:])
        assert (record.kl_theta[limit:] == 0).all()


def test_mixed_tokens_are_counted_by_each_request_for_itself(engine):
    """Requests that start and end at different steps, and their own limits, in one batch."""
    lengths, limits = (12, 3, 7, 9), (4, 1, None, 6)
    options = [PairOptions(mix_tokens=limit, record=True) for limit in limits]
    results = run(engine, submit(engine, PROMPTS, [{**SAMPLING, "max_tokens": n} for n in lengths], options))
    for (_, record), length, limit in zip(results, lengths, limits, strict=True):
        alpha = record.alpha
        assert len(alpha) == length
        assert (alpha > 0).sum() == min(limit or length, length)
        assert (alpha[: limit or length] > 0).all()


def test_every_prompt_has_its_own_alpha(engine):
    given = [0.0, 1.0, None, 0.25]
    records = [c.record for c in engine.generate(PROMPTS, sampling=SAMPLING, alpha=given)]
    for record, alpha in zip(records, given, strict=True):
        assert alpha is None or (record.alpha == alpha).all()
    torch.testing.assert_close(records[0].logq, records[0].logp_theta)
    torch.testing.assert_close(records[1].logq, records[1].logp_teacher)
    assert records[2].alpha.unique().numel() > 1


def test_a_new_mixing_holds_from_the_next_call_on(engine):
    before = engine.mixing
    try:
        engine.set_mixing(MixingConfig(alpha_min=0.1, alpha_max=0.2))
        alpha = torch.cat([c.record.alpha for c in engine.generate(PROMPTS, sampling=SAMPLING)])
        assert 0.1 <= alpha.min() <= alpha.max() <= 0.2
        engine.set_mixing(MixingConfig(alpha_method="fixed", fixed_alpha=0.75))
        alpha = torch.cat([c.record.alpha for c in engine.generate(PROMPTS, sampling=SAMPLING)])
        assert (alpha == 0.75).all()
    finally:
        engine.set_mixing(before)
    alpha = torch.cat([c.record.alpha for c in engine.generate(PROMPTS, sampling=SAMPLING)])
    assert alpha.max() > 0.2
    assert engine.mixing == engine.config.mixing


def test_bad_values_are_refused(engine):
    with pytest.raises(ValueError, match="mix_tokens=-1 is negative"):
        engine.generate(PROMPTS, sampling=SAMPLING, mix_tokens=-1)
    with pytest.raises(ValueError, match="alpha has 3 entries for 4 prompts"):
        engine.generate(PROMPTS, sampling=SAMPLING, alpha=[0.0, 0.5, None])
    with pytest.raises(ValueError, match=r"alpha=1.5 is outside \[0, 1\]"):
        engine.generate(PROMPTS, sampling=SAMPLING, alpha=[0.0, 0.5, None, 1.5])


def test_a_forced_token_is_scored_by_the_teacher_alone(engine, models):
    """A request with one allowed token records its log-probability over the whole vocabulary: how a given text is scored."""
    prompts = [PairPrompt(teacher_token_ids=[7, 8, 9 + i], student_token_ids=[7]) for i in range(4)]
    sampling = [{"max_tokens": 1, "temperature": 0.8, "allowed_token_ids": [20 + i]} for i in range(4)]
    completions = engine.generate(prompts, sampling=sampling, teacher_only=True)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        assert completion.token_ids == [20 + i]
        logp = (completion_logits(models[0], prompt.teacher_token_ids, [20 + i]) / 0.8).log_softmax(-1)
        assert completion.record.logp_teacher.item() == pytest.approx(logp[0, 20 + i].item(), abs=1e-4)
