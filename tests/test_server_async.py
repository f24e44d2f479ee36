"""Sampling while training: `async_generation` against a server.

Runs are greedy where they are compared: then completions depend on prompts and weights alone.
"""

from __future__ import annotations

import copy
import threading
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.state import GradientState
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

import osd.engine.remote
import osd.train.lookahead
import osd.train.trainer
from osd.core import MixingConfig
from osd.engine.remote import RemoteEngine
from osd.engine.transport import HTTPTransport
from osd.engine.wire import STATE_ROUTE
from osd.train import OSDConfig
from osd.train.lookahead import Lookahead, SampledAhead, warn_without_overlap
from tests.exact import completion_logits, mixture
from tests.served import KEY, free_port, running, served
from tests.training import ROWS, build_trainer, logged, watch

GREEDY = {"generation_kwargs": {"temperature": 0.0}, "optim": "sgd", "learning_rate": 0.1}
AHEAD = {"async_generation": True}
SECONDS = 120  # that a test waits for an event before it fails


@pytest.fixture
def make(tiny_pair, server, tmp_path, monkeypatch):
    """Makes trainers against the server, which let it go at the end."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    made = []

    def make(**fields):
        for trainer in made:
            trainer.close()
        made.append(against(server, tiny_pair, tmp_path, **fields))
        return made[-1]

    yield make
    for trainer in made:
        trainer.close()
    wait_for(lambda: server.http.get(STATE_ROUTE).json()["trainer"] is None)


def against(server, tiny_pair, out, **fields):
    """A trainer against a server."""
    fields = {"vllm_server_base_url": server.server.url, "seed": 5, **fields}
    teacher = {"vllm_mode": "server", "teacher_model_name_or_path": str(tiny_pair[0])}
    return build_trainer(None, tiny_pair[1], out, **teacher, **fields)


def wait_for(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Each(TrainerCallback):
    """Calls a function at one of the trainer's events."""

    def __init__(self, event, call):
        setattr(self, event, lambda args, state, control, **kwargs: call(state.global_step))


def batches_of(trainer):
    """The batches of every `generate` call, when the trainer has run."""
    batches = []
    watch(trainer, lambda prompts: batches.append((prompts, trainer.vllm_generation.last_batch)))
    return batches


def tokens(batches):
    return [[c.token_ids for c in batch.completions] for _, batch in batches]


def no_thread_is_left():
    return not [thread for thread in threading.enumerate() if thread.name == "osd-batch"]


# -- the overlap --------------------------------------------------------------------------------------------------------


def test_the_server_samples_the_next_batch_inside_the_step(make):
    """By events: the server is asked only when the step is at its optimizer, which waits for the server's first answer."""
    trainer = make(**AHEAD)
    engine, seen, inside = trainer.vllm_generation.engine, [], threading.Event()
    ask_once = engine._ask_once

    def ask_inside(batch):
        if threading.current_thread() is not threading.main_thread():
            assert inside.wait(SECONDS), "training waits for the batch in the background"
        ask_once(batch)

    def wait_for_a_completion(step):
        batch = next(iter(engine._ahead), None)
        if batch is not None:
            inside.set()
            wait_for(lambda: batch.completions)
            inside.clear()
        seen.append(batch is not None)

    engine._ask_once = ask_inside
    trainer.add_callback(Each("on_pre_optimizer_step", wait_for_a_completion))
    trainer.train()
    assert seen == [True, True, False], "after the last step nothing is sampled"
    assert logged(trainer, "osd/engine/staleness") == [0, 1, 1]
    assert no_thread_is_left()


def test_every_batch_is_drawn_from_the_weights_of_the_step_before(make):
    """In two epochs of four steps. log π_θ of the records, against transformers at the weights of each step."""
    trainer = make(**AHEAD, max_steps=6, importance_correction="token")
    weights, batches = [], batches_of(trainer)
    trainer.add_callback(Each("on_step_begin", lambda _: weights.append(copy.deepcopy(trainer.model).eval())))
    trainer.train()
    staleness = [0, 1, 1, 1, 0, 1]  # the first step of an epoch waits
    assert logged(trainer, "osd/engine/staleness") == staleness
    for step, (prompts, batch) in enumerate(batches):
        assert batch.staleness == [staleness[step]] * 4
        gaps = {at: gap(weights[at], prompts, batch.completions) for at in (step, max(step - 1, 0))}
        assert gaps[step - staleness[step]] < 1e-3
        assert staleness[step] == 0 or gaps[step] > 0.05, "the weights did not move: nothing was tested"


def gap(model, prompts, completions):
    """The largest distance of the recorded log π_θ from a model's, in nats."""
    found = [
        (logp_of(model, prompt, c.token_ids) - torch.as_tensor(c.record.logp_theta)).abs().max().item()
        for prompt, c in zip(prompts, completions, strict=True)
    ]
    return max(found)


def logp_of(model, prompt, token_ids):
    logp_TV = completion_logits(model, prompt, token_ids).log_softmax(-1)
    return logp_TV.gather(-1, torch.tensor(token_ids)[:, None])[:, 0]


# -- what it trains -----------------------------------------------------------------------------------------------------


@contextmanager
def weights_of(model, state):
    """The model with other weights."""
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.load_state_dict(state, strict=False)
    try:
        yield
    finally:
        model.load_state_dict(own, strict=False)


def emulated(trainer, lag):
    """Make a synchronous trainer sample step n from the weights of step n - lag[n]."""
    generation, past, sync = trainer.vllm_generation, {}, trainer.vllm_generation.sync_weights

    def late():
        step = trainer.state.global_step
        past[step] = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        with weights_of(trainer.model, past[step - lag[step]]):
            sync()

    generation.sync_weights = late
    return trainer


SETUPS = {
    "plain": ({"max_steps": 6}, {0: 0, 1: 1, 2: 1, 3: 1, 4: 0, 5: 1}),
    "scheduled, mixed in part, accumulated, with the privilege's gap": (
        {
            "alpha_method": "fixed",
            "fixed_alpha": 0.8,
            "alpha_schedule": "linear",
            "fixed_alpha_end": 0.1,
            "mix_fraction": 0.6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "privilege_gap_steps": 1,
            "privilege_gap_tokens": 3,
        },
        {0: 0, 1: 1, 2: 1},
    ),
    "two iterations": ({"num_iterations": 2, "max_staleness": 2, "max_steps": 6}, {0: 0, 2: 2, 4: 2}),
}


@pytest.mark.parametrize("name", SETUPS)
def test_a_run_is_a_synchronous_one_whose_syncs_come_late(make, name):
    fields, lag = SETUPS[name]
    ahead = make(**AHEAD, **GREEDY, **fields)
    ours = batches_of(ahead)
    ahead.train()
    late = emulated(make(**GREEDY, **{**fields, "max_staleness": 1}), lag)
    theirs = batches_of(late)
    late.train()
    assert tokens(ours) == tokens(theirs)
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        for a, b in zip(one.completions, other.completions, strict=True):
            torch.testing.assert_close(a.record.values_TR, b.record.values_TR, atol=1e-4, rtol=1e-4)
    for metric in ("loss", "osd/schedule/fixed_alpha", "osd/privilege/gap"):
        assert logged(ahead, metric) == pytest.approx(logged(late, metric), rel=1e-4, abs=1e-5), metric
    assert [batch.staleness[0] for _, batch in ours] == list(lag.values())
    if "mix_fraction" in fields:
        alphas = {round(float(c.record.alpha[0]), 4) for _, batch in ours for c in batch.completions}
        assert len(alphas) == 4, "three steps of the schedule, and the completions that are not mixed"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU for the trainer and one for the server")
def test_two_gpus_sample_and_train_at_once(tiny_pair, models, tmp_path, monkeypatch):
    """Weights go by NCCL between the batches; the run is that of late syncs, token by token. Then under running requests."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # of the server; this process has its devices by now
    flags = ("--api-key", KEY, "--weight-transfer-config", '{"backend": "nccl"}')
    with served(*tiny_pair, tmp_path / "serve.log", *flags) as server:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        port = {"vllm_group_port": free_port()}
        with against(server, tiny_pair, tmp_path, **AHEAD, **GREEDY, **port) as ahead:
            ours = batches_of(ahead)
            ahead.train()
        with emulated(against(server, tiny_pair, tmp_path, **GREEDY, **port), {0: 0, 1: 1, 2: 1}) as late:
            theirs = batches_of(late)
            late.train()
        with against(server, tiny_pair, tmp_path, **RUNNING, **port) as trainer:
            check_running_requests(trainer.vllm_generation, models, server)
    assert tokens(ours) == tokens(theirs)
    assert logged(ahead, "loss") == pytest.approx(logged(late, "loss"), rel=1e-3)


def test_evaluation_waits_for_the_batch_in_flight_and_keeps_it(make):
    fields = {**AHEAD, **GREEDY, "max_steps": 4}
    plain = make(**fields)
    alone = batches_of(plain)
    plain.train()
    evaluated = make(**fields, eval_strategy="steps", eval_steps=1, eval_dataset=Dataset.from_list(ROWS[:3]))
    asked, sampled = [], batches_of(evaluated)
    engine = evaluated.vllm_generation.engine
    ask_once = engine._ask_once
    engine._ask_once = lambda batch: (asked.append(len(batch.prompts) - len(batch.completions)), ask_once(batch))
    evaluated.train()
    assert [batch for batch in tokens(sampled) if len(batch) == 4] == tokens(alone)
    assert logged(evaluated, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert logged(evaluated, "osd/engine/staleness") == [0, 1, 1, 1]
    assert logged(evaluated, "eval_osd/engine/staleness") == [0] * 4
    assert asked.count(4) == 4, "each batch was asked for once, and whole"


def test_a_resumed_run_samples_its_first_batch_anew(make, tmp_path):
    fields = {**AHEAD, **GREEDY, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(**fields)
    batches = batches_of(whole)
    whole.train()
    resumed = make(**fields)
    again = batches_of(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "osd/engine/staleness") == [0, 1, 0, 1], "the log of the first two steps comes with the checkpoint"
    assert [prompts for prompts, _ in again] == [prompts for prompts, _ in batches[2:]]
    assert logged(resumed, "osd/engine/weights_version") == logged(whole, "osd/engine/weights_version")


# -- importance weights -------------------------------------------------------------------------------------------------


def weights_and_expectations(trainer, monkeypatch):
    """Of every token: the weight that training gave it, and the one by transformers and the recorded log q."""
    pairs, weigh = [], osd.train.trainer.weigh

    def watched(trainer, hidden, student, teacher, inputs):
        weight_BT, result = weigh(trainer, hidden, student, teacher, inputs)
        model = copy.deepcopy(trainer.model).eval()
        for row in range(len(weight_BT)):
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row] != 0].tolist()
            kept = inputs["loss_mask"][row] != 0
            drawn = inputs["completion_ids"][row][kept].tolist()
            logp_q = by_tokens[tuple(prompt), tuple(drawn)]
            log_ratio = logp_of(model, prompt, drawn) - logp_q
            pairs.append((weight_BT[row][kept].double(), (log_ratio.cumsum(0) - log_ratio).exp()))
        return weight_BT, result

    by_tokens = {}

    def keep(prompts):
        for prompt, c in zip(prompts, trainer.vllm_generation.last_batch.completions, strict=True):
            by_tokens[tuple(prompt), tuple(c.token_ids)] = torch.as_tensor(c.record.logp_draw).double()

    watch(trainer, keep)
    monkeypatch.setattr(osd.train.trainer, "weigh", watched)
    trainer.train()
    return (torch.cat(side) for side in zip(*pairs, strict=True))


CORRECTED = {"importance_correction": "prefix", "importance_clip": None, "learning_rate": 2e-3, "max_steps": 4}


@pytest.mark.parametrize("iterations", [1, 2])
def test_weights_of_stale_tokens_are_the_present_student_over_the_recorded_draw(make, monkeypatch, iterations):
    trainer = make(**AHEAD, **CORRECTED, num_iterations=iterations, max_staleness=iterations)
    weights, expected = weights_and_expectations(trainer, monkeypatch)
    torch.testing.assert_close(weights.log(), expected.log(), atol=2e-3, rtol=0)
    assert logged(trainer, "osd/engine/staleness")[-1] == iterations


def test_weights_by_the_recorded_student_would_be_found(make, monkeypatch):
    """The planted error: log π_θ at sampling in the place of the present one."""
    weigh = osd.train.trainer.weigh

    def as_if_fresh(trainer, hidden, student, teacher, inputs):
        return weigh(trainer, hidden, student, teacher, {**inputs, "is_stale": torch.zeros_like(inputs["is_stale"])})

    monkeypatch.setattr(osd.train.trainer, "weigh", as_if_fresh)
    weights, expected = weights_and_expectations(make(**AHEAD, **CORRECTED), monkeypatch)
    assert (weights.log() - expected.log()).abs().max() > 0.1


# -- weights under running requests -------------------------------------------------------------------------------------

LONG = {"max_completion_length": 120, "generation_kwargs": {"ignore_eos": True}}
RUNNING = {**AHEAD, **LONG, "async_weight_updates": "running", "max_staleness": 2}


def drawn(server):
    """Tokens that the server has drawn since it started."""
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:generation_tokens_total{"))


def wait_for_tokens(server, count):
    """Wait until the running requests have drawn so many more tokens together, or have ended."""
    before = drawn(server)
    wait_for(lambda: drawn(server) >= before + count or not running(server))


def perturb(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)


def test_tokens_of_running_requests_are_of_the_version_that_their_record_names(make, models, server):
    check_running_requests(make(**RUNNING).vllm_generation, models, server)


def check_running_requests(generation, models, server):
    """Two batches, two updates and a change of the mixing, all under their requests: a row is the distribution of its draw."""
    generation.check_sync = False  # which takes the time of some tokens
    generation.sync_weights()
    students, versions = [copy.deepcopy(generation.model).eval().cpu()], [generation.engine.weights_version]
    student_prompts, teacher_prompts = [[7, 8, n] for n in range(9, 13)], [[50, 7, 8, n, 51] for n in range(9, 13)]
    for alpha in (0.7, 0.2):
        generation.begin(student_prompts, teacher_prompts, mixing=MixingConfig(alpha_method="fixed", fixed_alpha=alpha))
        wait_for(lambda: running(server))
    for updates in (1, 2):
        perturb(generation.model, updates)
        generation.updates = updates
        wait_for_tokens(server, 10)
        generation.sync_weights()
        assert not generation.engine._ahead[1].is_whole, "the sync waited for a batch"
        students.append(copy.deepcopy(generation.model).eval().cpu())
        versions.append(generation.engine.weights_version)
    batches = []
    for _ in range(2):
        with generation.teacher_reads(teacher_prompts, begun=True):
            generation.generate(student_prompts, None, 1)
        batches.append(generation.last_batch)
    ages, alphas = set(), set()
    for batch in batches:
        assert batch.staleness == [max(age_T.tolist()) for age_T in batch.staleness_T]
        for *prompts, c, age_T in zip(student_prompts, teacher_prompts, batch.completions, batch.staleness_T, strict=True):
            record, index = c.record, 2 - age_T
            versions_T = torch.full((120,), record.weights_version) if record.version_T is None else record.version_T
            assert torch.equal(versions_T, torch.tensor(versions)[index])
            assert len(c.token_ids) == len(record) == 120
            ls = torch.stack([completion_logits(student, prompts[0], c.token_ids) for student in students]).log_softmax(-1)
            ls = ls[index, torch.arange(120)]
            lt = completion_logits(models[0], prompts[1], c.token_ids).log_softmax(-1)
            alpha_T = torch.as_tensor(record.alpha).double()
            expected = {"logp_theta": ls, "logp_teacher": lt, "logq": mixture(ls, lt, alpha_T[:, None])}
            for name, logp_TV in expected.items():
                logp_T = logp_TV.gather(-1, torch.tensor(c.token_ids)[:, None])[:, 0]
                torch.testing.assert_close(torch.as_tensor(getattr(record, name)).double(), logp_T, atol=1e-3, rtol=0)
            ages.add(tuple(age_T.unique().tolist()))
            alphas |= {round(x, 3) for x in alpha_T.tolist()}
    assert (0, 1, 2) in ages, "no completion spans three versions: nothing was tested"
    assert alphas == {0.7, 0.2}


def under_running_requests(trainer, server):
    """Make every optimizer step wait until requests run and go on. Returns the batches in the background at each sync."""
    found, sync = [], trainer.vllm_generation.sync_weights

    def watched():
        batches = list(trainer.vllm_generation.engine._ahead)
        sync()
        found.append((len(batches), sum(not batch.is_whole for batch in batches)))

    def wait(step):
        batches = trainer.vllm_generation.engine._ahead
        wait_for(lambda: all(batch.is_whole for batch in batches) or running(server))
        wait_for_tokens(server, 20)

    trainer.vllm_generation.sync_weights = watched
    trainer.add_callback(Each("on_pre_optimizer_step", wait))
    return found


@pytest.mark.parametrize("iterations", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_run_on_over_the_syncs_of_a_run(make, server, iterations):
    """With evaluation in between. All completions are whole, and of weights that are not older than the bound."""
    fields = {"num_iterations": iterations, "max_staleness": 2 * iterations, "max_steps": 4 * iterations}
    evaluation = {"eval_strategy": "steps", "eval_steps": iterations, "eval_dataset": Dataset.from_list(ROWS[:3])}
    trainer = make(**{**RUNNING, **fields, **evaluation})
    weights, batches, found = {}, batches_of(trainer), under_running_requests(trainer, server)

    def keep(step):
        weights.setdefault(step, copy.deepcopy(trainer.model).eval())

    trainer.add_callback(Each("on_step_begin", keep))
    trainer.add_callback(Each("on_step_end", keep))
    asked, begin = [], trainer.vllm_generation.begin
    trainer.vllm_generation.begin = lambda prompts, *args, **kwargs: (asked.append(prompts), begin(prompts, *args, **kwargs))
    trainer.train()
    assert no_thread_is_left()
    training = [(prompts, batch) for prompts, batch in batches if len(batch.completions) == 4]
    assert [prompts for prompts, _ in training[1:]] == asked, "each batch was asked for once, in the order of its step"
    assert max(ahead for ahead, _ in found) == 2
    assert sum(unfinished > 0 for _, unfinished in found) >= 1, "the syncs waited: nothing was tested"
    spans = set()
    for step, (prompts, batch) in enumerate(training):
        assert max(batch.staleness) <= fields["max_staleness"]
        for prompt, c, age_T in zip(prompts, batch.completions, batch.staleness_T, strict=True):
            by_age = {age: logp_of(weights[step * iterations - age], prompt, c.token_ids) for age in set(age_T.tolist())}
            expected = torch.stack([by_age[age][t] for t, age in enumerate(age_T.tolist())])
            torch.testing.assert_close(torch.as_tensor(c.record.logp_theta).double(), expected, atol=1e-3, rtol=0)
            assert len(c.token_ids) == 120
            spans.add(len(by_age))
    assert spans >= {1, 2}
    mean_ages = [torch.cat(batch.staleness_T).double().mean().item() for _, batch in training]
    assert logged(trainer, "osd/engine/staleness") == pytest.approx(mean_ages)
    assert set(logged(trainer, "eval_osd/engine/staleness")) == {0.0}


def in_flight_at_saves(trainer, held):
    """The unfinished batches in the background at every checkpoint. Batches from number `held` on wait for the first one."""
    engine, saved, found, numbers, numbering = trainer.vllm_generation.engine, threading.Event(), [], {}, threading.Lock()
    take, begin, save = engine._take, engine.begin, trainer._save_checkpoint

    def numbered(*args, **kwargs):
        with numbering:
            batch = begin(*args, **kwargs)
            numbers[batch] = len(numbers) + 1
        return batch

    def late(batch, *args):
        with numbering:
            number = numbers.get(batch, 0)
        assert number < held or saved.wait(SECONDS)
        take(batch, *args)

    def saving(*args, **kwargs):
        save(*args, **kwargs)
        found.append(sum(not batch.is_whole for batch in engine._ahead))
        saved.set()

    engine.begin, engine._take, trainer._save_checkpoint = numbered, late, saving
    return found


def test_a_checkpoint_under_running_batches_is_resumed_without_a_lost_or_repeated_prompt(make, models, tmp_path):
    """After three of eight steps of an epoch; its end comes later."""
    fields = {**RUNNING, "max_steps": 10, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    whole = make(**fields)
    batches, found = batches_of(whole), in_flight_at_saves(whole, held=3)
    whole.train()
    assert found[0] == 2
    resumed = make(**fields)
    again = batches_of(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [prompts for prompts, _ in again] == [prompts for prompts, _ in batches[3:]]
    assert logged(resumed, "osd/engine/weights_version") == logged(whole, "osd/engine/weights_version")
    saved = type(models[1]).from_pretrained(tmp_path / "checkpoint-3").eval()
    prompts, first = again[0]
    assert first.staleness == [0] * 2
    assert gap(saved, prompts, first.completions) < 1e-3
    assert gap(models[1], prompts, first.completions) > 0.05, "the weights did not move: nothing was tested"


@pytest.mark.parametrize("rows", [16, 10, "a stream"])
def test_running_batches_end_with_their_epoch(make, server, rows):
    """Ten rows are two batches of four, and two rows that TRL leaves out."""
    count = 4 if rows != 10 else 2
    data = IterableDataset.from_generator(lambda: iter(ROWS)) if rows == "a stream" else ROWS[:rows]
    length = {"max_steps": 8} if rows == "a stream" else {"max_steps": -1, "num_train_epochs": 2}
    trainer = make(rows=data, **{**RUNNING, "max_completion_length": 60, **length})
    batches = batches_of(trainer)
    begun, begin = [], trainer.vllm_generation.begin
    trainer.vllm_generation.begin = lambda prompts, *args, **kwargs: (begun.append(prompts), begin(prompts, *args, **kwargs))
    trainer.train()
    prompts = [prompts for prompts, _ in batches]
    assert len(prompts) == 2 * count
    for epoch in (prompts[:count], prompts[count:]):
        assert len({tuple(prompt) for step in epoch for prompt in step}) == 4 * count, "a prompt came twice"
    assert begun == [*prompts[1:count], *prompts[count + 1 :]]
    assert batches[0][1].staleness == batches[count][1].staleness == [0] * 4
    assert {len(c.token_ids) for _, batch in batches for c in batch.completions} == {60}
    assert no_thread_is_left()


def test_running_batches_that_fill_the_queue_are_whole(make, server):
    """The server runs 16 requests and queues 12; a sync comes meanwhile."""
    generation, prompts = make(**RUNNING).vllm_generation, [[7, 8, n] for n in range(9, 33)]
    asked, ask_once = [], generation.engine._ask_once
    generation.engine._ask_once = lambda batch: (asked.append(len(batch.completions)), ask_once(batch))
    generation.sync_weights()
    for _ in range(2):
        generation.begin(prompts)
    wait_for(lambda: running(server))
    generation.updates = 1
    generation.sync_weights()
    for _ in range(2):
        with generation.teacher_reads(None, begun=True):
            generation.generate(prompts, None, 1)
        assert [len(c.token_ids) for c in generation.last_batch.completions] == [120] * 24
    assert len(asked) > 2, "the queue was never full: nothing was tested"


def test_without_batches_in_the_background_updates_come_between_requests(make):
    with pytest.warns(UserWarning, match="async_weight_updates='running' has no effect without async_generation"):
        trainer = make(async_weight_updates="running")
    assert not trainer.vllm_generation.engine.running


def test_importance_weights_of_a_completion_of_several_versions(make, server, monkeypatch):
    trainer = make(**{**CORRECTED, **RUNNING}, alpha_method="fixed", fixed_alpha=0.1)  # weights of float32's range
    under_running_requests(trainer, server)
    batches = batches_of(trainer)
    weights, expected = weights_and_expectations(trainer, monkeypatch)
    torch.testing.assert_close(weights.log(), expected.log(), atol=5e-3, rtol=0)
    spans = {len(age_T.unique()) for _, batch in batches for age_T in batch.staleness_T}
    assert max(spans) > 1, "no completion has tokens of several versions: nothing was tested"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_update_that_breaks_under_running_requests_ends_them(make, server, monkeypatch, error):
    """Those of the run and those of other clients; nobody is served until another update succeeds."""
    trainer = make(**RUNNING)
    generation, others = trainer.vllm_generation, []
    generation.sync_weights()
    generation.begin([[7, 8, 9]] * 4)
    body = {"prompt": [7, 8], "max_tokens": 120, "ignore_eos": True}
    ask = threading.Thread(target=lambda: others.append(server.refused(body)))
    ask.start()
    wait_for(lambda: running(server) == 5)

    def broken(self, named_tensors):
        send(self, [next(iter(named_tensors))])
        raise error("a planted error")

    send = HTTPTransport.send
    with monkeypatch.context() as planted:
        planted.setattr(HTTPTransport, "send", broken)
        with pytest.raises(error, match="a planted error"):
            generation.sync_weights()
    ask.join(SECONDS)
    assert [status for status, _ in others] == [503]
    assert server.refused({"prompt": [7, 8], "max_tokens": 2})[0] == 503
    wait_for(lambda: not running(server))
    with generation.teacher_reads(None, begun=True), pytest.raises(RuntimeError, match="call sync_weights"):
        generation.generate([[7, 8, 9]] * 4, None, 1)
    generation.sync_weights()
    with generation.teacher_reads(None, begun=True):
        generation.generate([[7, 8, 9]] * 4, None, 1)
    assert [len(c.token_ids) for c in generation.last_batch.completions] == [120] * 4
    assert server.complete([7, 8], max_tokens=2)


# -- what ends it -------------------------------------------------------------------------------------------------------


def test_an_error_in_the_background_ends_the_run(make, monkeypatch):
    trainer = make(**AHEAD)
    take = RemoteEngine._take

    def failing(self, batch, *given):
        if threading.current_thread() is not threading.main_thread():
            raise KeyError("a planted error")
        take(self, batch, *given)

    monkeypatch.setattr(RemoteEngine, "_take", failing)
    with pytest.raises(KeyError, match="a planted error"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert no_thread_is_left()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("fields", [{**AHEAD, **LONG}, RUNNING], ids=["between", "running"])
def test_a_run_that_is_interrupted_leaves_nothing_running(make, server, fields, error):
    trainer = make(**fields, max_steps=200)

    def interrupt(step):
        if running(server):  # or it has finished the batch already
            raise error("here")

    trainer.add_callback(Each("on_pre_optimizer_step", interrupt))
    with pytest.raises(error):
        trainer.train()
    assert no_thread_is_left()
    wait_for(lambda: not running(server))


def test_a_server_that_gives_nothing_but_signs_of_life_ends_the_run(make, monkeypatch):
    trainer = make(**AHEAD)
    trainer.vllm_generation.check_sync = False
    engine = trainer.vllm_generation.engine
    engine.pair = replace(engine.pair, timeout=0.3)
    monkeypatch.setattr(osd.engine.remote, "_whole_frames", lambda answer: (time.sleep(0.1) or b"" for _ in range(100)))
    with pytest.raises(RuntimeError, match=r"has not finished a completion for . seconds, and 4 of 4 are left"):
        trainer.train()


def test_samples_that_are_too_old_are_not_trained_on(make):
    trainer = make(**AHEAD)
    trainer.vllm_generation.max_staleness = 0
    with pytest.raises(RuntimeError, match="a token was drawn from weights of 1 optimizer updates ago, and max_staleness=0"):
        trainer.train()


def test_a_batch_is_taken_with_its_own_prompts(make):
    generation = make().vllm_generation
    with pytest.raises(RuntimeError, match=r"call sync_weights\(\) first"):
        generation.begin([[7, 8]])
    generation.sync_weights()
    generation.begin([[7, 8], [9]], [[10, 7, 8], [10, 9]])
    with generation.teacher_reads([[10, 7, 8], [10, 9]], begun=True):
        generation.generate([[7, 8], [9]], None, 1)
    for other in ([[7, 8]], [[7, 8], [10]]):
        generation.begin([[7, 8], [9]])
        with generation.teacher_reads(None, begun=True), pytest.raises(RuntimeError, match="begun with these prompts"):
            generation.generate(other, None, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vllm_mode": "colocate"}, "async_generation=True with vllm_mode='colocate': .* Start `osd serve`"),
        ({"max_staleness": 0}, "max_staleness=0 is out of range"),
        ({"num_iterations": 3, "max_staleness": 2}, "max_staleness=2 with async_generation and num_iterations=3"),
        ({"async_weight_updates": "under"}, "async_weight_updates='under' is unknown; use one of between, running"),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **AHEAD, **given)


def config(tmp_path, **given):
    given = {"vllm_mode": "server", **given}
    return OSDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **given)


def test_fields_without_effect_warn(tmp_path):
    with pytest.warns(UserWarning, match="max_staleness=2 has no effect without async_generation"):
        config(tmp_path, max_staleness=2)
    with pytest.warns(UserWarning, match="async_weight_updates='running' has no effect without async_generation"):
        config(tmp_path, async_weight_updates="running")
    with pytest.warns(UserWarning, match="async_generation=True without importance_correction trains on samples of older"):
        given = config(tmp_path, **AHEAD, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    with pytest.warns(UserWarning, match="async_generation=True has no effect: .* 15 rows are one batch of 8 completions"):
        warn_without_overlap(given, range(15))
    with warnings.catch_warnings(action="error"):
        warn_without_overlap(given, range(16))


# -- reading ahead ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1, 3, 9])
def test_reading_ahead_changes_neither_batches_nor_their_end(ahead):
    """accelerate's flag of the end is that of the batch in use, and its loader stays in its state."""
    loader = DataLoaderShard(list(range(7)), batch_size=2)
    state = GradientState()
    plain = [(batch.tolist(), state.end_of_dataloader) for batch in loader]
    reader, found = Lookahead(iter(loader), state), []
    while batches := reader.take(1):
        expected = [batch for batch, _ in plain[len(found) + 1 :]][ahead : ahead + 1]
        peeked = reader.peek(ahead)
        assert ([] if peeked is None else [peeked.tolist()]) == expected
        found.append((batches[0].tolist(), state.end_of_dataloader))
    assert found == plain
    assert state.active_dataloader is loader


@pytest.mark.parametrize(
    ("mode", "staleness", "iterations", "passes", "ahead"),
    [
        ("between", 5, 1, 2, 1),
        ("running", 1, 1, 1, 1),
        ("running", 3, 1, 2, 3),
        ("running", 5, 2, 2, 2),
        ("running", 6, 3, 1, 2),
    ],
)
def test_as_many_sampling_steps_are_ahead_as_the_bound_allows(monkeypatch, mode, staleness, iterations, passes, ahead):
    """Each begins once, with the rows and the mixing of its own step, and none after the last step or the end of the epoch."""
    begun, most = [], []
    monkeypatch.setattr(osd.train.lookahead, "unmixed", lambda *_, **__: None)
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            async_weight_updates=mode,
            max_staleness=staleness,
            num_iterations=iterations,
            gradient_accumulation_steps=passes,
            mix_fraction=1.0,
        ),
        state=SimpleNamespace(global_step=0, max_steps=6 * iterations),
        accelerator=SimpleNamespace(gradient_state=SimpleNamespace(active_dataloader=None)),
        vllm_generation=SimpleNamespace(begin=lambda prompts, _, alpha, mixing: begun.append((prompts, mixing))),
        _renderer=SimpleNamespace(student_ids=lambda p: p, student_prompt=lambda row: row, teacher_ids=lambda rows: rows),
        _schedule=SimpleNamespace(at=lambda step, _: step),
        _seed_of=str,
    )
    trainer.args.steps_ahead = lambda: OSDConfig.steps_ahead(trainer.args)
    sampled = SampledAhead(trainer)
    for _ in range(2):
        epoch = iter([[n] for n in range(4) for _ in range(passes * iterations)])
        for n in range(4 if trainer.state.global_step == 0 else 2):
            for _ in range(iterations):
                [rows, *_] = sampled.batches(epoch, passes)
                if trainer.state.global_step % iterations == 0:
                    assert rows == [n]
                    assert sampled.take(rows) == (n > 0)
                    sampled.begin()
                    most.append(len(sampled._rows))
                trainer.state.global_step += 1
    assert begun == [([n], iterations * step) for n, step in ((1, 1), (2, 2), (3, 3), (1, 5))]
    assert most[0] == ahead
