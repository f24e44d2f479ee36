"""Transports of a student's weights from the trainer's main process to the workers of a server."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from threading import Thread
from typing import Any, Protocol

import httpx
import torch
from safetensors.torch import save

from osd.engine.wire import WEIGHTS_ROUTE

Named = tuple[str, torch.Tensor]
PART_BYTES = 256 << 20  # of weights that are sent at once, and held by the trainer at once
_GRACE_SECONDS = 5.0  # for the second half of a collective call after the first has failed


class Transport(Protocol):
    """Sends weights to the student of a server, between `/start_weight_update` and `/finish_weight_update`."""

    def send(self, named_tensors: Iterable[Named]) -> None:
        """Send these tensors to every worker.

        Raises:
            httpx.TransportError: the server went away.
            RuntimeError: the server refuses them.
        """

    def close(self) -> None:
        """Free what the transport holds."""


class HTTPTransport:
    """Weights in the bodies of requests: works everywhere, at the speed of the network and of one process."""

    def __init__(self, client: httpx.Client, trainer: str) -> None:
        self.client, self.trainer = client, trainer

    def send(self, named_tensors: Iterable[Named]) -> None:
        for part in parts(named_tensors, torch.device("cpu")):
            check(self.client.post(WEIGHTS_ROUTE, content=save(dict(part)), params={"trainer": self.trainer}))

    def close(self) -> None:
        pass


class NCCLTransport:
    """Broadcasts from a GPU of this process to those of the server, as vLLM's own trainers do.

    A part may take the workers as long as ``client`` waits for an answer.

    Args:
        trainer: the id under which the server knows this run.
        device: of this process.
        port: the port of this machine at which the server's workers join this process.

    Raises:
        ValueError: as `check_sender`.
        RuntimeError: the server refuses, or NCCL has no way between the two.
    """

    def __init__(self, client: httpx.Client, trainer: str, *, device: torch.device, port: int) -> None:
        check_sender("nccl", device, port)
        if device.index is None:  # the current one, of this thread alone
            device = torch.device("cuda", torch.cuda.current_device())
        self.client, self.device, self.port = client, device, port
        self.seconds = client.timeout.read or 240.0
        self._params = {"trainer": trainer}
        self._group: Any = None
        self._join()

    def _join(self) -> None:
        from osd.engine.backend import nccl

        _check_port(self.port)  # else the workers would meet whoever has the port
        check(answer := self.client.get("/get_world_size"))
        info = nccl.init_info(self.port, answer.json()["world_size"], self.seconds)
        body = {"init_info": info}
        try:
            self._group = self._with_server("/init_weight_transfer_engine", body, lambda: nccl.join(info, self.device))
        except RuntimeError as error:
            raise RuntimeError(
                f"{error}. Where trainer and server share a GPU, or NCCL has no way between them, start the server with "
                """--weight-transfer-config '{"backend": "http"}'"""
            ) from error

    def send(self, named_tensors: Iterable[Named]) -> None:
        from osd.engine.backend import nccl

        for part in parts(named_tensors, self.device):
            if self._group is None:  # an error ended it
                self._join()
            part.sort(key=lambda named: -named[1].element_size())  # vLLM packs bytes: each tensor begins at a whole element
            described = {
                "names": [name for name, _ in part],
                "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in part],
                "shapes": [list(tensor.shape) for _, tensor in part],
            }
            torch.cuda.synchronize(self.device)  # the broadcast runs on other streams
            broadcast = partial(nccl.broadcast, part, self._group, self.device)
            self._with_server("/update_weights", {"update_info": described}, broadcast)

    def _with_server(self, route: str, body: dict[str, Any], work: Callable[[], Any]) -> Any:
        """Ask the server for its half of a collective call, do this process's half meanwhile, and return its result.

        NCCL waits for ever for a half that never comes, so a half that fails ends the other one, and the group.
        """
        asked = _in_thread(lambda: check(self.client.post(route, json=body, params=self._params)))
        done = _in_thread(work)
        wait((asked, done), timeout=self.seconds, return_when=FIRST_EXCEPTION)
        wait((asked, done), timeout=_GRACE_SECONDS)
        failures = [error for half in (asked, done) if half.done() and (error := half.exception())]  # the server's first
        if failures or not (asked.done() and done.done()):
            self.close()  # the workers have left the group, or cannot be waited for
            raise failures[0] if failures else httpx.ReadTimeout(f"{route} has not ended after {self.seconds:g} seconds")
        return done.result()

    def close(self) -> None:
        """Abort the group, and free its port. Idempotent."""
        group, self._group = self._group, None
        if group is not None:
            from osd.engine.backend import nccl

            nccl.leave(group)


def _in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Run ``work`` in a thread that the interpreter does not wait for at its end."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def check_sender(backend: str, device: torch.device, port: int) -> None:
    """Check that weights can go from ``device`` to a server that takes them by ``backend``.

    Raises:
        ValueError: NCCL without a GPU, or while another process has the port.
    """
    if backend != "nccl":
        return
    if device.type != "cuda":
        raise ValueError(
            f"the server takes weights by NCCL, and this process trains on {device}; start the server with "
            """--weight-transfer-config '{"backend": "http"}'"""
        )
    _check_port(port)


def _check_port(port: int) -> None:
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"vllm_group_port={port} cannot be used on this machine ({error}); another run may have it: choose another"
            ) from error


def parts(named_tensors: Iterable[Named], device: torch.device) -> Iterator[list[Named]]:
    """Copy tensors to a device, in lists of about `PART_BYTES`. FSDP1 frees a parameter when the next one is asked for."""
    part: list[Named] = []
    size = 0
    for name, tensor in named_tensors:
        part.append((name, tensor.detach().to(device, copy=True).contiguous()))
        size += tensor.nbytes
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def check(answer: httpx.Response) -> None:
    """Raise a RuntimeError unless a server took what it was sent."""
    if answer.status_code != 200:
        raise RuntimeError(f"the server refuses a part of the weights ({answer.status_code}): {answer.text[:500]}")
