"""vLLM's request features, applied to q*: truncation, penalties, bias, stops, seeds, n, logprobs, aborts, interrupts."""

from __future__ import annotations

import itertools

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from osd.engine.backend import worker
from osd.engine.engine import PairPrompt
from osd.engine.request import PairOptions
from osd.engine.wire import split_rows
from tests.exact import completion_logits, mixture, penalised, q_star
from tests.pairs import collect, run, runners, step, submit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize(
        "engine",
        [pytest.param({}, id="no drafts"), pytest.param({"num_speculative_tokens": 3}, id="drafts", marks=pytest.mark.slow)],
        indirect=True,
    ),
]

# N sampled tokens, V vocabulary.


PROMPTS = [PairPrompt(teacher_token_ids=[7 + i, 9, 10, 11], student_token_ids=[30, 31 + i]) for i in range(8)]


def sample(engine, prompts=PROMPTS, **sampling):
    settings = dict(max_tokens=24, temperature=1.0, ignore_eos=True) | sampling
    return engine.generate(prompts, sampling=settings)


def both(prompt: PairPrompt) -> tuple[list[int], list[int]]:
    return prompt.teacher_token_ids, prompt.student_token_ids


def check_draws(models, completions, transform, prompts=PROMPTS, temperature=1.0):
    """Every recorded draw has the log-probability that ``transform(log q*, completion)`` [N, V] gives it."""
    for prompt, completion in zip(prompts, completions, strict=True):
        logq = q_star(models, both(prompt), completion.token_ids, temperature)
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
    """A token at the edge of the nucleus may fall on either side: the engine's q* is a float32."""

    def nucleus(p):
        def keep(logq, completion):
            ordered, index = logq.sort(dim=-1, descending=True)
            outside = ordered.exp().cumsum(-1) - ordered.exp() >= p
            return torch.empty_like(logq).scatter_(-1, index, ordered.masked_fill(outside, float("-inf")))

        return keep

    completions = sample(engine, top_p=0.8)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        logq = q_star(models, both(prompt), completion.token_ids)
        token = torch.tensor(completion.token_ids)[:, None]
        kept = [nucleus(p)(logq, completion).log_softmax(-1).gather(-1, token)[:, 0] for p in (0.7995, 0.8, 0.8005)]
        error = (completion.record.logp_draw.double() - torch.stack(kept)).abs().amin(0)
        assert error.max() < 5e-4
    with pytest.raises(AssertionError):
        check_draws(models, completions, nucleus(0.7))


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


PENALTIES = [dict(repetition=1.3), dict(presence=0.4), dict(frequency=0.7), dict(repetition=1.2, presence=0.3, frequency=0.2)]


@pytest.mark.parametrize("penalties", PENALTIES, ids=lambda p: "+".join(p))
def test_penalties_count_the_students_prompt_and_the_completion(engine, models, penalties):
    """The teacher's private prompt must not count: it may hold the answer."""
    completions = sample(engine, **{f"{name}_penalty": value for name, value in penalties.items()})
    for prompt, completion in zip(PROMPTS, completions, strict=True):

        def expected(logq, c, prompt=prompt):
            return penalised(logq, prompt.student_token_ids, c.token_ids, **penalties)

        check_draws(models, [completion], expected, [prompt])


def test_a_penalty_that_counts_the_teachers_prompt_is_seen(engine, models, monkeypatch):
    """The planted error: vLLM's own prompt mask, of the request's prompt."""
    monkeypatch.setattr(worker, "set_prompt_mask", lambda *args: None)
    completions = sample(engine, repetition_penalty=1.3)

    def expected(logq, c):
        return penalised(logq, PROMPTS[0].student_token_ids, c.token_ids, repetition=1.3)

    with pytest.raises(AssertionError):
        check_draws(models, completions[:1], expected, PROMPTS[:1])


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
            assert q_star(models, both(PROMPTS[i]), completions[i].token_ids).argmax(-1).tolist() == completions[i].token_ids
            assert completions[i].record.logp_draw.abs().max() == 0
        else:
            check_draws(models, [completions[i]], lambda logq, c: logq, [PROMPTS[i]], kind["temperature"])


def test_a_seed_fixes_a_request_in_every_batch(engine):
    """Alone, in a crowd, joined by others on the way, and beside requests that leave the kernels' fast path."""
    alone = sample(engine, PROMPTS[:1], seed=11)[0].token_ids
    settings = [dict(max_tokens=24, ignore_eos=True, seed=11 + i) for i in range(8)]
    assert engine.generate(PROMPTS, sampling=settings)[0].token_ids == alone
    assert engine.generate(PROMPTS[::-1], sampling=settings[::-1])[-1].token_ids == alone
    joined = with_one_that_joins(engine, settings[0], PairOptions(record=True), settings[1] | {"top_k": 5}, at=9)
    assert joined[0][0].token_ids == alone


def test_requests_without_a_seed_differ(engine):
    assert len({tuple(c.token_ids) for c in sample(engine, [PROMPTS[0]] * 8)}) == 8


def test_equal_seeds_give_equal_requests_equal_tokens(engine):
    assert len({tuple(c.token_ids) for c in sample(engine, [PROMPTS[0]] * 8, seed=5)}) == 1


def test_stop_strings_end_both_sides(engine):
    completions = sample(engine, stop=["w20"], max_tokens=200, ignore_eos=False)
    stopped = [c for c in completions if c.stop_reason == "w20"]
    assert stopped
    for c in stopped:
        assert c.finish_reason == "stop"
        assert "w20" not in c.text
        assert len(c.record) == len(c.token_ids)
    scheduler = engine._frontend.scheduler
    assert not scheduler.requests
    assert not scheduler.student.requests


def test_logprobs_are_of_q(engine, models):
    prompt = PROMPTS[0]
    options = PairOptions(student_prompt_token_ids=prompt.student_token_ids)
    params = SamplingParams(max_tokens=12, logprobs=3, ignore_eos=True, extra_args=options.to_extra_args())
    output = engine.llm.generate({"prompt_token_ids": prompt.teacher_token_ids}, params, use_tqdm=False)[0].outputs[0]
    logq = q_star(models, both(prompt), output.token_ids)
    for row, (token, logprobs) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        assert set(logq[row].topk(3).indices.tolist()) <= set(logprobs)
        assert logprobs[token].logprob == pytest.approx(logq[row, token].item(), abs=5e-4)


def test_a_returned_record_is_the_one_that_the_worker_keeps(engine):
    """Beside requests that want logprobs, no record, or two completions; some end early, by a stop string among others."""
    text = engine.generate([PROMPTS[0]], sampling=dict(max_tokens=12, seed=7, ignore_eos=True))[0].text
    given = [
        dict(max_tokens=20, record=True),
        dict(max_tokens=5, record=True, logprobs=2),
        dict(max_tokens=12, record=True, stop=[text.split()[4]], seed=7),
        dict(max_tokens=20, record=False, logprobs=2),
        dict(max_tokens=9, record=True, n=2, logprobs=0),
    ]
    student, prompts, params = PROMPTS[0].student_token_ids, [], []
    for index, sampling in enumerate(given):
        returned = sampling.pop("record")
        options = PairOptions(student_prompt_token_ids=student, record=True, return_record=returned)
        params.append(SamplingParams(**{"seed": index, **sampling}, ignore_eos=True, extra_args=options.to_extra_args()))
        prompts.append({"prompt_token_ids": PROMPTS[0].teacher_token_ids})
    outputs = engine.llm.generate(prompts, params, use_tqdm=False)
    completions = [completion for output in outputs for completion in output.outputs]
    kept = {tuple(record.values_TR[:, 0].tolist()): record for record in engine._take_records().values()}
    assert len(kept) == len(completions) == 6
    assert [len(c.token_ids) for c in completions] == [20, 5, len(completions[2].token_ids), 20, 9, 9]
    assert 0 < len(completions[2].token_ids) < 12
    for index, completion in enumerate(completions):
        if index == 3:
            assert completion.routed_experts is None
            continue
        rows = split_rows(completion.routed_experts)
        values = torch.from_numpy(rows.values_TR.copy())
        assert len(values) == len(completion.token_ids)
        [record] = [r for alphas, r in kept.items() if list(alphas[: len(values)]) == values[:, 0].tolist()]
        torch.testing.assert_close(values, record.values_TR[: len(values)], rtol=0, atol=0)
        assert rows.version_T.tolist() == [engine.weights_version] * len(values)
    for completion in completions[1], completions[3], *completions[4:]:
        for token, row in zip(completion.token_ids, completion.logprobs, strict=True):
            assert token in row
            assert len(row) <= 3, "a column of the record among the logprobs"


def test_n_completions_of_one_request(engine, models):
    prompt = PROMPTS[1]
    options = PairOptions(student_prompt_token_ids=prompt.student_token_ids)
    params = SamplingParams(n=4, max_tokens=16, logprobs=0, ignore_eos=True, extra_args=options.to_extra_args())
    outputs = engine.llm.generate({"prompt_token_ids": prompt.teacher_token_ids}, params, use_tqdm=False)[0].outputs
    assert len({tuple(o.token_ids) for o in outputs}) == 4
    for output in outputs:
        token = torch.tensor(output.token_ids)[:, None]
        expected = q_star(models, both(prompt), output.token_ids).gather(-1, token)[:, 0]
        given = torch.tensor([row[t].logprob for t, row in zip(output.token_ids, output.logprobs, strict=True)])
        torch.testing.assert_close(given.double(), expected, atol=5e-4, rtol=1e-3)


def test_aborting_one_request_leaves_the_others_as_they_were(engine):
    undisturbed = [c.token_ids for c in sample(engine, temperature=0.0)]
    names = submit(engine, PROMPTS, dict(max_tokens=24, temperature=0.0, ignore_eos=True), PairOptions(record=True))
    aborted, finished = list(names)[2], {}
    for _ in range(5):
        finished |= step(engine)
    engine._frontend.abort([names.pop(aborted)])
    while engine._frontend.busy:
        finished |= step(engine)
    kept = [output.token_ids for output, _ in collect(engine, names, finished)]
    assert kept == [ids for i, ids in enumerate(undisturbed) if i != 2]


PENALISED = dict(max_tokens=40, ignore_eos=True, presence_penalty=0.5)


def with_one_that_joins(engine, sampling, option, joins, at=15):
    """Sample two requests, the second with ``joins`` and admitted after ``at`` steps; return completions and records."""
    finished = {}
    names = submit(engine, PROMPTS[:1], sampling, option)
    for _ in range(at):
        finished |= step(engine)
    names |= submit(engine, PROMPTS[1:2], joins, option)
    while engine._frontend.busy:
        finished |= step(engine)
    return collect(engine, names, finished)


def test_mixed_tokens_are_counted_when_a_penalised_request_joins(engine):
    option = PairOptions(mix_tokens=20, record=True)
    for _, record in with_one_that_joins(engine, dict(max_tokens=40, ignore_eos=True), option, PENALISED):
        assert ((record.alpha > 0).nonzero()[:, 0] == torch.arange(20)).all()


@pytest.mark.parametrize("joins", [PENALISED, dict(max_tokens=40, ignore_eos=True, bad_words=["w9 w10"])])
def test_min_tokens_are_counted_when_a_request_joins_that_reads_its_own_tokens(engine, joins):
    sampling = dict(max_tokens=60, min_tokens=20, logit_bias={2: 100.0})  # ends as soon as it may
    (first, record), _ = with_one_that_joins(engine, sampling, PairOptions(record=True), joins)
    assert len(first.token_ids) == len(record) == 21


def test_an_interrupted_run_leaves_nothing_behind(engine, monkeypatch):
    calls = iter(range(100))
    core = engine._frontend.engine
    stock = core.step

    def interrupted():
        if next(calls) == 4:
            raise KeyboardInterrupt
        return stock()

    with monkeypatch.context() as patch:
        patch.setattr(core, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(engine)
    assert not engine._frontend.busy
    assert engine._frontend.worker.records.take() == {}
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
    results = run(engine, submit(engine, PROMPTS, sampling, options))
    for prompt, option, (completion, record) in zip(PROMPTS, options, results, strict=True):
        token = torch.tensor(completion.token_ids)[:, None]
        lt = completion_logits(models[0], prompt.teacher_token_ids, completion.token_ids).log_softmax(-1)
        expected = lt if option.teacher_only else q_star(models, both(prompt), completion.token_ids)
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
    assert not engine._frontend.busy


def test_an_unknown_option_ends_only_its_own_request(engine):
    params = SamplingParams(max_tokens=4, extra_args={"osd": {"alhpa": 0.5}})
    outputs = engine.llm.generate([{"prompt_token_ids": [7, 8]}] * 2, [params, SamplingParams(max_tokens=4, ignore_eos=True)])
    assert outputs[0].outputs[0].finish_reason == "error"
    assert "alhpa" in outputs[0].outputs[0].stop_reason
    assert len(outputs[1].outputs[0].token_ids) == 4


PLACES = {
    "scheduler": ["schedule", "_pair_up", "update_from_output", "_update_student"],
    "student scheduler": ["schedule"],
    "weights": ["check"],
    "worker": [
        *("execute_model", "_student_forward", "_admit", "sample_tokens"),
        *("_align", "_constraint", "_record", "_finish_step"),
    ],
    "teacher runner": ["execute_model", "sample_tokens", "sample", "postprocess_sampled"],
    "student runner": ["execute_model", "postprocess_sampled"],
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("of", "where"), [(of, where) for of, places in PLACES.items() for where in places])
def test_an_interrupt_at_any_place_of_a_step_leaves_nothing_behind(engine, monkeypatch, greedy, of, where, after):
    front = engine._frontend
    owner = {
        "scheduler": front.scheduler,
        "student scheduler": front.scheduler.student,
        "weights": front.worker.student_weights,
        "worker": front.worker,
        "teacher runner": front.worker.model_runner,
        "student runner": front.worker.student_runner,
    }[of]
    calls, stock = itertools.count(), getattr(owner, where)

    def interrupted(*args, **kwargs):
        now = next(calls) == 4
        if now and not after:
            raise KeyboardInterrupt
        result = stock(*args, **kwargs)
        if now:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(engine)
    assert [c.token_ids for c in sample(engine, temperature=0.0)] == greedy
    check_forgotten(engine)


@pytest.fixture(scope="module")
def greedy(engine) -> list[list[int]]:
    return [c.token_ids for c in sample(engine, temperature=0.0)]


def check_forgotten(engine) -> None:
    """Check that both runners have been told which requests ended."""
    sample(engine, PROMPTS[:1], max_tokens=1)
    for runner in runners(engine).values():
        assert len(runner.req_states.req_id_to_index) <= 1
    assert len(engine._frontend.worker.requests) <= 1
    assert engine._frontend.worker.records.take() == {}
    for side in (engine._frontend.scheduler, engine._frontend.scheduler.student):
        assert not side.requests
        assert side.kv_cache_manager.usage == 0


def test_requests_whose_end_was_lost_in_a_failed_step_are_forgotten(engine, monkeypatch):
    """A step that fails before a runner has read which requests ended is not sent again."""

    def interrupted(*args):
        raise KeyboardInterrupt

    sample(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine._frontend.worker.student_weights, "check", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(engine, PROMPTS[:1])
    check_forgotten(engine)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_forward_pass_that_fails_leaves_no_uncomputed_block_in_a_cache(engine, monkeypatch, side):
    """vLLM caches blocks when it schedules them: after a failed step they must not be hit, and the engine must go on."""
    prompts = [
        PairPrompt(teacher_token_ids=[7 + i % 40 for i in range(100)], student_token_ids=[50 - i % 40 for i in range(100)])
    ]
    expected = sample(engine, prompts, temperature=0.0)[0].token_ids
    engine.reset_prefix_cache()

    def out_of_memory(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(runners(engine)[side].get_model()), "forward", out_of_memory)
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
    assert not engine._frontend.busy


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
