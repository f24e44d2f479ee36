"""`osd generate --server`: the same data as without, from servers that share the work, go away and come back.

The servers are processes that draw as `FakePair` does (tests/fake_server.py); tests/test_serve.py has the real one.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from osd import cli
from osd.data.generate import generate
from osd.data.remote import ServerPair
from tests.fake_pair import FakePair
from tests.generate_run import ROWS, config, flags, keys, read_output, rejected
from tests.served import Process, free_port


@pytest.fixture
def start(tmp_path):
    """Starts stand-in servers, and kills those that are left."""
    started = []

    def start(port=None, **options):
        port = port or free_port()
        log = tmp_path / f"server-{len(started)}.log"
        command = [sys.executable, "-m", "tests.fake_server", str(port), json.dumps(options)]
        started.append(Process(command, port, log))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def run(tmp_path, tiny_pair):
    """Settings of a run through servers."""

    def settings(*servers, out="out", **given):
        teacher, student = map(str, tiny_pair)
        given = {"server": ",".join(server.url for server in servers), "server_wait": 60.0, **given}
        models = {"teacher_model_name_or_path": teacher, "model_name_or_path": student}
        return config(tmp_path, output=str(tmp_path / out), **models, **given)

    return settings


def data(folder):
    """Everything that a run wrote about its samples and rejected rows, by sample."""
    samples = {(s["id"], s["sample"]): {name: repr(value) for name, value in s.items()} for s in read_output(folder)}
    assert len(samples) == len(read_output(folder)), "a sample was written twice"
    path = Path(folder) / "rejected.jsonl"
    return samples, path.read_text() if path.exists() else ""


def port_of(server):
    return int(server.url.rpartition(":")[2])


def served_by(log):
    return Path(log).read_text().split() if Path(log).exists() else []


# -- the same data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_the_data_is_that_of_an_engine_in_this_process(run, start, kind):
    server = start()
    server.wait()
    through, local = run(server, format=kind), run(out="local", format=kind, server=None)
    counts = generate(through, ServerPair), generate(local, FakePair)
    assert counts[0] == counts[1]
    assert data(through.output) == data(local.output)
    assert (Path(through.output) / "summary.json").read_text() == (Path(local.output) / "summary.json").read_text()
    made = [json.loads((Path(s.output) / "run.json").read_text()) for s in (through, local)]
    assert made[0]["settings"] == made[1]["settings"]
    assert "secret" not in (Path(through.output) / "run.json").read_text()


def test_servers_share_the_requests(run, start, tmp_path):
    logs = [tmp_path / name for name in ("a", "b")]
    servers = [start(log=str(log), seconds=seconds) for log, seconds in zip(logs, (0.01, 0.05), strict=True)]
    for server in servers:
        server.wait()
    settings = run(*servers, batch_size=100, shard_size=100, server_concurrency=2)
    generate(settings, ServerPair)
    shares = [served_by(log) for log in logs]
    assert sorted([*shares[0], *shares[1]]) == sorted(str(sample["seed"]) for sample in read_output(settings.output))
    assert len(shares[0]) > len(shares[1]) > 0, "the faster one does more"


# -- servers that go away -----------------------------------------------------------------------------------------------


def test_sigkill_of_every_server_in_turn_loses_and_repeats_nothing(run, start, tmp_path):
    """Two servers are killed in turn, also both at once, and come back on their ports."""
    local = run(out="local", server=None)
    generate(local, FakePair)
    log = tmp_path / "log"
    servers = [start(seconds=0.25, log=str(log)) for _ in range(2)]
    for server in servers:
        server.wait()
    settings = run(*servers, server_concurrency=3, batch_size=5)
    stop = threading.Event()

    def disturb():
        for turn in range(100):
            hit = [turn % 2] if turn % 3 else [0, 1]
            if stop.wait(0.3):
                return
            for i in hit:
                servers[i].kill()
            if stop.wait(0.2):
                return
            for i in hit:
                servers[i] = start(port_of(servers[i]), seconds=0.25, log=str(log))
                servers[i].wait()
            disturbed.append(hit)

    disturbed = []
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        generate(settings, ServerPair)
    finally:
        stop.set()
        thread.join()
    assert len(disturbed) >= 2
    assert data(settings.output) == data(local.output)
    assert max(Counter(served_by(log)).values()) > 1, "no kill hit a request that was being answered: nothing was tested"


def test_a_run_waits_for_its_first_server(run, start):
    port = free_port()
    late = threading.Timer(1.0, lambda: start(port))
    late.start()
    settings = run(server=f"http://127.0.0.1:{port}/v1/")
    generate(settings, ServerPair)
    assert len(read_output(settings.output)) == 2 * len(ROWS)


def test_without_any_server_the_run_ends_keeps_its_batches_and_resumes(run, start):
    server = start()
    server.wait()
    settings = run(server, server_wait=1.0, shard_size=10, batch_size=5)

    class Ending(ServerPair):
        calls = 0

        def sample(self, *args, **kwargs):
            Ending.calls += 1
            if Ending.calls == 4:
                server.kill()
            return super().sample(*args, **kwargs)

    began = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"no server has answered for \d+ seconds.*{server.url}"):
        generate(settings, Ending)
    assert time.monotonic() - began < 30
    written = keys(read_output(settings.output))
    assert len(written) == 15
    start(port_of(server)).wait()
    generate(run(server, resume=True, shard_size=10), ServerPair)
    local = run(out="local", server=None, shard_size=10)
    generate(local, FakePair)
    assert data(settings.output) == data(local.output)


def test_a_server_that_comes_back_as_another_pair_ends_the_run(run, start):
    server = start()
    server.wait()
    settings = run(server)

    class Replaced(ServerPair):
        def sample(self, *args, **kwargs):
            server.kill()
            start(port_of(server), mixing={"alpha_max": 0.5})
            return super().sample(*args, **kwargs)

    with pytest.raises(ValueError, match=r"not the pair that the others are: mixing is .*0\.5"):
        generate(settings, Replaced)
    assert read_output(settings.output) == []


def test_a_server_that_is_busy_or_answers_half_is_asked_again(run, start):
    answers = [[503, "{}"], [429, "{}"], [502, "<html>"], [200, '{"choices": ['], [200, '{"choices": [{"index": 0}]}']]
    server = start(answers=answers)
    server.wait()
    settings, local = run(server), run(out="local", server=None)
    generate(settings, ServerPair)
    generate(local, FakePair)
    assert data(settings.output) == data(local.output)


def test_a_request_that_a_server_cannot_sample_is_rejected_with_its_reason(run, start):
    local = run(out="local", server=None)
    generate(local, FakePair)
    failing = read_output(local.output)[3]
    server = start(failing=[failing["seed"]])
    server.wait()
    settings = run(server)
    counts = generate(settings, ServerPair)
    assert (counts.drawn, counts.rejected) == (2 * len(ROWS) - 1, 1)
    [entry] = rejected(settings.output)
    assert (entry["id"], entry["sample"], entry["reason"]) == (failing["id"], failing["sample"], "NaN in the student's logits")


def test_a_server_that_never_answers_ends_the_run(run, start):
    server = start(silent=True)
    server.wait()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no answer 3 times within server_timeout=0\.3 seconds"):
        generate(run(server, server_timeout=0.3), ServerPair)
    assert time.monotonic() - began < 30


# -- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"mixing": {"alpha_max": 0.5}}, {}, "has other mixing settings: alpha_max is 0.5, not 1.0"),
        ({"key": "right"}, {}, "refuses the API key; set api_key or the variable VLLM_API_KEY"),
        ({"key": "right"}, {"api_key": "wrong"}, "refuses the API key"),
        ({}, {"generation_kwargs": {"ignore_eos": True}}, "'ignore_eos', which a server does not take"),
        ({"other": True}, {}, "is not an `osd serve`"),
    ],
)
def test_servers_that_do_not_fit_are_refused_before_anything_is_written(run, start, tmp_path, options, given, message):
    server = start(**options)
    server.wait()
    with pytest.raises(ValueError, match=message):
        generate(run(server, **given), ServerPair)
    assert not (tmp_path / "out" / "run.json").exists()


def test_the_key_comes_from_the_settings_or_the_environment(run, start, monkeypatch):
    server = start(key="secret")
    server.wait()
    generate(run(server, api_key="secret"), ServerPair)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    generate(run(server, out="environment"), ServerPair)


def test_prompts_too_long_for_the_server_are_rejected_before_they_are_sent(run, start, tmp_path):
    server = start()
    server.wait()
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": "w9"}) + "\n" for q in ("w7", "w8 " * 60)))
    settings = run(server, input=str(path), num_samples=1)
    generate(settings, ServerPair)
    assert len(read_output(settings.output)) == 1
    assert "over its max_model_len=64" in rejected(settings.output)[0]["reason"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"server": "localhost:8000"}, "is not a URL such as"),
        ({"server": "http://a:1/other"}, "is not a URL such as"),
        ({"server": "http://a:1,http://a:1/"}, "http://a:1 is given twice"),
        ({"server": ""}, "is not a URL"),
        ({"server": "http://a:1", "server_wait": 0.0}, r"server_wait=0.0 must be more than 0"),
        ({"server": "http://a:1", "server_concurrency": 0}, r"server_concurrency=0 must be more than 0"),
        ({"server": "http://a:1", "server_timeout": float("nan")}, "server_timeout=nan must be more than 0"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **given)


def test_engine_arguments_warn_that_they_have_no_effect(tmp_path):
    with pytest.warns(UserWarning, match="vllm_max_model_length has no effect with server"):
        config(tmp_path, server="http://a:1", vllm_max_model_length=128)


def test_the_command_samples_through_servers(run, start, capsys):
    server = start()
    server.wait()
    settings = run(server)
    sizes = ("max_completion_length", "num_samples", "shard_size", "batch_size", "output", "server")
    cli.main(["generate", *flags(settings, *sizes)])
    assert f"{2 * len(ROWS)} samples" in capsys.readouterr().out
    assert len(read_output(settings.output)) == 2 * len(ROWS)
