"""What vLLM can do with a request, it can do with q*: truncation, penalties, bias, stops, seeds, n, logprobs, aborts."""

from __future__ import annotations

import itertools

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from osd.engine.engine import PairConfig, PairEngine, PairPrompt
from osd.engine.request import PairOptions
from tests.exact import completion_logits, mixture, reference, solve
from tests.tiny import tiny_engine_kwargs

pytestmark = pytest.mark.gpu

# N sampled tokens, V vocabulary.


@pytest.fixture(scope="module")
def engine(tiny_pair):
    teacher, student = map(str, tiny_pair)
    with PairEngine(PairConfig(teacher=teacher, student=student, engine_kwargs=tiny_engine_kwargs())) as engine:
        yield engine


@pytest.fixture(scope="module")
def models(tiny_pair):
    return tuple(map(reference, tiny_pair))


PROMPTS = [PairPrompt(teacher_token_ids=[7 + i, 9, 10, 11], student_token_ids=[30, 31 + i]) for i in range(8)]


def sample(engine, prompts=PROMPTS, **sampling):
    settings = dict(max_tokens=24, temperature=1.0, ignore_eos=True) | sampling
    return engine.generate(prompts, sampling=settings)


def q_star(models, prompt, completion, temperature=1.0, solve_at=None) -> torch.Tensor:
    """log q* [N, V] of one completion; α solved at another temperature if ``solve_at`` says so."""
    logits = [
        completion_logits(model, ids, completion.token_ids)
        for model, ids in zip(models, (prompt.teacher_token_ids, prompt.student_token_ids), strict=True)
    ]
    lt, ls = ((x / temperature).log_softmax(-1) for x in logits)
    return mixture(ls, lt, solve("kl_symmetry", ls, lt))


def check_draws(models, completions, transform, prompts=PROMPTS, temperature=1.0):
    """Every recorded draw has the log-probability that ``transform(log q*, completion)`` [N, V] gives it."""
    for prompt, completion in zip(prompts, completions, strict=True):
        logq = q_star(models, prompt, completion, temperature)
        expected = transform(logq, completion).log_softmax(-1)
        token = torch.tensor(completion.token_ids)[:, None]
        error = (completion.record.logp_draw.double() - expected.gather(-1, token)[:, 0]).abs()
        assert error.max() < 5e-4
        recorded = completion.record.logq.double()
        torch.testing.assert_close(recorded, logq.gather(-1, token)[:, 0], atol=5e-4, rtol=1e-3)


def test_temperature_tempers_both_policies_before_they_are_mixed(engine, models):
    check_draws(models, sample(engine, temperature=0.7), lambda logq, c: logq, temperature=0.7)


def test_top_k_keeps_the_k_most_likely_of_q(engine, models):
    def top_3(logq, completion):
        return logq.masked_fill(logq < logq.topk(3, dim=-1).values[:, -1:], float("-inf"))

    check_draws(models, sample(engine, top_k=3), top_3)


def test_top_p_keeps_the_nucleus_of_q(engine, models):
    def nucleus(logq, completion):
        ordered, index = logq.sort(dim=-1, descending=True)
        outside = ordered.exp().cumsum(-1) - ordered.exp() >= 0.8
        return torch.empty_like(logq).scatter_(-1, index, ordered.masked_fill(outside, float("-inf")))

    check_draws(models, sample(engine, top_p=0.8), nucleus)


def test_min_p_is_relative_to_the_peak_of_q(engine, models):
    def above(logq, completion):
        return logq.masked_fill(logq.exp() < 0.2 * logq.exp().amax(-1, keepdim=True), float("-inf"))

    check_draws(models, sample(engine, min_p=0.2), above)


def test_logit_bias_acts_on_q(engine, models):
    bias = {20: 3.0, 21: -5.0}

    def biased(logq, completion):
        logq = logq.clone()
        for token, value in bias.items():
            logq[:, token] += value
        return logq

    check_draws(models, sample(engine, logit_bias=bias), biased)


def test_penalties_act_on_q(engine, models):
    def penalised(logq, completion):
        logq, counts = logq.clone(), torch.zeros(logq.shape[-1], dtype=torch.float64)
        for row, token in enumerate(completion.token_ids):
            logq[row] -= 0.7 * counts + 0.4 * (counts > 0)
            counts[token] += 1
        return logq

    check_draws(models, sample(engine, frequency_penalty=0.7, presence_penalty=0.4), penalised)


def test_allowed_tokens_restrict_q(engine, models):
    allowed = [10, 20, 30]

    def only(logq, completion):
        return torch.full_like(logq, float("-inf")).index_copy_(-1, torch.tensor(allowed), logq[:, allowed])

    check_draws(models, sample(engine, allowed_token_ids=allowed), only)


def test_one_batch_serves_many_kinds_of_requests(engine, models):
    kinds = [dict(temperature=1.0), dict(temperature=0.5), dict(temperature=0.0), dict(temperature=1.0, seed=3)] * 2
    sampling = [dict(max_tokens=24, ignore_eos=True, **kind) for kind in kinds]
    completions = engine.generate(PROMPTS, sampling=sampling)
    for i, kind in enumerate(kinds):
        if kind["temperature"] == 0.0:
            assert q_star(models, PROMPTS[i], completions[i]).argmax(-1).tolist() == completions[i].token_ids
            assert completions[i].record.logp_draw.abs().max() == 0
        else:
            check_draws(models, [completions[i]], lambda logq, c: logq, [PROMPTS[i]], kind["temperature"])


def test_a_seed_fixes_a_request_whatever_it_is_batched_with(engine):
    alone = sample(engine, PROMPTS[:1], seed=11)[0].token_ids
    crowd = engine.generate(PROMPTS, sampling=[dict(max_tokens=24, ignore_eos=True, seed=11 + i) for i in range(8)])
    assert crowd[0].token_ids == alone
    assert len({tuple(c.token_ids) for c in sample(engine, [PROMPTS[0]] * 8)}) > 1


def test_stop_strings_end_both_sides(engine):
    completions = sample(engine, stop=["w20"], max_tokens=200, ignore_eos=False)
    stopped = [c for c in completions if c.stop_reason == "w20"]
    assert stopped
    for c in stopped:
        assert c.finish_reason == "stop"
        assert "w20" not in c.text
        assert len(c.record) == len(c.token_ids)
    scheduler = engine._engine.engine_core.engine_core.scheduler
    assert not scheduler.requests
    assert not scheduler.student.requests


def test_logprobs_are_of_q(engine, models):
    prompt = PROMPTS[0]
    options = PairOptions(student_prompt_token_ids=prompt.student_token_ids)
    params = SamplingParams(max_tokens=12, logprobs=3, ignore_eos=True, extra_args=options.to_extra_args())
    output = engine.llm.generate({"prompt_token_ids": prompt.teacher_token_ids}, params, use_tqdm=False)[0].outputs[0]
    logq = q_star(models, prompt, output)
    for row, (token, logprobs) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        assert set(logq[row].topk(3).indices.tolist()) <= set(logprobs)
        assert logprobs[token].logprob == pytest.approx(logq[row, token].item(), abs=5e-4)


def test_n_completions_of_one_request(engine, models):
    prompt = PROMPTS[1]
    options = PairOptions(student_prompt_token_ids=prompt.student_token_ids)
    params = SamplingParams(n=4, max_tokens=16, logprobs=0, ignore_eos=True, extra_args=options.to_extra_args())
    outputs = engine.llm.generate({"prompt_token_ids": prompt.teacher_token_ids}, params, use_tqdm=False)[0].outputs
    assert len({tuple(o.token_ids) for o in outputs}) == 4
    for output in outputs:
        token = torch.tensor(output.token_ids)[:, None]
        expected = q_star(models, prompt, output).gather(-1, token)[:, 0]
        given = torch.tensor([row[t].logprob for t, row in zip(output.token_ids, output.logprobs, strict=True)])
        torch.testing.assert_close(given.double(), expected, atol=5e-4, rtol=1e-3)


def test_aborting_one_request_leaves_the_others_as_they_were(engine):
    undisturbed = [c.token_ids for c in sample(engine, temperature=0.0)]
    params = engine._sampling_params(PROMPTS, dict(max_tokens=24, temperature=0.0, ignore_eos=True), PairOptions(record=True))
    names = engine._submit(PROMPTS, params)
    outputs = {}
    for step in range(100):
        if step == 5:
            engine._engine.abort_request([list(names.values())[2]], internal=True)
        outputs |= {o.request_id: list(o.outputs[0].token_ids) for o in engine._engine.step() if o.finished}
        if not engine._engine.has_unfinished_requests():
            break
    engine._take_records()
    kept = [i for i in range(8) if i != 2]
    assert [outputs[list(names)[i]] for i in kept] == [undisturbed[i] for i in kept]


PENALISED = dict(max_tokens=40, ignore_eos=True, presence_penalty=0.5)


def with_one_that_joins(engine, sampling, option, joins, at=15):
    """Records of two requests, the second (with ``joins`` as its sampling) admitted when the first has ``at`` tokens."""
    ids, steps = {}, itertools.count()
    for prompt, settings in ((PROMPTS[0], sampling), (PROMPTS[1], joins)):
        engine._submit([prompt], engine._sampling_params([prompt], settings, option), ids)
        while engine._engine.has_unfinished_requests() and (len(ids) > 1 or next(steps) < at):
            engine._engine.step()
    return list(engine._take_records().values())


def test_tokens_to_mix_are_counted_on_when_a_penalised_request_joins(engine):
    """vLLM looks up the ids of the tokens sampled so far only from then on."""
    option = PairOptions(mix_tokens=20, record=True)
    first, second = with_one_that_joins(engine, dict(max_tokens=40, ignore_eos=True), option, PENALISED)
    for record in (first, second):
        assert ((record.values_TR[:, 0] > 0).nonzero()[:, 0] == torch.arange(20)).all()


@pytest.mark.parametrize("joins", [PENALISED, dict(max_tokens=40, ignore_eos=True, bad_words=["w9 w10"])])
def test_min_tokens_are_counted_on_when_a_request_joins_that_reads_its_own_tokens(engine, joins):
    sampling = dict(max_tokens=60, min_tokens=20, logit_bias={2: 100.0})  # its end as soon as it may
    first, _ = with_one_that_joins(engine, sampling, PairOptions(record=True), joins)
    assert len(first.values_TR) in (21, 22)  # a step later is in flight when it ends


def test_an_interrupted_run_leaves_nothing_behind(engine, monkeypatch):
    calls = iter(range(100))
    step = engine._engine.step

    def interrupted():
        if next(calls) == 4:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(engine._engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(engine)
    assert not engine._engine.has_unfinished_requests()
    assert engine._worker().records.take() == {}
    assert [len(c.token_ids) for c in sample(engine)] == [24] * 8


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_a_request_can_fix_alpha(engine, models, alpha):
    completions = engine.generate(PROMPTS, sampling=dict(max_tokens=16, ignore_eos=True), alpha=alpha)
    for prompt, c in zip(PROMPTS, completions, strict=True):
        lt, ls = (
            completion_logits(m, ids, c.token_ids).log_softmax(-1)
            for m, ids in zip(models, (prompt.teacher_token_ids, prompt.student_token_ids), strict=True)
        )
        expected = mixture(ls, lt, torch.tensor(alpha)).gather(-1, torch.tensor(c.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(c.record.logq.double(), expected, atol=5e-4, rtol=1e-3)
        assert (c.record.alpha == alpha).all()


def test_teacher_only_requests_run_beside_paired_ones(engine, models):
    options = [PairOptions(teacher_only=i % 2 == 0, record=True) for i in range(8)]
    sampling = dict(max_tokens=12, ignore_eos=True)
    params = [engine._sampling_params([p], sampling, o)[0] for p, o in zip(PROMPTS, options, strict=True)]
    names = engine._submit(PROMPTS, params)
    outputs, records = engine._run(8, progress=False), engine._take_records()
    for prompt, option, (name, internal) in zip(PROMPTS, options, names.items(), strict=True):
        completion = outputs[name].outputs[0]
        record = records[internal].of_tokens(len(completion.token_ids))
        token = torch.tensor(completion.token_ids)[:, None]
        lt = completion_logits(models[0], prompt.teacher_token_ids, completion.token_ids).log_softmax(-1)
        expected = lt if option.teacher_only else q_star(models, prompt, completion)
        torch.testing.assert_close(record.logq.double(), expected.gather(-1, token)[:, 0], atol=5e-4, rtol=1e-3)
        assert record.logp_theta.isnan().all() == option.teacher_only


def test_structured_output_masks_q_and_not_the_teacher(engine, models):
    prompt = PROMPTS[0]
    options = PairOptions(student_prompt_token_ids=prompt.student_token_ids, alpha=0.0)
    structured = StructuredOutputsParams(choice=["w20", "w21"])
    params = SamplingParams(max_tokens=2, structured_outputs=structured, extra_args=options.to_extra_args())
    outputs = engine.llm.generate([{"prompt_token_ids": prompt.teacher_token_ids}] * 4, params, use_tqdm=False)
    assert {o.outputs[0].token_ids[0] for o in outputs} <= {20, 21}


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        (PairPrompt(teacher_token_ids=[], student_token_ids=[7]), {}, "prompt 0: the teacher's prompt is empty"),
        (PairPrompt(teacher_token_ids=[7], student_token_ids=[]), {}, "prompt 0: the student's prompt is empty"),
        (PairPrompt(teacher_token_ids=[7] * 250, student_token_ids=[7]), {}, "the teacher's prompt has 250 tokens"),
        (PairPrompt(teacher_token_ids=[7], student_token_ids=[7] * 250), {}, "the student's prompt has 250 tokens"),
        (PROMPTS[0], dict(n=2), "n=2"),
        (PROMPTS[0], dict(max_tokens=None), "max_tokens is None"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_sampled(engine, prompt, sampling, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([prompt], sampling=dict(max_tokens=10) | sampling)
    assert not engine._engine.has_unfinished_requests()


def test_an_unknown_option_ends_only_its_own_request(engine):
    params = SamplingParams(max_tokens=4, extra_args={"osd": {"alhpa": 0.5}})
    outputs = engine.llm.generate([{"prompt_token_ids": [7, 8]}] * 2, [params, SamplingParams(max_tokens=4, ignore_eos=True)])
    assert outputs[0].outputs[0].finish_reason == "error"
    assert "alhpa" in outputs[0].outputs[0].stop_reason
    assert len(outputs[1].outputs[0].token_ids) == 4


@pytest.mark.parametrize("where", ["_set_up_sampler", "_constrain", "_record"])
def test_an_interrupt_between_a_forward_pass_and_its_end_leaves_nothing_behind(engine, monkeypatch, where):
    expected = [c.token_ids for c in sample(engine, temperature=0.0)]
    worker, calls = engine._worker(), itertools.count()
    stock = getattr(worker, where)

    def interrupted(*args):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return stock(*args)

    with monkeypatch.context() as patch:
        patch.setattr(worker, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(engine)
    assert [c.token_ids for c in sample(engine, temperature=0.0)] == expected
    sample(engine, PROMPTS[:1], max_tokens=1)  # by now both runners have been told who left
    for runner in (worker.model_runner, worker.student_runner):
        assert len(runner.requests) <= 1


def test_requests_whose_end_a_failed_step_swallowed_are_forgotten(engine, monkeypatch):
    """A step that fails before a runner has read who ended is not sent again."""
    worker = engine._worker()

    def interrupted(*args):
        raise KeyboardInterrupt

    sample(engine)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_check_weights", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(engine, PROMPTS[:1])
    sample(engine, PROMPTS[:1], max_tokens=1)
    for runner in (worker.model_runner, worker.student_runner):
        assert len(runner.requests) <= 1


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_forward_pass_that_fails_leaves_no_uncomputed_block_in_a_cache(engine, monkeypatch, side):
    """vLLM caches blocks when it schedules them: after a failed step they must not be hit, and the engine must go on."""
    prompts = [
        PairPrompt(teacher_token_ids=[7 + i % 40 for i in range(100)], student_token_ids=[50 - i % 40 for i in range(100)])
    ]
    expected = sample(engine, prompts, temperature=0.0)[0].token_ids
    engine.reset_prefix_cache()
    worker = engine._worker()
    runner = worker.model_runner if side == "teacher" else worker.student_runner

    def out_of_memory(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_model_forward", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            sample(engine, prompts, temperature=0.0)
    again = sample(engine, prompts, temperature=0.0)[0]
    assert again.token_ids == expected
    assert (again.teacher_cached_tokens, again.student_cached_tokens) == (0, 0)


def test_a_token_id_outside_the_vocabulary_is_refused(engine):
    for pair in (
        PairPrompt(teacher_token_ids=[9999], student_token_ids=[7]),
        PairPrompt(teacher_token_ids=[7], student_token_ids=[9999]),
    ):
        with pytest.raises(ValueError, match="token id 9999 is not one of"):
            sample(engine, [PROMPTS[0], pair])
    assert not engine._engine.has_unfinished_requests()


def test_a_sync_resets_the_students_cache_for_every_front_end(engine, models):
    """Also for requests of plain vLLM, which carry no weights version."""
    prompt = {"prompt_token_ids": [7 + i % 40 for i in range(100)]}
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=0, ignore_eos=True)
    first = engine.llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    teacher, student = models
    engine.load_student_weights(teacher.state_dict().items())
    synced = engine.llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    logp = completion_logits(teacher, prompt["prompt_token_ids"], synced.token_ids).log_softmax(-1)
    expected = logp.gather(-1, torch.tensor(synced.token_ids)[:, None])[:, 0]  # student = teacher, so q* is both
    given = torch.tensor([row[t].logprob for t, row in zip(synced.token_ids, synced.logprobs, strict=True)])
    assert (given.double() - expected).abs().max() < 5e-4
    engine.load_student_weights(student.state_dict().items())
    assert engine.llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids == first.token_ids


def test_a_closed_engine_says_so(tiny_pair):
    engine = PairEngine.__new__(PairEngine)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate([], sampling={})
