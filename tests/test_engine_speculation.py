"""The engine with drafts: its tokens follow q*, computed independently, at every place of a cycle, and so does their record.

Two statistics, both of the randomised probability integral transform (tests/exact.py), which is uniform in every context if a
token was drawn from q*: of single tokens, 63 degrees of freedom; and jointly of three consecutive tokens, beginning with the
first three, in 4 x 4 x 4 cells, 63 as well. Threshold 160 for the larger: a correct engine passes each with probability
1 - 3e-10. Measured 75 to 90; with the planted errors 590 and more.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from vllm import SamplingParams
from vllm.config import CUDAGraphMode
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.worker.gpu import cudagraph_utils

from osd.core import TOKEN_ORIGINS, MixingConfig
from osd.engine import speculation
from osd.engine.backend import speculative_worker
from osd.engine.backend.speculative_sampler import SpeculativeSampler
from osd.engine.engine import PairCompletion, PairEngine, PairPrompt
from osd.engine.positions import CycleAligner
from osd.engine.request import PairOptions
from osd.engine.speculation import ACCEPTED, BONUS, CORRECTED, DRAWN
from tests.exact import (
    completion_logits,
    integral_transform,
    log_probabilities,
    mixture,
    not_greedy,
    q_star,
    record_columns,
    solve,
)
from tests.pairs import prompt_pairs, run, runners, start, submit
from tests.training import build_trainer, logged

pytestmark = pytest.mark.gpu

ENGINE = dict(num_speculative_tokens=5)
THRESHOLD, SEEN = 160.0, 480.0
COMPLETIONS, TOKENS = 64, 120
TEMPERATURE = 0.6


@pytest.fixture(scope="module")
def greedy_without_drafts(tiny_pair) -> list[list[int]]:
    with start(tiny_pair) as engine:
        return [c.token_ids for c in sample(engine, PROMPTS[:16], temperature=0.0, max_tokens=60)]


@pytest.fixture(scope="module")
def model_paths(tiny_pair, greedy_without_drafts):
    """Of `engine`, which starts after the other one is closed: a process holds one pair."""
    return tiny_pair


@pytest.fixture
def drafts(engine, monkeypatch) -> Callable[[int], None]:
    """Let the student draft so many tokens from now on."""
    return lambda count: monkeypatch.setattr(engine._frontend.scheduler, "drafts", count)


PROMPTS = prompt_pairs(COMPLETIONS)


def sample(engine: PairEngine, prompts: Sequence[PairPrompt] = PROMPTS, **sampling) -> list[PairCompletion]:
    settings = dict(max_tokens=TOKENS, temperature=TEMPERATURE, ignore_eos=True) | sampling
    return engine.generate(prompts, sampling=settings)


def origins(completions: Sequence[PairCompletion]) -> torch.Tensor:
    return torch.cat([c.record.origin_T for c in completions])


def worst_chi_square(models, completions: Sequence[PairCompletion]) -> float:
    ls, lt = log_probabilities(models, PROMPTS, completions, TEMPERATURE)
    logq = mixture(ls, lt, solve("kl_symmetry", ls, lt))
    tokens = [token for c in completions for token in c.token_ids]
    assert len(tokens) == COMPLETIONS * TOKENS
    found = []
    for order in (lt - ls, ls, lt):
        u = integral_transform(logq, tokens, order)
        found.append(stats.chisquare((u * 64).long().bincount(minlength=64)).statistic)
        joint = ((u.view(-1, 3) * 4).long() * torch.tensor([16, 4, 1])).sum(-1)
        found.append(stats.chisquare(joint.bincount(minlength=64)).statistic)
    return float(max(found))


@pytest.mark.parametrize("k", [1, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_draws_follow_q_star(engine, models, drafts, record_property, k):
    drafts(k)
    completions = sample(engine)
    found = worst_chi_square(models, completions)
    record_property("chi_square", round(found, 1))
    assert found < THRESHOLD
    counts = origins(completions).bincount(minlength=4)
    assert (counts >= 20).all(), dict(zip(TOKEN_ORIGINS, counts.tolist(), strict=True))


def test_draws_follow_q_star_when_the_number_of_drafts_changes(engine, models, monkeypatch):
    """As with "auto": other drafts in every step, and steps that run as without speculation."""
    rng, seen = random.Random(0), Counter()
    monkeypatch.setattr(speculative_worker, "chooses_drafts", lambda config: True)
    chooser = SimpleNamespace(choose=lambda batch: rng.randrange(4), observe=lambda drafts, *of: seen.update([drafts]))
    monkeypatch.setattr(engine._frontend.scheduler, "chooser", chooser)
    completions = sample(engine)
    assert worst_chi_square(models, completions) < THRESHOLD
    assert min(seen[k] for k in range(4)) > 5, seen
    ls, lt = log_probabilities(models, PROMPTS, completions, TEMPERATURE)
    token = torch.tensor([t for c in completions for t in c.token_ids])[:, None]
    for name, expected in (("logp_theta", ls), ("logp_teacher", lt)):
        recorded = torch.cat([getattr(c.record, name) for c in completions]).double()
        torch.testing.assert_close(recorded, expected.gather(-1, token)[:, 0], atol=5e-4, rtol=1e-3)


def the_residual_is_q_star(monkeypatch):
    monkeypatch.setattr(speculation, "residual", lambda target_BV, theta_BV: target_BV.double().softmax(-1))


def the_teacher_decides_acceptance(monkeypatch):
    record = SpeculativeSampler._record

    def planted(self, teacher, parts, token_N, logp_draw_N):
        values = record(self, teacher, parts, token_N, logp_draw_N)
        logq, logp_theta, logp_teacher = values[:, 1:4].clone().unbind(-1)
        values[:, 2] = logq - logp_teacher + logp_theta  # log q* minus it is log π_t / π_θ
        return values

    monkeypatch.setattr(SpeculativeSampler, "_record", planted)


def drafts_are_not_tempered(monkeypatch):
    draft = SpeculativeSampler.draft
    monkeypatch.setattr(  # the kernels, which temper themselves
        SpeculativeSampler,
        "draft",
        lambda self, logits, t, *args, **kwargs: draft(self, logits, torch.ones_like(t), *args, **kwargs),
    )
    monkeypatch.setattr(
        SpeculativeSampler, "_tempered", lambda self, logits, rows, t: (logits if rows is None else logits[rows]).float()
    )


def change_alignment(monkeypatch, change) -> None:
    build = CycleAligner._build_cycle
    monkeypatch.setattr(CycleAligner, "_build_cycle", lambda *args: change(build(*args)))


def off_by_one_position(monkeypatch):
    change_alignment(monkeypatch, lambda a: replace(a, student_N=a.student_N.roll(1)))


def the_bonus_token_is_the_teachers(monkeypatch):
    def change(alignment):
        if (rows := alignment.positions).paired is not None:
            return alignment
        bonus_N = alignment.layout.place_N == alignment.layout.drafts_B[alignment.layout.request_N]
        return replace(alignment, positions=replace(rows, alpha=torch.where(bonus_N, 1.0, torch.nan)))

    change_alignment(monkeypatch, change)


@pytest.mark.parametrize(
    ("error", "k"),
    [
        (the_residual_is_q_star, 3),
        (the_teacher_decides_acceptance, 3),
        (drafts_are_not_tempered, 3),
        (off_by_one_position, 3),
        (the_bonus_token_is_the_teachers, 1),
    ],
    ids=lambda value: getattr(value, "__name__", f"k={value}"),
)
def test_planted_errors_are_seen(engine, models, drafts, monkeypatch, record_property, error, k):
    drafts(k)
    error(monkeypatch)
    found = worst_chi_square(models, sample(engine))
    record_property("chi_square", round(found, 1))
    assert found > SEEN


def test_acceptance_is_one_minus_the_total_variation(engine, models, drafts):
    """Given the tokens before it a draft is accepted with that probability: the sum of deviations, in standard errors."""
    drafts(3)
    completions = sample(engine)
    ls, lt = log_probabilities(models, PROMPTS, completions, TEMPERATURE)
    logq = mixture(ls, lt, solve("kl_symmetry", ls, lt))
    how = origins(completions)
    verified = (how == ACCEPTED) | (how == CORRECTED)
    expected = (1 - 0.5 * (logq.exp() - ls.exp()).abs().sum(-1))[verified]
    accepted = (how == ACCEPTED)[verified].double()
    assert verified.sum() > 4000
    assert (accepted - expected).sum().abs() < 5 * (expected * (1 - expected)).sum().sqrt()


@pytest.mark.parametrize("method", ["kl_symmetry", pytest.param("entropy", marks=pytest.mark.slow)])
def test_the_record_is_what_the_definitions_say(engine, models, drafts, monkeypatch, method):
    """Every column at every kept token, whichever way it came to be, against float64."""
    monkeypatch.setattr(engine._frontend.worker.sampler, "mixing", MixingConfig(alpha_method=method))
    drafts(3)
    prompts = PROMPTS[:12]
    completions = engine.generate(prompts, sampling=dict(max_tokens=60, temperature=TEMPERATURE, ignore_eos=True), hidden=True)
    ls, lt = log_probabilities(models, prompts, completions, TEMPERATURE)
    alpha = solve(method, ls, lt)
    logq = mixture(ls, lt, alpha)
    tokens = [t for c in completions for t in c.token_ids]
    for name, values in record_columns(ls, lt, alpha, logq, tokens).items():
        recorded = torch.cat([getattr(c.record, name) for c in completions]).double()
        torch.testing.assert_close(recorded, values, atol=2e-4, rtol=1e-3, msg=f"{name} differs")
    weight, bias = engine.teacher_lm_head()
    hidden = torch.cat([c.record.teacher_hidden_TH for c in completions]).to(weight.device)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close((logits / TEMPERATURE).double().log_softmax(-1).cpu(), lt, atol=2e-3, rtol=1e-3)
    assert all(c.record.origin_T[0] == DRAWN and len(c.record.origin_T) == len(c.token_ids) for c in completions)
    assert set(origins(completions).tolist()) == {DRAWN, ACCEPTED, CORRECTED, BONUS}


@pytest.mark.parametrize("k", [1, 4])
def test_greedy_completions_equal_those_without_drafts(engine, models, drafts, greedy_without_drafts, k):
    drafts(k)
    completions = sample(engine, PROMPTS[:16], temperature=0.0, max_tokens=60)
    assert [c.token_ids for c in completions] == greedy_without_drafts
    for prompt, c in zip(PROMPTS, completions, strict=False):
        sides = prompt.teacher_token_ids, prompt.student_token_ids
        assert not not_greedy(q_star(models, sides, c.token_ids), c.token_ids)
    assert (origins(completions) == ACCEPTED).sum() > 50


def test_a_seed_gives_the_same_completion_for_every_number_of_drafts_and_in_every_batch(engine, drafts):
    found = []
    for k, order in ((1, 1), (3, -1), (5, 1), (0, -1)):
        drafts(k)
        settings = [dict(max_tokens=40, temperature=1.0, ignore_eos=True, seed=i) for i in range(12)]
        completions = engine.generate(PROMPTS[:12][::order], sampling=settings[::order])
        found.append([c.token_ids for c in completions][::order])
    assert found[0] == found[1] == found[2] == found[3]


def test_a_completion_ends_at_a_token_that_ends_it_inside_accepted_drafts(engine, drafts):
    """The end-of-sequence id, stop strings and max_tokens, wherever they fall in a cycle: nothing after them is kept."""
    drafts(5)
    prompts, how = PROMPTS[:40], []
    sampling = [dict(max_tokens=3 + n, temperature=1.0, stop=["w20", "w33"], logit_bias={2: 1.5}) for n in range(40)]
    for settings, c in zip(sampling, engine.generate(prompts, sampling=sampling), strict=True):
        words = [token for token in c.token_ids if token in (2, 20, 33)]
        assert words == c.token_ids[-1:] if c.finish_reason == "stop" else (not words and c.finish_reason == "length")
        assert len(c.token_ids) == settings["max_tokens"] or c.finish_reason == "stop"
        assert len(c.record) == len(c.record.origin_T) == len(c.token_ids)
        how.append((c.finish_reason, int(c.record.origin_T[-1])))
    assert {("stop", ACCEPTED), ("length", ACCEPTED)} <= set(how)
    for side in (engine._frontend.scheduler, engine._frontend.scheduler.student):
        assert not side.requests
        assert side.kv_cache_manager.usage == 0


def test_requests_of_every_kind_share_a_batch(engine, models, drafts):
    """With drafts and without, each from its own target: the teacher's alone, a given α, from some place on the student's."""
    drafts(3)
    kinds = [
        (dict(), dict()),
        (dict(top_k=3), dict()),
        (dict(temperature=0.0), dict()),
        (dict(), dict(teacher_only=True)),
        (dict(), dict(alpha=0.0)),
        (dict(), dict(alpha=0.7)),
        (dict(), dict(mix_tokens=17)),
        (dict(temperature=0.5), dict()),
    ] * 3
    sampling = [dict(max_tokens=40, temperature=1.0, ignore_eos=True) | given for given, _ in kinds]
    options = [PairOptions(record=True, **given) for _, given in kinds]
    prompts = PROMPTS[: len(kinds)]
    results = run(engine, submit(engine, prompts, sampling, options))
    for prompt, settings, option, (completion, record) in zip(prompts, sampling, options, results, strict=True):
        tokens, temperature = completion.token_ids, settings["temperature"] or 1.0
        lt, ls = (
            completion_logits(model, ids, tokens).div(temperature).log_softmax(-1)
            for model, ids in zip(models, (prompt.teacher_token_ids, prompt.student_token_ids), strict=True)
        )
        alpha = solve("kl_symmetry", ls, lt) if option.alpha is None else torch.full((40, 1), option.alpha)
        if option.mix_tokens is not None:
            alpha[option.mix_tokens :] = 0
        target = lt if option.teacher_only else mixture(ls, lt, alpha)
        if settings.get("top_k"):
            target = target.masked_fill(target < target.topk(3, dim=-1).values[:, -1:], float("-inf")).log_softmax(-1)
        expected = target.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        if settings["temperature"] == 0.0:
            assert not not_greedy(target, tokens)
        else:
            torch.testing.assert_close(record.logp_draw.double(), expected, atol=5e-4, rtol=1e-3)
        counts = record.origin_T.bincount(minlength=4)
        assert counts[DRAWN] == (40 if option.teacher_only else 1)
        assert option.teacher_only or counts[ACCEPTED] > 2
        if option.alpha == 0.0:
            assert counts[CORRECTED] == 0


def test_a_grammar_gets_no_drafts_and_masks_q_star(engine, drafts):
    drafts(3)
    prompt, structured = PROMPTS[0], StructuredOutputsParams(choice=["w20", "w21"])
    options = PairOptions(student_prompt_token_ids=prompt.student_token_ids, record=True)
    params = [
        SamplingParams(max_tokens=4, seed=n, structured_outputs=grammar, extra_args=options.to_extra_args())
        for n, grammar in enumerate([structured, None] * 4)
    ]
    outputs = engine.llm.generate([{"prompt_token_ids": prompt.teacher_token_ids}] * 8, params, use_tqdm=False)
    records = list(engine._take_records().values())
    assert {tuple(o.outputs[0].token_ids) for o in outputs[::2]} <= {(20, 2), (21, 2)}
    assert sum(bool((record.origin_T1 == DRAWN).all()) for record in records) == 4


def test_training_samples_with_drafts_and_logs_their_acceptance(engine, tiny_pair, tmp_path, drafts):
    """The loss of the recorded teacher, from hidden states at every kept position, equals that of a second teacher."""
    drafts(3)
    losses = []
    for signal in ("recorded", "recompute"):
        trainer = build_trainer(
            engine,
            tiny_pair[1],
            tmp_path / signal,
            teacher_signal=signal,
            max_steps=1,
            per_device_train_batch_size=8,
            max_completion_length=24,
            seed=3,
        )
        torch.manual_seed(0)
        trainer.train()
        [loss], [acceptance], [tokens] = (
            logged(trainer, name) for name in ("loss", "osd/engine/draft_acceptance", "osd/engine/tokens_per_cycle")
        )
        assert 0.2 < acceptance < 0.9
        assert 1.2 < tokens < 4
        losses.append(loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_every_number_of_drafts_has_a_cuda_graph(engine, monkeypatch):
    """With "auto"; vLLM's own plan, the planted error, has graphs for the largest number alone. Nothing is captured here."""
    monkeypatch.setattr(cudagraph_utils.current_platform, "get_global_graph_pool", lambda: None, raising=False)
    config, most, requests = deepcopy(runners(engine)["teacher"].vllm_config), 5, 4
    config.compilation_config.cudagraph_capture_sizes = list(range(1, requests * (1 + most) + 1))
    config.compilation_config.max_cudagraph_capture_size = requests * (1 + most)
    graphs = cudagraph_utils.CudaGraphManager(config, torch.device("cpu"), CUDAGraphMode.FULL_DECODE_ONLY, 1 + most)
    graphs._graphs_captured = True

    def replayed() -> list[bool]:
        found = [graphs.dispatch(requests, requests * (1 + k), 1 + k, 0) for k in range(1 + most)]
        return [graph.cg_mode == CUDAGraphMode.FULL for graph in found]

    assert replayed() == [False] * most + [True]
    speculative_worker._graphs_for_all(graphs, most)
    assert all(replayed())
    assert config.speculative_config is None
