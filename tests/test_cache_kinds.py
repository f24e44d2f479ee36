"""Pairs of models whose KV cache is not one group of full attention: windows, recurrent states, shared and latent caches.

Both sides have the architecture and weights of their own. Float32; bound 2e-3 on every log-probability.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from osd.core import TOKEN_ORIGINS
from osd.engine.engine import PairPrompt
from tests.architectures import ARCHITECTURES, reference, save_model
from tests.pairs import compare_caches, cramped, errors, moved, on_disk, preempted, run_with_random_arrivals, start, watch
from tests.tiny import tiny_model
from tests.training import compare_supervision

IN_CI = ["sliding window and full", "Mamba-2 and attention"]
NEMOTRON = "Mamba-2, attention and MLP in layers of their own"
# vLLM's kernels of gated delta nets take no float32: see tests/test_families.py.
KINDS = [kind for kind in ARCHITECTURES if kind != "gated delta net and attention"]
# OSD refuses to train gpt-oss and latent attention; vLLM 0.32's Gemma 3n is wrong where `correct_output_scale` is not 0.
NOT_SYNCED = ["attention sinks", "latent attention", "shared KV caches"]
RECURRENT = ["Mamba-2 and attention", "Mamba-2 everywhere", NEMOTRON, "short convolution"]
EXPERTS = ["experts", "chunked attention", "attention sinks", "latent attention"]
# One block a request, or blocks of 512 tokens: their caches do not fill up.
ROOMY = ["Mamba-2 everywhere", "head sizes that differ by layer", "short convolution"]
WHOLE_PROMPTS = ["latent attention"]  # vLLM on a CPU without AMX neither splits nor caches them
# Their output layer is their embedding, so both sides mostly repeat the last token; drafts are rejected beside a Llama.
AGREEING = ["sliding window and full", "head sizes that differ by layer"]
ONE_GROUP = ["sliding window everywhere", "experts"]
pytestmark = pytest.mark.gpu


def parameter(kind: str) -> Any:
    marks = [] if kind in IN_CI else [pytest.mark.slow]
    if kind == "latent attention":
        marks.append(pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM 0.33 has no float32 of it on a GPU"))
    return pytest.param(kind, marks=marks)


@pytest.fixture(scope="module", params=map(parameter, KINDS))
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model_paths(kind, tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return save_model(root / "teacher", kind, seed=3), save_model(root / "student", kind, seed=4)


@pytest.fixture(scope="module")
def models(model_paths):
    return tuple(map(reference, model_paths))


@pytest.fixture(scope="module", params=[0, pytest.param(3, marks=pytest.mark.slow)], ids=["no drafts", "drafts"])
def drafts(kind, request) -> int:
    if request.param and kind in RECURRENT:
        pytest.skip("a recurrent state cannot go back by a rejected draft")
    if request.param and kind in WHOLE_PROMPTS:
        pytest.skip("vLLM's CPU build cannot verify several drafts of it at once")
    return request.param


def origins(results: dict[int, tuple[Any, Any]]) -> Counter:
    """Count the tokens of some completions by how they came to be."""
    return Counter(TOKEN_ORIGINS[origin] for _, record in results.values() for origin in record.origin_T.tolist())


def caches_prefixes(kind: str) -> bool:
    """vLLM 0.32 on a CPU: a prefill that ends inside a block of cached states ends the engine."""
    return torch.cuda.is_available() or kind not in [*RECURRENT, *WHOLE_PROMPTS]


@pytest.fixture(scope="module")
def engine(kind, model_paths, drafts):
    if torch.cuda.is_available() and kind in EXPERTS and not hasattr(torch.ops._moe_C, "topk_softmax"):
        pytest.skip("this build of vLLM has no kernels of experts")
    blocks = 12 if kind in ONE_GROUP else 24
    config = cramped(34, 50, blocks) | dict(num_speculative_tokens=drafts)
    with start(model_paths, config, max_model_len=192, enable_prefix_caching=caches_prefixes(kind)) as engine:
        yield engine


def beside_a_llama() -> Iterator[Any]:
    """Yield each kind, its side and the number of drafts, but for what OSD refuses."""
    for kind, side, drafts in product(KINDS, ("teacher", "student"), (0, 3)):
        if side == "student" and kind in EXPERTS and kind != "latent attention":
            continue  # vLLM prepares for experts by the teacher's configuration
        if side == "teacher" and drafts and kind in [*RECURRENT, *WHOLE_PROMPTS]:
            continue  # it cannot verify drafts
        in_ci = (kind, side, drafts) == ("Mamba-2 and attention", "student", 3)
        yield pytest.param(kind, side, drafts, marks=[] if in_ci else [*parameter(kind).marks, pytest.mark.slow])


# First in the module: the engine of the fixture above stays open until the module's end.
@pytest.mark.parametrize(("kind", "side", "drafts"), beside_a_llama())
def test_beside_a_llama(kind, side, drafts, tmp_path, monkeypatch):
    """An architecture on one side alone, with full attention on the other; with drafts, many of which are rejected."""
    folders = {"teacher": tmp_path / "teacher", "student": tmp_path / "student"}
    dense = {"first_k_dense_replace": 4, "n_routed_experts": 1} if (kind, side) == ("latent attention", "student") else {}
    for name, seed in (("teacher", 3), ("student", 4)):
        save_model(folders[name], kind, seed, **dense) if name == side else tiny_model(folders[name], seed=seed)
    models = tuple(map(reference, folders.values()))
    config = cramped(34, 50, 24) | dict(num_speculative_tokens=drafts)
    with start(folders.values(), config, max_model_len=192, enable_prefix_caching=caches_prefixes(kind)) as engine:
        results = run_with_random_arrivals(engine, 5, count=12, temperature=1.0, ignore_eos=True)
        assert max(errors(models, results).values()) < 2e-3
        if not drafts:
            return
        assert min(origins(results)["accepted"], origins(results)["corrected"]) > 20
        if kind in RECURRENT:  # planted: a state that stays where the rejected drafts left it
            monkeypatch.setattr("osd.engine.backend.recurrent_states.RecurrentStates.restore", lambda *_: None)
            results = run_with_random_arrivals(engine, 5, count=12, temperature=1.0, ignore_eos=True)
            assert errors(models, results)["logp_theta"] > 0.1


def test_records_are_exact_under_a_hard_schedule(kind, engine, models, drafts, monkeypatch):
    seen = watch(engine, monkeypatch)
    results = run_with_random_arrivals(engine, 5, count=12, temperature=1.0, ignore_eos=True)
    assert max(errors(models, results).values()) < 2e-3
    assert preempted(seen) or kind in ROOMY, seen
    if drafts and kind not in AGREEING:
        assert min(origins(results)["accepted"], origins(results)["corrected"]) > 20
    assert min(seen["teacher ahead in prefill"], seen["student ahead in prefill"]) > 0 or kind in WHOLE_PROMPTS, seen


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_prefix_hit_on_one_side_alone_is_exact(kind, engine, models, side):
    """The other side computes its whole prompt."""
    if not caches_prefixes(kind) or kind in ROOMY:
        pytest.skip("no prefix caching, or blocks that are longer than the prompts")
    rng = random.Random(side)

    def ids(count: int) -> list[int]:
        return [rng.randrange(7, 64) for _ in range(count)]

    shared, prompts, completions = ids(70), [], []
    for _ in range(2):
        own = {"teacher": ids(65), "student": ids(75), side: shared + ids(5)}
        prompts.append(PairPrompt(teacher_token_ids=own["teacher"], student_token_ids=own["student"]))
        completions += engine.generate(prompts[-1:], sampling={"max_tokens": 12, "ignore_eos": True})
    hits = {"teacher": completions[1].teacher_cached_tokens, "student": completions[1].student_cached_tokens}
    assert hits.pop(side) > 0
    assert set(hits.values()) == {0}
    assert max(errors(models, {i: (c, c.record) for i, c in enumerate(completions)}, prompts).values()) < 2e-3


def test_the_loss_is_that_of_a_transformers_teacher(kind, engine, model_paths, tmp_path):
    if kind in NOT_SYNCED:
        pytest.skip("such a student cannot be trained")
    compare_supervision(engine, model_paths[1], tmp_path)


def test_a_synced_student_is_the_live_one(kind, engine, models):
    """The sync reaches convolutions, state matrices and what layers share."""
    if kind in NOT_SYNCED:
        pytest.skip("such a student cannot be trained")
    teacher, live = models[0], moved(models[1])
    engine.load_student_weights(on_disk(engine, live))
    results = run_with_random_arrivals(engine, 6, count=6, temperature=1.0, ignore_eos=True)
    assert max(errors((teacher, live), results).values()) < 2e-3
    engine.load_student_weights(on_disk(engine, models[1]))


def test_the_prompts_are_longer_than_the_windows(kind, engine, models, model_paths):
    """The planted error: a reference that sees the whole context must disagree, or the test above proves nothing."""
    if not getattr(models[0].config, "sliding_window", None):
        pytest.skip("no windows")
    results = run_with_random_arrivals(engine, 7, count=6, temperature=1.0, ignore_eos=True)
    blind = []
    for path in model_paths:
        model = reference(path)
        model.config.sliding_window = 4096
        for module in model.modules():
            if getattr(module, "sliding_window", None):
                module.sliding_window = 4096
        blind.append(model)
    assert errors(blind, results)["logp_teacher"] > 0.1


def test_a_state_that_takes_a_token_twice_is_seen(kind, engine, models, monkeypatch):
    """The planted error: a student that is ahead computes its newest token, and computes it again when the teacher is there."""
    if "Mamba" not in kind:
        pytest.skip("no states")

    def take_back(side: Any, request: Any) -> None:
        request.num_computed_tokens -= 1
        request.num_output_placeholders -= 1
        request.is_prefill_chunk = True

    scheduler = engine._frontend.scheduler
    monkeypatch.setattr(scheduler, "_within_reach", lambda: set(scheduler.requests))
    monkeypatch.setattr("osd.engine.backend.side_scheduler.SideScheduler.preempt", take_back)
    results = run_with_random_arrivals(engine, 5, count=12, temperature=1.0, ignore_eos=True)
    assert errors(models, results)["logp_theta"] > 0.1


def test_osd_check_counts_the_caches_of_the_running_models(engine):
    compare_caches(engine)
