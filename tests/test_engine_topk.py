"""The teacher's largest log-probabilities as the engine records them, and training on them, with and without drafts.

Every row is compared with transformers in float64, on the teacher's own prompt. Bound 5e-4 nats; a planted error is off by 0.1
and more.
"""

from __future__ import annotations

import pytest
import torch

from osd.engine.backend import sampler as sampler_module
from osd.engine.backend.sampler import PairSampler
from osd.engine.request import PairOptions
from osd.engine.topk import ids_and_logprobs
from tests.exact import completion_logits
from tests.pairs import cramped, hard_prompts, preempted, run, run_with_random_arrivals, start, step, submit, watch
from tests.tiny import tiny_model
from tests.training import build_trainer, logged

pytestmark = pytest.mark.gpu

V, K = 64, 6  # the teacher has six more ids, which belong to no token
TEMPERATURE = 0.6
CLOSE, SEEN = 5e-4, 0.1
CRAMPED = cramped(48, 33)


@pytest.fixture(scope="module", params=[0, 3], ids=["without drafts", "with drafts"])
def drafts(request):
    return request.param


@pytest.fixture(scope="module")
def model_paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("topk")
    return tiny_model(root / "teacher", vocab=V + 6, tokenizer_vocab=V, seed=1), tiny_model(root / "student", vocab=V, seed=2)


@pytest.fixture(scope="module")
def engine(model_paths, drafts):
    with start(model_paths, CRAMPED | {"num_speculative_tokens": drafts}) as engine:
        yield engine


def worst_error(teacher, prompt, tokens, record, temperature=TEMPERATURE):
    """Largest distance of a record's rows, and of log π_t beside them, from the teacher's, in nats."""
    logp_TV = (completion_logits(teacher, prompt.teacher_token_ids, tokens)[:, :V] / temperature).log_softmax(-1)
    id_Tk, logp_TO = ids_and_logprobs(record.teacher_topk_TX)
    k = id_Tk.shape[1]
    rest_T1 = logp_TV.scatter(-1, id_Tk, -torch.inf).logsumexp(-1, keepdim=True)
    expected_TO = torch.cat([logp_TV.gather(-1, id_Tk), rest_T1], -1)
    drawn_T1 = logp_TV.gather(-1, torch.tensor(tokens)[:, None])
    found = [logp_TO[:, :k] - logp_TV.topk(k).values, logp_TO - expected_TO, record.logp_teacher[:, None] - drawn_T1]
    return max(x.abs().max().item() for x in found)


def test_rows_are_the_teachers_in_every_schedule(engine, models, monkeypatch):
    """Prompts of each side its own, prefills in chunks, preemption, rows in any order."""
    seen = watch(engine, monkeypatch)
    results = run_with_random_arrivals(engine, 3, topk=K, temperature=TEMPERATURE, ignore_eos=True)
    assert preempted(seen)
    prompts = hard_prompts()
    assert sum(len(record) for _, record in results.values()) == 24 * 40
    for i, (output, record) in results.items():
        assert record.teacher_topk_TX.shape == (40, 2 * K + 1)
        assert worst_error(models[0], prompts[i], output.token_ids, record) < CLOSE
    rows = torch.cat([record.teacher_topk_TX for _, record in results.values()])
    drawn = torch.tensor([token for output, _ in results.values() for token in output.token_ids])
    beside = torch.cat([record.logp_teacher for _, record in results.values()])
    id_Nk, logp_NO = ids_and_logprobs(rows)
    twice = id_Nk == drawn[:, None]
    assert twice.sum() > 400
    torch.testing.assert_close(logp_NO[:, :K][twice], beside[:, None].expand(-1, K)[twice], atol=2e-5, rtol=1e-5)


def test_what_acts_on_q_star_does_not_act_on_the_rows(engine, models):
    """Greedy rows are of temperature 1, as is log π_t beside them."""
    kinds = [
        (dict(), dict()),
        (dict(top_k=3, logit_bias={20: 5.0, 30: -100.0}, repetition_penalty=1.5), dict()),
        (dict(min_p=0.2, top_p=0.9), dict()),
        (dict(temperature=0.0), dict()),
        (dict(), dict(teacher_only=True)),
        (dict(), dict(alpha=0.0)),
        (dict(), dict(mix_tokens=5)),
    ]
    sampling = [dict(max_tokens=20, temperature=TEMPERATURE, ignore_eos=True) | given for given, _ in kinds]
    options = [PairOptions(**(dict(record=True, topk=K) | given)) for _, given in kinds]
    prompts = hard_prompts()[: len(kinds)]
    results = run(engine, submit(engine, prompts, sampling, options))
    for prompt, settings, (output, record) in zip(prompts, sampling, results, strict=True):
        temperature = settings["temperature"] or 1.0
        assert worst_error(models[0], prompt, output.token_ids, record, temperature) < CLOSE


def rows_of_another_temperature(monkeypatch):
    top_k = sampler_module.top_k
    monkeypatch.setattr(sampler_module, "top_k", lambda logits, temperature, k: top_k(logits, torch.ones_like(temperature), k))


def rows_of_another_position(monkeypatch):
    rows = PairSampler._topk
    monkeypatch.setattr(PairSampler, "_topk", lambda self, inputs: rows(self, inputs).roll(1, 0))


def rows_of_padded_ids_too(monkeypatch):
    rows = PairSampler._topk

    def planted(self, inputs):
        vocab_size, self.vocab_size = self.vocab_size, V + 6
        found, self.vocab_size = rows(self, inputs), vocab_size
        return found.clamp(max=V - 1)

    monkeypatch.setattr(PairSampler, "_topk", planted)


@pytest.mark.parametrize("error", [rows_of_another_temperature, rows_of_another_position, rows_of_padded_ids_too])
def test_planted_errors_are_seen(engine, models, monkeypatch, error):
    error(monkeypatch)
    prompts = hard_prompts(4)
    sampling = dict(max_tokens=12, temperature=TEMPERATURE, ignore_eos=True)
    completions = engine.generate(prompts, sampling=sampling, topk=K)
    found = [worst_error(models[0], p, c.token_ids, c.record) for p, c in zip(prompts, completions, strict=True)]
    assert max(found) > SEEN


def test_requests_that_cannot_be_served_are_refused(engine):
    prompts, sampling = hard_prompts(2), dict(max_tokens=4, ignore_eos=True)
    for wrong in (-1, V + 1):
        with pytest.raises(ValueError, match=rf"topk={wrong} is out of range: both models share 64 token ids"):
            engine.generate(prompts, sampling=sampling, topk=wrong)
    names, finished = submit(engine, prompts, sampling, [PairOptions(record=True, topk=k) for k in (3, 4)]), {}
    while engine._frontend.busy:
        finished |= step(engine)
    engine._take_records()
    one, other = (finished[name] for name in names)
    assert one.finish_reason == "length"
    assert (other.finish_reason, "other requests run with hidden=False, topk=3" in str(other.stop_reason)) == ("error", True)
    [completion, _] = engine.generate(prompts, sampling=sampling, topk=4)
    assert completion.record.teacher_topk_TX.shape == (4, 9)


# -- training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{}, {"divergence": "skew_kl", "kl_clip": 0.8, "importance_correction": "prefix", "num_iterations": 2}]
)
def test_training_on_all_ids_is_training_on_hidden_states(engine, model_paths, tmp_path, fields):
    """The same losses over four steps, from the same draws; with fewer ids they are lower."""
    fields = {"temperature": 0.8, "max_steps": 4, "learning_rate": 1e-3, "seed": 3, **fields}
    losses, rests = [], []
    for signal in (
        {"teacher_signal": "recorded"},
        {"teacher_signal": "topk", "teacher_topk": V},
        {"teacher_signal": "topk", "teacher_topk": 4},
    ):
        trainer = build_trainer(engine, model_paths[1], tmp_path, **fields, **signal)
        torch.manual_seed(0)
        trainer.train()
        losses.append(logged(trainer, "loss"))
        rests.append(logged(trainer, "osd/loss/topk_rest"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert 0.2 * losses[0][0] < losses[2][0] < 0.999 * losses[0][0]
    assert not rests[0]
    assert set(rests[1]) == {0.0}
    assert all(0.01 < rest < 0.9 for rest in rests[2])


def test_a_teacher_whose_logits_are_no_product_with_its_hidden_state(engine, models, model_paths, tmp_path, monkeypatch):
    """Hidden states are refused, and the advice works: the rows are of the logits that the model makes."""
    model = engine._frontend.worker.model_runner.model
    compute = model.compute_logits
    monkeypatch.setattr(model, "compute_logits", lambda hidden: compute(2 * hidden))
    with pytest.raises(ValueError, match=r"changes its hidden state .* use teacher_signal='topk' or 'recompute'"):
        build_trainer(engine, model_paths[1], tmp_path)
    trainer = build_trainer(engine, model_paths[1], tmp_path, teacher_signal="topk", teacher_topk=K, temperature=TEMPERATURE)
    trainer.train()
    assert all(0 < loss < 20 for loss in logged(trainer, "loss"))
    [completion] = engine.generate(hard_prompts(1), sampling=dict(max_tokens=8, temperature=2 * TEMPERATURE), topk=K)
    assert worst_error(models[0], hard_prompts(1)[0], completion.token_ids, completion.record) < CLOSE
