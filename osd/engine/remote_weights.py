"""WeightSender: the main process's hold on a server, and the student's weights that it pushes there."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import torch

from osd.engine.remote_batch import Batch
from osd.engine.served import CONNECT_SECONDS, ServedPair, error_message
from osd.engine.transport import HTTPTransport, NCCLTransport, Transport
from osd.engine.wire import TRAINER_ROUTE


class ServerLost(RuntimeError):
    """The server went away, or came back without the weights of the last sync; sync again, and then finish ``batch``."""

    batch: Batch | None = None


class WeightSender:
    """Holds a server for one training run by a request that stays open, and sends weights to its student.

    Args:
        client: of the server.
        device: of this process, for NCCL.

    Attributes:
        trainer: id under which the server knows the run; None before `connect`.
    """

    def __init__(self, pair: ServedPair, client: httpx.Client, device: torch.device) -> None:
        self.pair, self.device, self._client = pair, device, client
        self.trainer: str | None = None
        self._transport: Transport | None = None  # while connected
        self._held = ExitStack()

    def connect(self) -> tuple[str, int]:
        """Take the server for this run; return the run's id and the version of the student's weights.

        Raises:
            ValueError: as `ServedPair.info`.
            RuntimeError: another trainer uses the server; also as `ServedPair.info`.
        """
        self.disconnect()
        info = self.pair.wait(self._client)
        deadline = time.monotonic() + CONNECT_SECONDS
        while self.trainer is not None and info["state"]["trainer"] == self.trainer and time.monotonic() < deadline:
            time.sleep(0.1)  # the server has yet to see that the last connection of this process has ended
            info = self.pair.wait(self._client)
        trainer = f"{socket.gethostname()} process {os.getpid()} {uuid.uuid4().hex[:8]}"
        request = self._client.build_request("POST", TRAINER_ROUTE, json={"trainer": trainer}, timeout=CONNECT_SECONDS)
        answer = self._client.send(request, stream=True)
        self._held.callback(answer.close)
        if answer.status_code != 200:
            answer.read()
            raise RuntimeError(f"server {self.pair.url}: {error_message(answer)}")
        transport: Transport
        if info["state"]["transfer"] == "http":
            transport = HTTPTransport(self._client, trainer)
        else:
            transport = NCCLTransport(self._client, trainer, device=self.device, port=self.pair.group_port)
        self._held.callback(transport.close)
        self._transport, self.trainer = transport, trainer
        return trainer, info["state"]["version"]

    def disconnect(self) -> None:
        """End this run's hold on the server. Idempotent."""
        self._transport = None
        with suppress(Exception):
            self._held.close()

    def push(
        self, tensors: Iterable[tuple[str, torch.Tensor]], name: str, *, partial: bool, running: bool
    ) -> tuple[str | None, int]:
        """Send the weights of one sync; return the run's id and the new version of the student's weights.

        Args:
            name: of the sync, which the server gives with everything that it samples from these weights.
            partial: the tensors are only those that changed since the last sync.
            running: requests that run go on afterwards, with these weights; else they end.

        Raises:
            ServerLost: the server went away meanwhile, or a partial sync has nothing to build upon.
            RuntimeError: the server refuses.
        """
        try:
            if self._transport is None or self.pair.look(self._client)["state"]["trainer"] != self.trainer:
                self.connect()
                if partial:
                    raise ServerLost(f"server {self.pair.url} has lost the weights that a partial sync builds upon")
            assert self._transport is not None, "connected"
            query = {"trainer": self.trainer, "partial": str(partial).lower(), "running": str(running).lower()}
            try:
                self._post("/start_weight_update", params=query)
                self._transport.send(tensors)
                self._post("/finish_weight_update", params=query, json={"weight_version": name})
            except BaseException:
                if running:
                    self.disconnect()  # which ends the requests that the update has paused
                raise
            return self.trainer, self.pair.look(self._client)["state"]["version"]
        except httpx.TransportError as error:
            self.disconnect()
            raise ServerLost(f"server {self.pair.url} went away during a weight sync: {error!r}") from error

    def _post(self, route: str, **kwargs: Any) -> None:
        answer = self._client.post(route, **kwargs)
        if answer.status_code == 409:
            raise ServerLost(f"server {self.pair.url}: {error_message(answer)}")
        if answer.status_code != 200:
            raise RuntimeError(f"server {self.pair.url} refuses {route} ({answer.status_code}): {error_message(answer)}")
