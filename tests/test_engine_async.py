"""Async scheduling: tokens pass from step to step on the device, and steady decoding moves the last step on.

The reference is the engine with scheduling of one step at a time, and, for what a runner is given to compute, vLLM's own
preparation of the same step.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from osd.engine import worker as pair_worker
from osd.engine.engine import PairConfig, PairEngine, PairPrompt
from osd.engine.forward import SteadyForward
from osd.engine.scheduler import AsyncPairScheduler
from tests.exact import completion_logits, reference
from tests.tiny import tiny_engine_kwargs

pytestmark = pytest.mark.gpu

# Blocks of 32: completions of 70 tokens enter new ones.
PROMPTS = [PairPrompt(teacher_token_ids=[7 + i] * (3 * i + 1), student_token_ids=[30, 31 + i]) for i in range(6)]
SAMPLING = dict(max_tokens=70, temperature=0.0, ignore_eos=True)


def start(tiny_pair, **overrides) -> PairEngine:
    teacher, student = map(str, tiny_pair)
    return PairEngine(PairConfig(teacher=teacher, student=student, engine_kwargs=tiny_engine_kwargs(**overrides)))


@pytest.fixture(scope="module")
def one_at_a_time(tiny_pair) -> list[list[int]]:
    with start(tiny_pair, async_scheduling=False) as engine:
        assert not isinstance(engine._scheduler(), AsyncPairScheduler)
        return [c.token_ids for c in engine.generate(PROMPTS, sampling=SAMPLING)]


@pytest.fixture(scope="module")
def engine(tiny_pair, one_at_a_time):
    with start(tiny_pair) as engine:
        assert isinstance(engine._scheduler(), AsyncPairScheduler)
        yield engine


@pytest.fixture(scope="module")
def models(tiny_pair):
    return tuple(map(reference, tiny_pair))


def runners(engine: PairEngine) -> dict[str, object]:
    worker = engine._worker()
    return {"teacher": worker.model_runner, "student": worker.student_runner}


def test_async_results_are_those_of_one_step_at_a_time(engine, one_at_a_time):
    before = {side: runner.execute_model.advanced for side, runner in runners(engine).items()}
    completions = engine.generate(PROMPTS, sampling=SAMPLING)
    assert [c.token_ids for c in completions] == one_at_a_time
    for side, runner in runners(engine).items():
        # 70 steps, of which a few admit requests or are the last; the rest must have taken the short way.
        assert runner.execute_model.advanced - before[side] > 60


def prepared(runner, num_rows: int) -> dict[str, torch.Tensor]:
    """Everything that a decoding step of ``num_rows`` rows reads of what was prepared for it, copied."""
    table = runner.input_batch.block_table[0]
    buffers = {
        "input_ids": runner.input_ids.gpu[:num_rows],
        "positions": runner.positions[:num_rows],
        "num_computed_tokens": runner.num_computed_tokens[:num_rows],
        "seq_lens": runner.seq_lens,
        "optimistic_seq_lens": runner.optimistic_seq_lens_cpu,
        "query_start_loc": runner.query_start_loc.gpu[: num_rows + 1],
        "query_start_loc_cpu": runner.query_start_loc.cpu[: num_rows + 1],
        "block_table": table.block_table.gpu[:num_rows],
        "slot_mapping": table.slot_mapping.gpu[:num_rows],
        "discard": torch.from_numpy(runner.discard_request_mask.np[:num_rows]),
    }
    for group in (group for of_cache in runner.attn_groups for group in of_cache):
        # FlashAttention's schedule, which the CUDA graphs of the model read where it lies.
        schedule = getattr(group.get_metadata_builder(0), "scheduler_metadata", None)
        if schedule is not None:
            buffers["schedule"] = schedule
    return {name: buffer.clone() for name, buffer in buffers.items()}


def compare_with_stock(engine, monkeypatch) -> list[str]:
    """After every step that was moved on, let vLLM prepare it too; returns what differed, as it happens."""
    differing: list[str] = []
    advance = SteadyForward._advance

    def both(self, step, output):
        runner, batch, model = self.runner, self.runner.input_batch, self._model
        ours: dict[str, torch.Tensor] = {}

        def watched(**inputs):
            ours.update(prepared(runner, batch.num_reqs))  # before the model runs: its attention counts in the schedule
            return model(**inputs)

        self._model = watched
        advance(self, step, output)
        self._model = model
        cached = output.scheduled_cached_reqs
        planned = dict(zip(map(batch.req_id_to_index.get, cached.req_ids), cached.num_computed_tokens, strict=True))
        if batch.num_computed_tokens_cpu[: batch.num_reqs].tolist() != [planned[row] for row in range(batch.num_reqs)]:
            differing.append("num_computed_tokens_cpu")
        indices = runner._prepare_inputs(output, np.ones(batch.num_reqs, dtype=np.int32))[0]
        self._build(**self._metadata)
        theirs = prepared(runner, batch.num_reqs)
        if batch.num_reqs < 3:  # graphs of one row and of two leave a part of the schedule unwritten: it has room for four
            ours.pop("schedule", None)
        for name in ours:
            if not torch.equal(ours[name], theirs[name]):
                where = (ours[name] != theirs[name]).nonzero()[:4].tolist()
                differing.append(f"{name} of {tuple(ours[name].shape)} at {where}")
        if indices.tolist() != list(range(batch.num_reqs)):
            differing.append("rows of the logits")

    monkeypatch.setattr(SteadyForward, "_advance", both)
    return differing


def test_inputs_moved_on_are_those_that_vllm_prepares(engine, monkeypatch, one_at_a_time):
    differing = compare_with_stock(engine, monkeypatch)
    completions = engine.generate(PROMPTS, sampling=SAMPLING)
    assert not differing
    assert [c.token_ids for c in completions] == one_at_a_time


def test_requests_that_come_and_go_leave_the_others_alone(engine, monkeypatch, one_at_a_time):
    """Lengths that differ: rows leave and others take their places, while the rest decodes."""
    differing = compare_with_stock(engine, monkeypatch)
    lengths = [5, 40, 11, 66, 23, 52]
    completions = engine.generate(PROMPTS, sampling=[SAMPLING | {"max_tokens": length} for length in lengths])
    assert [c.token_ids for c in completions] == [ids[:n] for ids, n in zip(one_at_a_time, lengths, strict=True)]
    assert not differing


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU, host and device share the block table")
def test_a_block_table_that_is_not_uploaded_is_seen(engine, monkeypatch):
    """The planted error: new blocks stay on the host."""
    update = SteadyForward._update_batch

    def without_upload(self, cached, rows):
        with monkeypatch.context() as patch:
            patch.setattr(self.runner.input_batch.block_table, "commit_block_table", lambda *args: None)
            update(self, cached, rows)

    monkeypatch.setattr(SteadyForward, "_update_batch", without_upload)
    differing = compare_with_stock(engine, monkeypatch)
    engine.generate(PROMPTS, sampling=SAMPLING)
    assert {"block_table", "slot_mapping"} <= {entry.split()[0] for entry in differing}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no streams")
def test_forwards_side_by_side_are_those_one_after_the_other(engine):
    sampling = SAMPLING | {"temperature": 1.0, "seed": 3}
    results = []
    for on in (False, True):
        assert engine.llm.collective_rpc("overlap_forwards", args=(on,)) == [on]
        completions = engine.generate(PROMPTS, sampling=sampling)
        results.append(([c.token_ids for c in completions], torch.cat([c.record.values_TR for c in completions])))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=1e-4)


def errors(models, completions) -> float:
    """The largest difference between a recorded log-probability of either model and transformers'."""
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


def test_records_are_those_of_the_tokens_that_were_returned(engine, models):
    assert errors(models, engine.generate(PROMPTS, sampling=SAMPLING | {"temperature": 1.0})) < 1e-3


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_side_fed_another_rows_token_is_seen(engine, models, monkeypatch, side):
    feed = pair_worker.feed
    wrong = runners(engine)[side]

    def shifted(runner, token_B, fed, again):
        feed(runner, token_B.roll(1) if runner is wrong else token_B, fed, again)

    monkeypatch.setattr(pair_worker, "feed", shifted)
    assert errors(models, engine.generate(PROMPTS, sampling=SAMPLING | {"temperature": 1.0})) > 1.0


@pytest.mark.parametrize("what", ["positions", "seq_lens"])
def test_inputs_that_stand_still_are_seen(engine, models, monkeypatch, what):
    advance = SteadyForward._update_batch

    def still(self, cached, rows):
        advance(self, cached, rows)
        getattr(self.runner, what)[:rows] -= 1

    monkeypatch.setattr(SteadyForward, "_update_batch", still)
    assert errors(models, engine.generate(PROMPTS, sampling=SAMPLING | {"temperature": 1.0})) > 0.1


def test_a_step_that_fails_is_not_gone_on_from(engine, monkeypatch, one_at_a_time):
    advance = SteadyForward._advance
    calls = []

    def failing(self, step, output):
        calls.append(self)
        if len(calls) == 20:
            raise RuntimeError("out of memory")
        advance(self, step, output)

    with monkeypatch.context() as patch:
        patch.setattr(SteadyForward, "_advance", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.generate(PROMPTS, sampling=SAMPLING)
    assert calls[-1]._step is None
    assert [c.token_ids for c in engine.generate(PROMPTS, sampling=SAMPLING)] == one_at_a_time
