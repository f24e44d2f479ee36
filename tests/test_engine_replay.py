"""Steady steps as they run on a GPU: FlashAttention, CUDA graphs of both models, and everything around them replayed.

test_engine_async.py has the same in float32, for which vLLM takes another attention that is not captured.
"""

from __future__ import annotations

import pytest
import torch

from osd.engine.engine import PairEngine
from tests.test_engine_async import PROMPTS, SAMPLING, compare_with_stock, prepared, runners, start

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA graphs")]

GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}  # without torch.compile, which has no part in this


@pytest.fixture(scope="module")
def engine(tiny_pair):
    with start(tiny_pair, dtype="bfloat16", enforce_eager=False, compilation_config=GRAPHS) as engine:
        yield engine


def sampled(engine: PairEngine, **sampling) -> tuple[list[list[int]], torch.Tensor]:
    completions = engine.generate(PROMPTS, sampling=SAMPLING | {"temperature": 1.0, "seed": 3} | sampling)
    return [c.token_ids for c in completions], torch.cat([c.record.values_TR for c in completions])


def test_the_first_generate_compiles_no_kernels(tiny_pair):
    # The first test of the file: the others share an engine.
    from osd.kernels.draw import draw_kernel
    from osd.kernels.midpoint import meet_kernel
    from osd.kernels.refine import refine_kernel

    kernels = (meet_kernel, refine_kernel, draw_kernel)
    for kernel in kernels:
        kernel.device_caches.clear()  # what earlier tests compiled
    with start(tiny_pair, dtype="bfloat16", enforce_eager=False, compilation_config=GRAPHS) as engine:
        compiled = [len(kernel.device_caches[0][0]) for kernel in kernels]
        assert all(compiled)
        sampled(engine)  # prompts of several lengths: steps in which some rows are sampled, and steps in which all are
        assert [len(kernel.device_caches[0][0]) for kernel in kernels] == compiled


def test_replayed_inputs_are_those_that_vllm_prepares(engine, monkeypatch):
    sampled(engine)
    captured = [list(runner.execute_model._replays.values()) for runner in runners(engine).values()]
    assert all(any(prepare.captured and logits.captured for prepare, logits in side) for side in captured)
    assert all("schedule" in prepared(runner, 1) for runner in runners(engine).values()), "compares less than it says"
    draw = engine._worker().sampler._drawing._draw
    replayed = draw.replayed
    differing = compare_with_stock(engine, monkeypatch)
    sampled(engine)
    assert not differing
    assert draw.replayed - replayed > 60, "the draw's inputs do not stay where they are"


def test_steps_that_are_replayed_sample_what_vllms_own_do(engine, monkeypatch):
    replayed = sampled(engine)
    for runner in runners(engine).values():
        monkeypatch.setattr(runner.execute_model, "_supported", False)
    own = sampled(engine)
    assert replayed[0] == own[0]
    assert torch.equal(replayed[1], own[1])


def test_forwards_side_by_side_are_those_one_after_the_other(engine):
    results = []
    for on in (False, True):
        assert engine.llm.collective_rpc("overlap_forwards", args=(on,)) == [on]
        results.append(sampled(engine))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_a_batch_that_shrinks_row_by_row(engine, monkeypatch):
    """More sizes than are kept, each for a few steps; and again, so that some come back."""
    differing = compare_with_stock(engine, monkeypatch)
    lengths = [8, 14, 20, 26, 32, 38, 44, 50, 56, 62, 66, 70]
    sampling = [SAMPLING | {"max_tokens": n} for n in lengths]
    first, second = (engine.generate(PROMPTS * 2, sampling=sampling) for _ in range(2))
    assert not differing
    assert [c.token_ids for c in first] == [c.token_ids for c in second]
