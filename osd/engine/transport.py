"""Transports of a student's weights from the trainer's main process to the workers of a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import httpx
import torch
from safetensors.torch import save

from osd.engine.wire import WEIGHTS_ROUTE

Named = tuple[str, torch.Tensor]
PART_BYTES = 256 << 20  # of weights that are sent at once, and held by the trainer at once


class Transport(Protocol):
    """A way for weights into the student of a server, between `/start_weight_update` and `/finish_weight_update`."""

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
        for part in parts(named_tensors):
            content = save({name: tensor.detach().cpu().contiguous() for name, tensor in part})
            check(self.client.post(WEIGHTS_ROUTE, content=content, params={"trainer": self.trainer}))

    def close(self) -> None:
        pass


class NCCLTransport:
    """Broadcasts from a GPU of this process to those of the server, as vLLM's own trainers do.

    Args:
        trainer: the id under which the server knows this run.
        device: of this process.
        port: of this machine, where the workers meet this process.

    Raises:
        ValueError: this process has no GPU.
        RuntimeError: the server refuses.
    """

    def __init__(self, client: httpx.Client, trainer: str, *, device: torch.device, port: int) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"the server takes weights by NCCL, and this process trains on {device}; start the server with "
                """--weight-transfer-config '{"backend": "http"}'"""
            )
        from osd.engine.backend import nccl

        self.client, self.device, self._params = client, device, {"trainer": trainer}
        check(answer := client.get("/get_world_size"))
        info = nccl.init_info(port, answer.json()["world_size"])
        with ThreadPoolExecutor(1) as pool:  # the workers wait for this process while they answer
            joined = pool.submit(client.post, "/init_weight_transfer_engine", json={"init_info": info}, params=self._params)
            self._group = nccl.join(info, device)
            check(joined.result())

    def send(self, named_tensors: Iterable[Named]) -> None:
        from osd.engine.backend import nccl

        for part in parts(named_tensors):
            part = [(name, tensor.detach().to(self.device).contiguous()) for name, tensor in part]
            described = {
                "names": [name for name, _ in part],
                "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in part],
                "shapes": [list(tensor.shape) for _, tensor in part],
            }
            pool = ThreadPoolExecutor(1)
            try:
                taken = pool.submit(self.client.post, "/update_weights", json={"update_info": described}, params=self._params)
                nccl.broadcast(part, self._group, self.device)
                check(taken.result())
            finally:
                pool.shutdown(wait=False)  # after an error here the workers still wait for the rest

    def close(self) -> None:
        self._group.destroy()


def parts(named_tensors: Iterable[Named]) -> Iterator[list[Named]]:
    """Collect tensors into lists of about `PART_BYTES`."""
    part: list[Named] = []
    size = 0
    for name, tensor in named_tensors:
        part.append((name, tensor))
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
