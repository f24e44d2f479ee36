"""Training against a server while one of the two is killed: a retry that changes nothing, or a clear error."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext

import pytest
import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.generation.vllm_client import VLLMClient

from osd.engine import transport
from osd.engine.remote import RemoteEngine, ServerLost
from osd.engine.wire import STATE_ROUTE, WEIGHTS_ROUTE
from tests.exact import completion_logits
from tests.launched import GREEDY
from tests.launches import ACCELERATE, launch
from tests.served import Client, running, serve, served
from tests.tiny import tiny_engine_kwargs
from tests.training import build_trainer, logged, watch

pytestmark = pytest.mark.slow

KEY = "secret"
RUNNING = {"async_generation": True, "async_weight_updates": "running", "max_staleness": 2}
WEIGHTS = ("--api-key", KEY, "--weight-transfer-config", '{"backend": "http"}')


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)


@pytest.fixture(scope="module")
def server(tiny_pair, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with served(*tiny_pair, log, *WEIGHTS) as client:
        yield client


@pytest.fixture
def mortal(tiny_pair, tmp_path):
    """A server that can be killed and started again on its port: `servers[-1]` is the one that runs, `again()` replaces it."""
    servers = [serve(*tiny_pair, tmp_path / "serve.log", *WEIGHTS)]
    servers[0].wait()
    changing, over = threading.Lock(), threading.Event()

    def again():
        with changing:
            servers[-1].kill()
            if not over.is_set():
                port = int(servers[0].url.rpartition(":")[2])
                servers.append(serve(*tiny_pair, tmp_path / "serve.log", *WEIGHTS, port=port))

    yield servers, again
    with changing:  # a thread of the test may still be in `again`
        over.set()
        servers[-1].kill()


def trainer_of(tiny_pair, out, url=None, **fields):
    if url is None:
        fields["engine_kwargs"] = tiny_engine_kwargs(seed=5)
    else:
        fields = {"vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": 120.0, **fields}
    return build_trainer(None, tiny_pair[1], out, teacher_model_name_or_path=str(tiny_pair[0]), seed=5, **fields)


def run(trainer):
    sampled = []
    with trainer:
        watch(trainer, lambda _: sampled.append([c.token_ids for c in trainer.vllm_generation.last_batch.completions]))
        trainer.train()
    return logged(trainer, "loss"), sampled


def state(server):
    return server.http.get(STATE_ROUTE).json()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def between_parts(trainer, kill, monkeypatch):
    """Call `kill` between two parts of the weights of the third step's sync."""
    check, parts = transport.check, []

    def counted(answer):
        check(answer)
        if trainer.state.global_step == 2:
            parts.append(answer)
            if len(parts) == 3:
                kill()

    monkeypatch.setattr(transport, "PART_BYTES", 1)
    monkeypatch.setattr(transport, "check", counted)


# -- the server is killed -----------------------------------------------------------------------------------------------


def test_a_server_killed_in_mid_step_and_in_mid_sync_changes_nothing(tiny_pair, tmp_path, mortal, monkeypatch):
    """It is killed while it samples the second step's batch, and between two parts of the third step's weights."""
    servers, again = mortal
    fields = {"max_completion_length": 120, "max_steps": 4}
    undisturbed = run(trainer_of(tiny_pair, tmp_path, servers[0].url, **fields))
    losses, kills = [], []
    trainer = trainer_of(tiny_pair, tmp_path, servers[0].url, **fields)
    engine = trainer.vllm_generation.engine
    finish, ask = engine.finish, engine._ask_once

    def watched(batch):
        try:
            return finish(batch)
        except ServerLost:
            losses.append((len(batch.completions), len(batch.prompts)))
            raise

    def killed_in_step(batch):
        if trainer.state.global_step == 1 and not kills:
            kills.append(threading.Timer(0.1, again))
            kills[0].start()
        ask(batch)

    engine.finish, engine._ask_once = watched, killed_in_step
    between_parts(trainer, again, monkeypatch)
    assert run(trainer) == undisturbed
    assert len(servers) == 3
    assert losses, "no kill hit a batch that was being sampled: nothing was tested"


def trained_while_killed(trainer, again, monkeypatch, place="sample"):
    """Train, and kill the server at the first completion that comes in the background, or in the sync of the third step.

    Returns:
        the student's weights at every step, the batches with their prompts, and in `hit[0]` how many completions of each
        batch in the background had come when the server was killed.
    """
    take, weights, batches, hit = RemoteEngine._take, [], [], []
    engine = trainer.vllm_generation.engine

    def kill():
        hit.append([len(b.completions) for b in engine._ahead])
        again()

    def kill_at_first(engine, batch, *given):
        take(engine, batch, *given)
        if threading.current_thread() is not threading.main_thread() and not hit:
            kill()

    if place == "sample":
        monkeypatch.setattr(RemoteEngine, "_take", kill_at_first)
    else:
        between_parts(trainer, kill, monkeypatch)
    trainer.add_callback(EachStep(lambda: weights.append(copy.deepcopy(trainer.model).eval())))
    with trainer:
        watch(trainer, lambda prompts: batches.append((prompts, trainer.vllm_generation.last_batch)))
        trainer.train()
    return weights, batches, hit


def test_a_server_killed_with_a_batch_in_flight_costs_no_completion(tiny_pair, tmp_path, mortal, monkeypatch):
    """Completions that had come are kept, from the older weights; the rest comes from the present ones, as records say."""
    servers, again = mortal
    fields = {"max_completion_length": 120, "max_steps": 4, "async_generation": True}
    trainer = trainer_of(tiny_pair, tmp_path, servers[0].url, **fields)
    weights, batches, _ = trained_while_killed(trainer, again, monkeypatch)
    assert len(servers) == 2
    assert set(batches[1][1].staleness) == {0, 1}, "the kill hit a whole batch: nothing was tested"
    assert [set(batch.staleness) for _, batch in batches] == [{0}, {0, 1}, {1}, {1}]
    for step, (prompts, batch) in enumerate(batches):
        for prompt, completion, age in zip(prompts, batch.completions, batch.staleness, strict=True):
            logp_TV = completion_logits(weights[step - age], prompt, completion.token_ids).log_softmax(-1)
            logp_T = logp_TV.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.as_tensor(completion.record.logp_theta).double(), logp_T, atol=1e-3, rtol=0)


@pytest.mark.parametrize("place", ["sample", "sync"])
def test_a_server_killed_under_running_batches_costs_no_completion(tiny_pair, tmp_path, mortal, monkeypatch, place):
    """Two batches are in flight; both go on after the next sync, and every token is of the weights that its age names."""
    servers, again = mortal
    fields = {"max_completion_length": 120, "generation_kwargs": {"ignore_eos": True}, "max_steps": 4}
    trainer = trainer_of(tiny_pair, tmp_path, servers[0].url, **fields, **RUNNING)
    begun, begin = [], trainer.vllm_generation.begin
    trainer.vllm_generation.begin = lambda prompts, *args, **kwargs: (begun.append(prompts), begin(prompts, *args, **kwargs))
    weights, batches, hit = trained_while_killed(trainer, again, monkeypatch, place)
    assert len(servers) == 2
    assert len(hit) == 1
    assert min(hit[0]) < 4, "the kill hit no batch that was being sampled: nothing was tested"
    assert [prompts for prompts, _ in batches[1:]] == begun, "a prompt was lost, or repeated"
    for step, (prompts, batch) in enumerate(batches):
        assert len(batch.completions) == 4
        assert max(batch.staleness) <= 2
        for prompt, completion, age_T in zip(prompts, batch.completions, batch.staleness_T, strict=True):
            token = torch.tensor(completion.token_ids)[:, None]
            logp_AT = [
                completion_logits(w, prompt, completion.token_ids).log_softmax(-1).gather(-1, token)[:, 0] for w in weights
            ]
            logp_T = torch.stack(logp_AT)[step - age_T, torch.arange(len(token))]
            torch.testing.assert_close(torch.as_tensor(completion.record.logp_theta).double(), logp_T, atol=1e-3, rtol=0)


class EachStep(TrainerCallback):
    def __init__(self, call):
        self.call = call

    def on_step_begin(self, args, state, control, **kwargs):
        self.call()


def test_a_server_that_stays_away_ends_the_run(tiny_pair, tmp_path, mortal):
    servers, _ = mortal
    trainer = trainer_of(tiny_pair, tmp_path, servers[0].url, vllm_server_timeout=5.0)
    watch(trainer, lambda _: servers[0].kill())
    begun = time.monotonic()
    with trainer, pytest.raises(RuntimeError, match=r"no `osd serve` has answered at .* for 5 seconds"):
        trainer.train()
    assert time.monotonic() - begun < 60


def test_a_server_that_hangs_ends_the_run(tiny_pair, tmp_path, mortal):
    """SIGSTOP: its connections stay open, and nothing comes."""
    servers, _ = mortal
    trainer = trainer_of(tiny_pair, tmp_path, servers[0].url, vllm_server_timeout=3.0)
    watch(trainer, lambda _: os.killpg(servers[0].process.pid, signal.SIGSTOP))
    begun = time.monotonic()
    try:
        with trainer, pytest.raises(RuntimeError, match=r"no `osd serve` has answered|has not finished a completion"):
            trainer.train()
    finally:
        os.killpg(servers[0].process.pid, signal.SIGCONT)
    assert time.monotonic() - begun < 90


# -- the trainer is killed ----------------------------------------------------------------------------------------------


def process(tiny_pair, out, url, **environment):
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.launched", "served", str(out), *map(str, tiny_pair)]
    return subprocess.run(
        command, env={**os.environ, "OSD_TEST_URL": url, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("place", ["sync", "running sync", "sample"])
def test_a_trainer_that_is_killed_leaves_a_server_for_the_next(tiny_pair, tmp_path, server, place):
    """In a sync under running requests, those of the trainer and of others have been paused, and end with it."""
    url, others = server.server.url, []
    given = {"OSD_TEST_FIELDS": json.dumps({**RUNNING, "max_completion_length": 120})} if "running" in place else {}

    def ask():
        wait_for(lambda: running(server) >= 4, 120)
        while not others or others[-1] == 200:
            body = {"prompt": [7, 8], "max_tokens": 120, "ignore_eos": True}
            others.append(Client(server.server).post("/v1/completions", body).status_code)

    client = threading.Thread(target=ask)
    if given:
        client.start()
    died = process(tiny_pair, tmp_path / "died", url, OSD_TEST_DIES=place, **given)
    if given:
        client.join(30)
        assert others[-1] == 503
    assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
    wait_for(lambda: state(server)["trainer"] is None)
    assert state(server)["whole"] == (place == "sample")
    if place != "sample":
        assert server.refused({"prompt": [7, 8], "max_tokens": 2})[0] == 503
    else:
        wait_for(lambda: not running(server))
    next_one = process(tiny_pair, tmp_path / "next", url)
    assert next_one.returncode == 0, next_one.stderr[-3000:]
    here = run(trainer_of(tiny_pair, tmp_path, **GREEDY))
    seen = json.loads((tmp_path / "next" / "0.json").read_text())
    assert seen["sampled"] == here[1]
    assert seen["loss"] == pytest.approx(here[0], rel=1e-5)


def test_a_trainer_killed_under_running_batches_goes_on_from_its_checkpoint(tiny_pair, tmp_path, server):
    """In mid-step, with batches in flight; another process resumes, and no prompt is lost or repeated."""
    fields = {**RUNNING, "max_completion_length": 120, "generation_kwargs": {"ignore_eos": True}}
    fields |= {"per_device_train_batch_size": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    given = {"OSD_TEST_FIELDS": json.dumps(fields)}
    url, out = server.server.url, tmp_path / "run"
    died = process(tiny_pair, out, url, OSD_TEST_DIES="step", **given)
    assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
    assert re.search("[12] batches in flight", died.stdout), "nothing was tested"
    wait_for(lambda: state(server)["trainer"] is None and not running(server))
    resumed = process(tiny_pair, out, url, OSD_TEST_RESUME="last", **given)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    whole = process(tiny_pair, tmp_path / "whole", url, **given)
    assert whole.returncode == 0, whole.stderr[-3000:]
    steps, again = (torch.load(folder / "0.pt") for folder in (tmp_path / "whole", out))
    assert [step["prompts"] for step in again] == [step["prompts"] for step in steps[3:]]
    assert [len(ids) for step in again for ids, _ in step["rows"]] == [120] * 6
    assert all(age_T.eq(0).all() for age_T in again[0]["ages"]), "the first batch is of the present weights"


def test_a_second_training_process_ends_in_one_line_and_the_first_goes_on(tiny_pair, tmp_path, server):
    with trainer_of(tiny_pair, tmp_path, server.server.url, **GREEDY) as first:
        first.vllm_generation.sync_weights()
        second = process(tiny_pair, tmp_path / "second", server.server.url)
        assert second.returncode == 1
        assert "another trainer (" in second.stderr.splitlines()[-1], second.stderr[-3000:]
        first.train()
    assert len(logged(first, "loss")) == 3
    wait_for(lambda: state(server)["trainer"] is None)


# -- several processes --------------------------------------------------------------------------------------------------


@contextmanager
def killed_after_two_updates(server, again):
    """Kill the server and start it again, once, when the student has been updated twice from here on."""
    killing, client = threading.Event(), Client(server)
    before = client.http.get(STATE_ROUTE).json()["version"]

    def kill_once():
        while not killing.is_set():
            if client.http.get(STATE_ROUTE).json()["version"] >= before + 2:
                again()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill_once)
    thread.start()
    try:
        yield
    finally:
        killing.set()
        thread.join()


def two_processes(tiny_pair, out):
    """Return the observations of each of two processes in a greedy run."""
    result = launch(ACCELERATE / "cpu_ddp.yaml", "-m", "tests.launched", "served", out, *tiny_pair)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_train_as_one_also_while_the_server_is_killed(tiny_pair, tmp_path, mortal, monkeypatch):
    servers, again = mortal
    monkeypatch.setenv("OSD_TEST_URL", servers[0].url)
    with killed_after_two_updates(servers[0], again):
        seen = two_processes(tiny_pair, tmp_path)
    assert len(servers) == 2
    assert_one_run(seen, run(trainer_of(tiny_pair, tmp_path, **GREEDY)))


def assert_one_run(seen, here):
    """Two processes saw what one did, each a half of it."""
    assert seen[0]["loss"] == seen[1]["loss"] == pytest.approx(here[0], rel=1e-4)
    for step, completions in enumerate(here[1]):
        both = sorted(ids for rank in seen for ids in rank["sampled"][step])
        assert both == sorted(completions)


def test_two_processes_sample_ahead_as_one(tiny_pair, tmp_path, mortal, monkeypatch):
    """First undisturbed; then the server is killed, and both go on."""
    servers, again = mortal
    monkeypatch.setenv("OSD_TEST_URL", servers[0].url)
    fields = {"async_generation": True, "max_steps": 4}
    monkeypatch.setenv("OSD_TEST_FIELDS", json.dumps(fields))
    seen = two_processes(tiny_pair, tmp_path)
    assert seen[0]["staleness"] == [0, 1, 1, 1]
    assert_one_run(seen, run(trainer_of(tiny_pair, tmp_path, servers[0].url, **{**GREEDY, **fields})))
    with killed_after_two_updates(servers[0], again):
        seen = two_processes(tiny_pair, tmp_path)
    assert len(servers) == 2
    assert seen[0]["staleness"] == seen[1]["staleness"]
    assert all(0 <= age <= 1 for age in seen[0]["staleness"])
    assert [len(step) for rank in seen for step in rank["sampled"]] == [2] * 8


def test_two_processes_have_running_batches(tiny_pair, tmp_path, mortal, monkeypatch):
    """Undisturbed, and while the server is killed."""
    servers, again = mortal
    monkeypatch.setenv("OSD_TEST_URL", servers[0].url)
    monkeypatch.setenv("OSD_TEST_FIELDS", json.dumps({**RUNNING, "max_steps": 5, "max_completion_length": 60}))
    for killed in (False, True):
        with killed_after_two_updates(servers[0], again) if killed else nullcontext():
            seen = two_processes(tiny_pair, tmp_path)
        assert len(servers) == 1 + killed
        assert seen[0]["loss"] == seen[1]["loss"]
        assert seen[0]["staleness"] == seen[1]["staleness"]
        assert all(0 <= age <= 2 for age in seen[0]["staleness"])
        assert [len(step) for rank in seen for step in rank["sampled"]] == [2] * 10


@pytest.mark.parametrize(
    ("place", "message"), [("step of rank 1", "SIGKILL"), ("sample of rank 1", r"process 1 failed \(KeyError: 'planted'\)")]
)
def test_one_of_two_processes_that_fails_ends_the_run_and_frees_the_server(
    tiny_pair, tmp_path, server, monkeypatch, place, message
):
    """Under running requests, those of the other process end too."""
    monkeypatch.setenv("OSD_TEST_URL", server.server.url)
    monkeypatch.setenv("OSD_TEST_DIES", place)
    monkeypatch.setenv("OSD_TEST_FIELDS", json.dumps({**RUNNING, "max_steps": 8, "max_completion_length": 120}))
    begun = time.monotonic()
    result = launch(ACCELERATE / "cpu_ddp.yaml", "-m", "tests.launched", "served", tmp_path, *tiny_pair)
    assert result.returncode != 0
    assert re.search(message, result.stderr), result.stderr[-4000:]
    assert "terminate called" not in result.stderr
    assert time.monotonic() - begun < 120, "a process waited for the one that failed"
    wait_for(lambda: state(server)["trainer"] is None and not running(server))


# -- TRL's own client ---------------------------------------------------------------------------------------------------


def test_trls_client_works_against_the_server(tiny_pair, tmp_path, monkeypatch):
    """All of it but the tensors, which it sends by NCCL alone: here they go by our route, between its calls."""
    monkeypatch.delenv("VLLM_API_KEY")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    flags = ("--weight-transfer-config", '{"backend": "http"}', "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1")
    with served(*tiny_pair, tmp_path / "log", *flags) as server:
        client = VLLMClient(base_url=server.server.url)
        assert client.get_server_info()["weight_transfer_config"]["backend"] == "http"
        assert client.get_world_size() == 1
        before = client.generate([[7, 8]], max_tokens=8, temperature=0.0)
        with client.weight_update():
            other = AutoModelForCausalLM.from_pretrained(tiny_pair[0])
            tensors = {name: parameter.detach() for name, parameter in other.named_parameters()}
            assert server.http.post(WEIGHTS_ROUTE, content=save(tensors)).status_code == 200
        client.reset_prefix_cache()
        after = client.generate([[7, 8]], max_tokens=8, temperature=0.0)
        assert before["completion_ids"] != after["completion_ids"], "the student is now a copy of the teacher"
