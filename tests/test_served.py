"""The address of a server: what answers there, how it is reached, and what is refused before a model loads."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
import torch

from osd.engine import remote, served
from osd.engine.config import PairConfig
from osd.engine.remote import RemoteEngine
from osd.engine.remote_batch import Batch
from osd.engine.served import ServedPair, ServerUnavailable, through_proxy, weights_digest
from osd.engine.wire import INFO_ROUTE
from osd.train import train_osd
from tests.served import ROOT, free_port
from tests.tiny import tiny_model

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("VLLM_API_KEY", "k")


def pair(models, **given):
    config = PairConfig(teacher=str(models[0]), student=str(models[1]))
    return ServedPair(**{"config": config, "url": "http://server:8000", "timeout": 1.0, "group_port": free_port(), **given})


def info(models, **given):
    sides = {"teacher": models[0], "student": models[1]}
    names = {side: str(path) for side, path in sides.items()}
    return {**names, **{f"{side}_weights": weights_digest(str(path)) for side, path in sides.items()}, **given}


def state(**given):
    return {"transfer": "http", "trainer": None, **given}


def look(pair, of, **states):
    """Return what `pair.look` returns for a server with these answers."""

    def answer(request):
        return httpx.Response(200, json=of if request.url.path == INFO_ROUTE else state(**states))

    with httpx.Client(base_url=pair.url, transport=httpx.MockTransport(answer)) as client:
        return pair.look(client)


# -- which pair it has --------------------------------------------------------------------------------------------------


def test_the_same_files_under_another_path_or_name_are_the_same_models(tiny_pair, tmp_path):
    """A link such as `latest`, a snapshot of the Hub's cache, another mount."""
    links = [tmp_path / "latest", tmp_path / "0123abcd"]
    for link, folder in zip(links, tiny_pair, strict=True):
        link.symlink_to(folder)
    assert look(pair(tiny_pair), info(links))["teacher"] == str(links[0])
    elsewhere = info(tiny_pair, teacher="/data/teacher/", student="org/student", teacher_weights=None, student_weights=None)
    assert look(pair(tiny_pair), elsewhere)["student"] == "org/student"


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_another_model_is_refused(tiny_pair, side):
    with pytest.raises(
        ValueError, match=f"the {side} of server http://server:8000 is 'org/other', and .* --{side} .*, or train"
    ):
        look(pair(tiny_pair), info(tiny_pair, **{side: "org/other", f"{side}_weights": None}))


def test_a_teacher_of_the_same_name_with_other_weights_is_refused(tiny_pair, tmp_path):
    other = tiny_model(tmp_path / tiny_pair[0].name, seed=99)
    with pytest.raises(ValueError, match="has other weights than"):
        look(pair(tiny_pair), info([other, tiny_pair[1]]))
    look(pair(tiny_pair), info([tiny_pair[0], tiny_model(tmp_path / tiny_pair[1].name, seed=98)]))  # a trainer pushes its own


# -- what else may answer there -----------------------------------------------------------------------------------------


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.text)

    def log_message(self, *args):
        pass


@pytest.fixture
def answering():
    """Starts a server that gives one answer to everything; returns its address."""
    running = []

    def start(status, text=b"{}"):
        running.append(HTTPServer(("127.0.0.1", 0), Answers))
        running[-1].status, running[-1].text = status, text
        threading.Thread(target=running[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "text"), [(200, b"<html>"), (200, b"{}"), (200, b"[1]"), (302, b""), (404, b"{}"), (405, b"no"), (400, b"{}")]
)
def test_another_service_is_refused_at_once(tiny_pair, answering, status, text):
    with pytest.raises(ValueError, match=r"is not an `osd serve` of this version; start one there, or correct the URL$"):
        pair(tiny_pair, url=answering(status, text), timeout=60.0).info()


def test_a_key_that_is_missing_or_wrong_is_refused_at_once(tiny_pair, answering, monkeypatch):
    url = answering(401)
    with pytest.raises(ValueError, match=r"refuses the API key; set the variable VLLM_API_KEY$"):
        pair(tiny_pair, url=url, timeout=60.0).info()
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(ValueError, match=r"needs its API key; set the variable VLLM_API_KEY$"):
        pair(tiny_pair, url=url, timeout=60.0).info()


@pytest.mark.filterwarnings("ignore:no `osd serve` answers")
def test_a_gateway_that_waits_for_its_server_is_waited_for(tiny_pair, answering):
    with pytest.raises(ServerUnavailable, match=r"no `osd serve` has answered .* for 0.5 seconds \(it answers 503\)"):
        pair(tiny_pair, url=answering(503), timeout=0.5).info()


def test_https_without_a_certificate_is_refused_at_once(tiny_pair, answering):
    url = answering(200).replace("http:", "https:")
    with pytest.raises(ValueError, match=r"no TLS connection to server https://.*; write http:// for a server without"):
        pair(tiny_pair, url=url, timeout=60.0).info()


@pytest.mark.parametrize("url", ["gpu:8000", "http://", "https://:8000", "ftp://gpu:8000", "http://gpu:80000", "http://gpu:x"])
def test_what_is_no_address_is_refused(tiny_pair, url):
    with pytest.raises(ValueError, match=r"is not a URL; write http://host:port"):
        pair(tiny_pair, url=url)


def test_a_timeout_that_never_ends_is_refused(tiny_pair):
    with pytest.raises(ValueError, match="the timeout of inf seconds for the server must be positive and finite"):
        pair(tiny_pair, timeout=math.inf)


def test_a_pause_for_a_sync_is_no_lack_of_progress(tiny_pair):
    engine = object.__new__(RemoteEngine)
    engine.pair, engine._since, engine._stale = pair(tiny_pair), 0.0, True
    batch = Batch({}, [])
    engine._check_progress(batch)
    engine._stale = False
    with pytest.raises(RuntimeError, match="has not finished a completion for"):
        engine._check_progress(batch)


# -- threads that sample in the background ------------------------------------------------------------------------------

ENDS = """
import threading
from osd.engine.remote_batch import Batch
from osd.engine.wire import pack, unpack
import torch

def ask(batch):
    while not batch.cancelled.is_set():
        unpack(pack({}, {"values": torch.ones(100)}))
        begun.set()

begun = threading.Event()
for _ in range(3):
    Batch({}, []).start(ask)
begun.wait(60)
"""


def test_a_program_that_ends_while_a_batch_is_sampled_ends_in_order():
    """A daemon thread inside torch at that time aborts the process: "terminate called without an active exception"."""
    done = subprocess.run([sys.executable, "-c", ENDS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_batch_that_nobody_wants_waits_for_no_server(tiny_pair):
    engine = object.__new__(RemoteEngine)
    engine.pair, engine._ahead, engine._since, engine._stale = pair(tiny_pair, timeout=600.0), [], time.monotonic(), False
    engine.pair = replace(engine.pair, url=f"http://127.0.0.1:{free_port()}")
    engine.running, engine._trainer, engine._sync, engine._client = False, "t", "s", engine.pair.client()
    batch = Batch({"running": False, "prompts": [[]], "alpha": [None], "seeds": [1], "sampling": [{}]}, [None])
    batch.start(engine._ask)
    time.sleep(0.5)
    begun = time.monotonic()
    batch.cancel()
    assert not batch._thread.is_alive()
    assert time.monotonic() - begun < 5
    assert not isinstance(batch.failure, RuntimeError)


def test_a_batch_that_nobody_wants_takes_no_completion(monkeypatch):
    engine, batch = object.__new__(RemoteEngine), Batch({"running": False}, [None])
    engine.running, engine._trainer, engine._sync, taken = False, "t", "s", []
    answers = httpx.MockTransport(lambda request: httpx.Response(200))
    engine._client = httpx.Client(base_url="http://server", transport=answers)
    monkeypatch.setattr(batch, "rest", lambda: ([0], {"prompts": []}))
    monkeypatch.setattr(remote, "_whole_frames", lambda answer: iter([b"1", b"2"]))
    monkeypatch.setattr(remote, "unpack", lambda data: (data, {}))
    engine._take = lambda batch, places, of, tensors: (taken.append(of), batch.cancelled.set())
    engine._ask_once(batch)
    assert taken == [b"1"]


# -- proxies ------------------------------------------------------------------------------------------------------------


def test_this_machine_is_reached_around_every_proxy(tiny_pair, answering, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("all_proxy", f"http://127.0.0.1:{free_port()}")
    url = answering(404)
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        with pytest.raises(ValueError, match="is not an `osd serve`"):  # it was reached
            pair(tiny_pair, url=url.replace("127.0.0.1", host), timeout=60.0).info()


@pytest.mark.filterwarnings("ignore:no `osd serve` answers")
def test_an_error_says_which_proxy_was_asked(tiny_pair, answering, monkeypatch):
    monkeypatch.setenv("http_proxy", answering(403))
    with pytest.raises(ValueError, match=r"the proxy '127.0.0.1' \(HTTP_PROXY\): NO_PROXY=gpu-node goes around it$"):
        pair(tiny_pair, url="http://gpu-node:8000").info()
    monkeypatch.setenv("http_proxy", f"http://user:secret@127.0.0.1:{free_port()}")
    with pytest.raises(ServerUnavailable, match=r"the proxy '127.0.0.1' .*: NO_PROXY=gpu-node goes around it$") as caught:
        pair(tiny_pair, url="http://gpu-node:8000").info()
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("no_proxy", "gpu-node")
    assert through_proxy("http://gpu-node:8000") == ""


# -- a trainer ----------------------------------------------------------------------------------------------------------


def check(tiny_pair, monkeypatch, states, device="cpu"):
    given = iter(states)
    monkeypatch.setattr(ServedPair, "info", lambda self: info(tiny_pair) | {"state": next(given)})
    monkeypatch.setattr(served, "CONNECT_SECONDS", 0.2)
    pair(tiny_pair).check_trainer(torch.device(device))


def test_another_trainer_or_a_transfer_that_cannot_be_is_found_before_a_model_loads(tiny_pair, monkeypatch):
    ended = state(trainer="one that has ended")
    check(tiny_pair, monkeypatch, [ended, state()])
    with pytest.raises(ServerUnavailable, match=r"another trainer \(node process 7\) uses this server; end it, or start"):
        check(tiny_pair, monkeypatch, [state(trainer="node process 7")] * 99)
    with pytest.raises(
        ValueError, match=r"takes weights by NCCL, and this process trains on cpu; .*'\{\"backend\": \"http\"\}'"
    ):
        check(tiny_pair, monkeypatch, [state(transfer="nccl")])
    check(tiny_pair, monkeypatch, [state(transfer="nccl")], device="cuda")
    with pytest.raises(ValueError, match="takes no weights; start it with --weight-transfer-config"):
        look(pair(tiny_pair), info(tiny_pair), transfer=None)


def test_the_training_command_ends_without_a_server_in_one_line(monkeypatch, capsys):
    def main(argv):
        raise ServerUnavailable("no server")

    monkeypatch.setattr(train_osd, "main", main)
    with pytest.raises(SystemExit) as end:
        train_osd.command([])
    assert end.value.code == 1
    assert capsys.readouterr().err == "osd train: failed: no server (OSD_TRACEBACK=1 shows where)\n"
