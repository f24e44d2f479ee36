"""Async scheduling: a step is scheduled while the one before it runs, and its tokens pass to the next one on the device.

The reference is the engine with one step at a time, and transformers.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from osd.engine.engine import PairEngine, PairPrompt
from tests.exact import completion_logits
from tests.pairs import runners, start

pytestmark = pytest.mark.gpu

# Blocks of 32: completions of 70 tokens enter new ones.
PROMPTS = [PairPrompt(teacher_token_ids=[7 + i] * (3 * i + 1), student_token_ids=[30, 31 + i]) for i in range(6)]
SAMPLING = dict(max_tokens=70, temperature=0.0, ignore_eos=True)
# As on a GPU: vLLM's attention for bfloat16 is captured, the one for float32 is not. torch.compile has no part in this.
GRAPHS = dict(dtype="bfloat16", enforce_eager=False, compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"})
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no streams and no graphs")


def is_async(engine: PairEngine) -> bool:
    return engine._frontend.scheduler.scheduler_config.async_scheduling


@pytest.fixture(scope="module")
def one_at_a_time(tiny_pair) -> list[list[int]]:
    with start(tiny_pair, async_scheduling=False) as engine:
        assert not is_async(engine)
        return [c.token_ids for c in engine.generate(PROMPTS, sampling=SAMPLING)]


@pytest.fixture(scope="module")
def model_paths(tiny_pair, one_at_a_time):
    """The models of `engine`, which starts when the engine of ``one_at_a_time`` is closed."""
    return tiny_pair


def test_async_results_equal_those_of_one_step_at_a_time(engine, one_at_a_time):
    assert is_async(engine)
    assert [c.token_ids for c in engine.generate(PROMPTS, sampling=SAMPLING)] == one_at_a_time


def test_requests_that_end_at_different_steps_leave_the_others_alone(engine, one_at_a_time):
    """Rows leave and others take their places while the rest decodes."""
    lengths = [5, 40, 11, 66, 23, 52]
    completions = engine.generate(PROMPTS, sampling=[SAMPLING | {"max_tokens": length} for length in lengths])
    assert [c.token_ids for c in completions] == [ids[:n] for ids, n in zip(one_at_a_time, lengths, strict=True)]


def errors(models, completions) -> float:
    """Return the largest difference between a recorded log-probability of either model and transformers'."""
    worst = 0.0
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        token = torch.tensor(completion.token_ids)[:, None]
        for model, ids, name in (
            (models[0], prompt.teacher_token_ids, "logp_teacher"),
            (models[1], prompt.student_token_ids, "logp_theta"),
        ):
            expected = completion_logits(model, ids, completion.token_ids).log_softmax(-1).gather(-1, token)[:, 0]
            worst = max(worst, (getattr(completion.record, name).double() - expected).abs().max().item())
    return worst


def sampled(engine, **sampling):
    return engine.generate(PROMPTS, sampling=SAMPLING | {"temperature": 1.0} | sampling)


def test_records_belong_to_the_tokens_that_were_returned(engine, models):
    assert errors(models, sampled(engine)) < 1e-3


def plant(engine, monkeypatch, side, change) -> None:
    """Change the arguments of one runner's bookkeeping after sampling: idx_mapping, tokens, num_sampled, num_rejected, ..."""
    runner = runners(engine)[side]
    stock = runner.postprocess_sampled
    monkeypatch.setattr(runner, "postprocess_sampled", lambda *args: stock(*change(*args)))


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_side_fed_another_rows_token_is_seen(engine, models, monkeypatch, side):
    plant(engine, monkeypatch, side, lambda slots, tokens, *counts: (slots, tokens.roll(1, 0), *counts))
    assert errors(models, sampled(engine)) > 1.0


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_positions_that_stand_still_are_seen(engine, models, monkeypatch, side):
    """The planted error: the tenth step of a side is computed again as if its rows had not been ready."""
    step = itertools.count()

    def rejected(slots, tokens, num_sampled, num_rejected, starts):
        return slots, tokens, num_sampled, num_rejected + int(next(step) == 10), starts

    plant(engine, monkeypatch, side, rejected)
    assert errors(models, sampled(engine)) > 0.1


def test_sampling_goes_on_after_a_step_that_failed(engine, monkeypatch, one_at_a_time):
    runner = runners(engine)["student"]
    execute_model, calls = runner.execute_model, itertools.count()

    def failing(*args, **kwargs):
        result = execute_model(*args, **kwargs)
        if next(calls) == 20:
            raise RuntimeError("out of memory")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(runner, "execute_model", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.generate(PROMPTS, sampling=SAMPLING)
    assert [c.token_ids for c in engine.generate(PROMPTS, sampling=SAMPLING)] == one_at_a_time


def overlapped(engine, on: bool):
    assert engine.llm.collective_rpc("overlap_forwards", args=(on,)) == [on]
    completions = sampled(engine, seed=3)
    return [c.token_ids for c in completions], torch.cat([c.record.values_TR for c in completions])


@needs_a_gpu
def test_forward_passes_side_by_side_equal_those_one_after_the_other(engine):
    (apart, apart_values), (beside, beside_values) = (overlapped(engine, on) for on in (False, True))
    assert apart == beside
    torch.testing.assert_close(apart_values, beside_values, atol=1e-4, rtol=1e-4)


@needs_a_gpu
class TestWithCudaGraphs:
    @pytest.fixture(scope="class")
    def graphs(self, engine, tiny_pair):
        """Closes the module's engine: one engine lives in a process."""
        engine.close()
        with start(tiny_pair, **GRAPHS) as engine:
            yield engine

    def test_the_first_generate_compiles_no_kernels(self, graphs):
        """The first test of the class: the others share its engine."""
        from osd.kernels.draw import draw_kernel
        from osd.kernels.midpoint import meet_kernel
        from osd.kernels.refine import refine_kernel

        kernels = (meet_kernel, refine_kernel, draw_kernel)
        compiled = [len(kernel.device_caches[0][0]) for kernel in kernels]
        assert all(compiled)
        sampled(graphs)  # prompts of several lengths: steps in which some rows are sampled, and steps in which all are
        assert [len(kernel.device_caches[0][0]) for kernel in kernels] == compiled

    def test_both_models_and_the_draw_are_replayed(self, graphs):
        for runner in runners(graphs).values():
            assert runner.cudagraph_manager.graphs
        draw = graphs._frontend.worker.sampler._kernel_draw._draw
        replayed = draw.replayed
        sampled(graphs)
        assert draw.replayed - replayed > 60, "the draw's inputs do not stay at their addresses"

    def test_forward_passes_side_by_side_equal_those_one_after_the_other(self, graphs):
        (apart, apart_values), (beside, beside_values) = (overlapped(graphs, on) for on in (False, True))
        assert apart == beside
        assert torch.equal(apart_values, beside_values)

    def test_a_batch_that_shrinks_row_by_row(self, graphs):
        """More sizes than are kept, each for a few steps; and again, so that some come back."""
        lengths = [8, 14, 20, 26, 32, 38, 44, 50, 56, 62, 66, 70]
        sampling = [SAMPLING | {"max_tokens": n} for n in lengths]
        first, second = (graphs.generate(PROMPTS * 2, sampling=sampling) for _ in range(2))
        assert [c.token_ids for c in first] == [c.token_ids for c in second]
