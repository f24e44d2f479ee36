"""Weights on their way to a server. By NCCL without a GPU: vLLM's own packing and rendezvous, a stand-in for NCCL itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import httpx
import pytest
import torch
from safetensors.torch import load
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import packed_tensor

from osd.engine import transport
from osd.engine.backend import nccl
from osd.engine.backend.weight_transfer import transfer_engine
from osd.engine.transport import HTTPTransport, NCCLTransport
from osd.engine.wire import WEIGHTS_ROUTE
from tests.served import free_port

STORE = "from torch.distributed import TCPStore; s = TCPStore('127.0.0.1', {port}, 2, True, use_libuv=False); input()"
FIRST = {"weight": torch.arange(6.0).reshape(2, 3), "half": torch.full((5,), 0.5, dtype=torch.bfloat16)}
TENSORS = {**FIRST, "scalar": torch.tensor(7.0), "ids": torch.arange(3), "last": torch.randn(4, 4)}


class Communicator:
    """A communicator over the store of its group: a call waits for rank 0, or until it is destroyed, as NCCL's do."""

    def __init__(self, group):
        self.group, self.disabled, self.ended = group, False, threading.Event()

    def broadcast(self, tensor, src):
        sent = self.group.broadcast(tensor, src)
        if self.group.rank != src:
            tensor.copy_(sent)

    def destroy(self):
        self.disabled = True
        self.ended.set()


def engine(load_weights, group, seconds=1800.0):
    """The worker's half, as a worker has it after a trainer has joined it."""
    config = SimpleNamespace(
        weight_transfer_config=SimpleNamespace(backend="nccl"), parallel_config=None, model_config=SimpleNamespace()
    )
    made = transfer_engine(config, torch.device("cpu"), load_weights)
    assert hash(made.model), "vLLM 0.33 keeps it as a key"
    info = made.parse_init_info(nccl.init_info(51216, 1, seconds))
    made.model_update_group, made.packed, made._seconds = group, info.packed, info.seconds
    return made


@pytest.fixture
def on_a_cpu(monkeypatch):
    """vLLM's streams and events, which need a GPU, do nothing."""
    stream = SimpleNamespace(synchronize=lambda: None, wait_event=lambda event: None)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda index, number: (stream,) * number)
    monkeypatch.setattr(torch, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    for name in ("current_device_index", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.accelerator, name, lambda *args: 0)
    for name in ("stream", "device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: nullcontext())


@pytest.mark.parametrize("part_bytes", [1, 30, 1 << 20])
def test_every_tensor_arrives_bit_for_bit(on_a_cpu, monkeypatch, part_bytes):
    """Through both halves of the code, in parts of one tensor, of several and of all, in two updates."""
    monkeypatch.setattr(transport, "PART_BYTES", part_bytes)
    port, arrived, groups = free_port(), [], {}
    worker = engine(lambda named: arrived.extend((name, tensor.clone()) for name, tensor in named), None)

    def answer(request):
        if request.method == "GET":
            return httpx.Response(200, json={"world_size": 1})
        body = json.loads(request.content)
        if "init_info" in body:
            info = worker.parse_init_info(body["init_info"])
            assert (info.master_port, info.rank_offset, info.world_size) == (port, 1, 2)
            worker.model_update_group = Communicator(StatelessProcessGroup.create("127.0.0.1", port, 1, 2))
        else:
            worker.update_weights(body["update_info"])
        return httpx.Response(200)

    def join(info, device):
        groups["trainer"] = Communicator(StatelessProcessGroup.create("127.0.0.1", info["master_port"], 0, 2))
        return groups["trainer"]

    monkeypatch.setattr(nccl, "join", join)
    sender = sending(answer, port)
    for _ in range(2):
        arrived.clear()
        sender.send(TENSORS.items())
        assert sorted(name for name, _ in arrived) == sorted(TENSORS)
        assert all(torch.equal(tensor, TENSORS[name]) and tensor.dtype == TENSORS[name].dtype for name, tensor in arrived)
    sender.close()
    StatelessProcessGroup.create("127.0.0.1", port, 0, 1)  # the port is free, although this test has the group


@pytest.mark.parametrize("way", ["http", "nccl"])
def test_a_parameter_may_be_freed_when_the_next_is_asked_for(on_a_cpu, monkeypatch, way):
    """As FSDP1 frees what it gathered, in the middle of a part."""
    sent = []

    def answer(request):
        if request.url.path == WEIGHTS_ROUTE:
            sent.extend(load(request.content).items())
        return httpx.Response(200, json={"world_size": 1})

    def gathered():
        for name, tensor in TENSORS.items():
            yield name, (whole := tensor.clone())
            whole.zero_()

    monkeypatch.setattr(nccl, "broadcast", lambda part, group, device: sent.extend(part))
    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
    monkeypatch.setattr(NCCLTransport, "_join", lambda self: setattr(self, "_group", object()))
    transport_of = {"http": lambda: HTTPTransport(client, "me"), "nccl": lambda: sending(answer)}
    transport_of[way]().send(gathered())
    assert len(sent) == len(TENSORS)
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in sent)


def sending(answer, port=None):
    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer), timeout=20)
    made = NCCLTransport(client, "me", device=torch.device("cuda:0"), port=port or free_port())
    made.device = torch.device("cpu")
    return made


# -- what ends a transfer that would wait for ever ----------------------------------------------------------------------


@pytest.fixture
def trainer():
    """A process that holds the group's store, as a trainer's rank 0; the group's other rank is here."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", STORE.format(port=port)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        yield process, StatelessProcessGroup.create("127.0.0.1", port, 1, 2)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("seconds", "message"), [(600.0, "the trainer has gone"), (3.0, "it has not ended after 3 seconds")])
def test_a_worker_gives_up_a_transfer_that_will_not_end(trainer, monkeypatch, seconds, message):
    process, group = trainer
    waiting = Communicator(group)
    worker = engine(print, waiting, seconds)
    monkeypatch.setattr(type(worker).__mro__[1], "update_weights", lambda self, info: waiting.ended.wait(60))
    if seconds == 600:
        threading.Timer(1.5, os.kill, (process.pid, signal.SIGKILL)).start()
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=f"a transfer of weights was aborted: {message}"):
        worker.update_weights({})
    assert 1 < time.monotonic() - begun < 40
    with pytest.raises(RuntimeError, match="its last transfer was aborted; join it again"):
        worker.update_weights({})


def test_a_worker_whose_trainer_lives_goes_on(trainer, monkeypatch):
    monkeypatch.setattr(nccl, "_PULSE_SECONDS", 0.05)
    waiting = Communicator(trainer[1])
    worker = engine(print, waiting)
    monkeypatch.setattr(type(worker).__mro__[1], "update_weights", lambda self, info: time.sleep(0.5))
    worker.update_weights({})
    assert not waiting.disabled
    worker.model_update_group = without_store = Communicator(None)  # of a trainer that shared the id of the group itself
    worker.update_weights({})
    assert not without_store.disabled
    with pytest.raises(KeyError, match="as vLLM raised it"), nccl.watched(waiting, 600.0):
        raise KeyError("as vLLM raised it")


@pytest.mark.parametrize("place", ["/init_weight_transfer_engine", "/update_weights"])
@pytest.mark.parametrize("how", ["refuses", "refuses what came", "dies"])
def test_a_trainer_does_not_wait_for_a_server_that_refuses_or_dies(on_a_cpu, monkeypatch, place, how):
    """And joins the workers anew for its next update."""
    monkeypatch.setattr(transport, "_GRACE_SECONDS", 0.2)
    joined, failing, left = [], [True], []

    def answer(request):
        if request.method == "GET":
            return httpx.Response(200, json={"world_size": 2})
        if request.url.path == place and failing:
            failing.clear()
            if how == "dies":
                raise httpx.ReadError("connection reset")
            return httpx.Response(500, text="no trainer has joined this worker")
        return httpx.Response(200)

    def join(info, device):
        if place == "/init_weight_transfer_engine" and not joined:
            joined.append(None)
            time.sleep(60)
        joined.append(Communicator(SimpleNamespace(rank=0, store=object(), broadcast=lambda tensor, src: None)))
        return joined[-1]

    def broadcast(part, group, device):
        if place == "/update_weights" and len(joined) == 1 and how != "refuses what came":
            group.ended.wait(60)
            left.append(group)

    monkeypatch.setattr(nccl, "join", join)
    monkeypatch.setattr(nccl, "broadcast", broadcast)
    begun = time.monotonic()
    expected = pytest.raises(httpx.ReadError) if how == "dies" else pytest.raises(RuntimeError, match=r"refuses .* joined")
    if place == "/init_weight_transfer_engine":
        with expected:
            sending(answer)
        return
    sender = sending(answer)
    with expected:
        sender.send(FIRST.items())
    assert time.monotonic() - begun < 30
    assert joined[0].disabled
    assert joined[0].group.store is None
    sender.send(FIRST.items())
    assert len(joined) == 2
    assert not joined[1].disabled


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(
            ValueError, match=r"vllm_group_port=\d+ cannot be used on this machine \(.*in use\); another run may"
        ):
            sending(lambda request: pytest.fail("the server was asked"), other.getsockname()[1])
    with pytest.raises(ValueError, match="this process trains on cpu; start the server with"):
        NCCLTransport(httpx.Client(), "me", device=torch.device("cpu"), port=51216)
