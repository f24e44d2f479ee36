"""ServedPair: the address of an `osd serve` process, and requests for its description and its output layer."""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath
from threading import Event
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
import torch
from huggingface_hub import try_to_load_from_cache

from osd.engine.config import PairConfig
from osd.engine.request import SideLimits
from osd.engine.transport import check_sender
from osd.engine.wire import HEAD_ROUTE, INFO_ROUTE, STATE_ROUTE, frames, unpack

API_KEY_VARIABLE = "VLLM_API_KEY"  # the server reads it too
WEIGHT_UPDATES = ("between", "running")  # batches that are sampled in the background, or under their requests
CONNECT_SECONDS = 10.0
LONGEST_PAUSE = 5.0  # seconds between two looks for a server that is away
# For httpx clients: requests to this machine go through no proxy, whatever HTTP_PROXY and NO_PROXY say.
DIRECT: dict[str, Any] = dict.fromkeys(f"all://{host}" for host in ("localhost", "127.0.0.1", "0.0.0.0", "[::1]"))
_PART = 1 << 16  # bytes
_HEAD_ROWS = 8192  # of the output layer in one answer


class ServerUnavailable(RuntimeError):
    """No server answers, or another trainer uses it."""


def through_proxy(url: str) -> str:
    """Return a remark for an error if requests to a URL go through a proxy that the environment names, or ""."""
    target = httpx.URL(url)
    proxies = {} if f"all://{target.host}" in DIRECT or proxy_bypass(target.host) else getproxies()
    if (proxy := proxies.get(target.scheme) or proxies.get("all")) is None:
        return ""
    return f"; requests go through the proxy {httpx.URL(proxy).host!r} (HTTP_PROXY): NO_PROXY={target.host} goes around it"


@cache
def weights_digest(model: str) -> str | None:
    """Return a hash of three places in each of a model's weight files; None if its files are not on this machine."""
    folder = Path(model)
    if not folder.is_dir():
        found = try_to_load_from_cache(model, "config.json") if model.count("/") < 2 else None
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as data:
            for place in (0, size // 2, max(size - _PART, 0)):
                data.seek(place)
                digest.update(data.read(_PART))
    return digest.hexdigest() if files else None


def without_engine(pair_kwargs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return those arguments of `PairConfig` that have an effect where a server holds the engine: seed, code, revisions."""
    own = {"seed", "trust_remote_code", "revision"}
    kinds = ("engine_kwargs", "teacher_kwargs", "student_kwargs")
    return {kind: {name: value for name, value in pair_kwargs[kind].items() if name in own} for kind in kinds}


@dataclass(frozen=True, kw_only=True)
class ServedPair:
    """A pair that an `osd serve` process holds.

    Attributes:
        config: the two models, as the server was started with; its engine arguments are the server's own.
        url: of the server, without /v1.
        timeout: seconds to wait for the server: until it is up or back, until it has taken a part of the weights, and until it
            has finished another completion.
        group_port: port of this machine, where the server's workers meet the main process for NCCL.
        api_key: the server's; default: the variable VLLM_API_KEY.
    """

    config: PairConfig
    url: str
    timeout: float = 240.0
    group_port: int = 51216
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        url = self.url.rstrip("/").removesuffix("/v1")
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # of `port`
            valid = False
        if not valid:
            raise ValueError(f"the server {self.url!r} is not a URL; write http://host:port")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"the timeout of {self.timeout} seconds for the server must be positive and finite")
        object.__setattr__(self, "url", url)

    def client(self) -> httpx.Client:
        """Return a client of the server, with its key."""
        key = self.api_key or os.environ.get(API_KEY_VARIABLE)
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(self.timeout, connect=CONNECT_SECONDS),
            mounts=DIRECT,
        )

    def info(self) -> dict[str, Any]:
        """Wait for the server; return what it serves.

        Raises:
            ValueError: a server of other models, one that takes no weights, or one that refuses the API key; something else
                than a server of a pair.
            ServerUnavailable: no server within ``timeout`` seconds.
        """
        with self.client() as client:
            return self.wait(client)

    def limits(self) -> dict[str, SideLimits]:
        """Wait for the server; return the limits of both sides. Raises as `info`."""
        return {side: SideLimits(**given) for side, given in self.info()["limits"].items()}

    def check_trainer(self, device: torch.device) -> None:
        """Check before a model loads that this process can train on ``device`` against the server; raises as `info`.

        Raises:
            ValueError: as `check_sender`.
            ServerUnavailable: another trainer uses the server.
        """
        deadline = time.monotonic() + CONNECT_SECONDS
        while True:
            state = self.info()["state"]
            check_sender(state["transfer"], device, self.group_port)
            if state["trainer"] is None:
                return
            if time.monotonic() > deadline:  # the server sees the end of a trainer a little later
                raise ServerUnavailable(
                    f"server {self.url}: another trainer ({state['trainer']}) uses this server; end it, or start another server"
                )
            time.sleep(0.1)

    def wait(self, client: httpx.Client, over: Event | None = None) -> dict[str, Any]:
        """Wait until the server answers; return its description. Raises as `info`.

        Args:
            over: set when nobody waits any longer; then an `httpx.TransportError` ends the wait.
        """
        deadline, pause, silent = time.monotonic() + self.timeout, 0.1, True
        while True:
            try:
                return self.look(client)
            except httpx.TransportError as error:
                if over is not None and over.is_set():
                    raise
                if "[SSL" in str(error):
                    raise ValueError(
                        f"no TLS connection to server {self.url} ({error}); write http:// for a server without --ssl-certfile, "
                        "or name its certificate in the variable SSL_CERT_FILE"
                    ) from error
                if silent and pause > 1:
                    silent = False
                    warnings.warn(
                        f"no `osd serve` answers at {self.url} yet ({error}); waiting for it, {self.timeout:g} seconds at most "
                        f"(vllm_server_timeout){through_proxy(self.url)}",
                        stacklevel=2,
                    )
                if time.monotonic() > deadline:
                    raise ServerUnavailable(
                        f"no `osd serve` has answered at {self.url} for {self.timeout:g} seconds ({error}); start one there, "
                        f"correct vllm_server_base_url, or raise vllm_server_timeout{through_proxy(self.url)}"
                    ) from error
            (over or Event()).wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def look(self, client: httpx.Client) -> dict[str, Any]:
        """Return the server's description now. Raises a ValueError as `info`, or an `httpx.TransportError`."""
        answers = [client.get(route, timeout=min(self.timeout, CONNECT_SECONDS)) for route in (INFO_ROUTE, STATE_ROUTE)]
        proxy = through_proxy(self.url)
        for answer in answers:
            if answer.status_code in (401, 403):
                given = "refuses the API key" if "Authorization" in client.headers else "needs its API key"
                raise ValueError(f"server {self.url} {given}; set the variable {API_KEY_VARIABLE}{proxy}")
            if answer.status_code >= 500:
                raise httpx.ReadError(f"it answers {answer.status_code}")
        try:
            info = {**answers[0].json(), "state": answers[1].json()}
            served = {side: (info[side], info[f"{side}_weights"]) for side in ("teacher", "student")}
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"server {self.url} is not an `osd serve` of this version; start one there, or correct the URL{proxy}"
            ) from None
        for side, (name, theirs) in served.items():
            ours = weights_digest(str(here := getattr(self.config, side)))
            same_files = None if None in (ours, theirs) else ours == theirs  # None: only one machine has the files
            if PurePath(name).name != PurePath(here).name and same_files is not True:  # folders differ between machines
                raise ValueError(
                    f"the {side} of server {self.url} is {name!r}, and {here!r} here; start the server with --{side} {here}, "
                    f"or train with {name!r}"
                )
            if side == "teacher" and same_files is False:
                raise ValueError(
                    f"the teacher of server {self.url} has other weights than {str(here)!r} here, under the same name; give "
                    "both the same files"
                )
        if info["state"]["transfer"] is None:
            raise ValueError(
                f"server {self.url} takes no weights; start it with --weight-transfer-config "
                """'{"backend": "nccl"}' (or "http")"""
            )
        return info

    def output_layer(
        self, client: httpx.Client, vocab_size: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a copy of the teacher's output layer on a device: weight [V, H] and bias [V] or None.

        Raises:
            RuntimeError: logits that are not one layer's product with the hidden state.
        """
        whole: dict[str, torch.Tensor] = {}
        for start in range(0, vocab_size, _HEAD_ROWS):
            answer = client.get(HEAD_ROUTE, params={"start": start, "stop": min(start + _HEAD_ROWS, vocab_size)})
            if answer.status_code != 200:
                raise RuntimeError(f"server {self.url} does not give the teacher's output layer: {error_message(answer)}")
            for data in frames([answer.content]):
                of, tensors = unpack(data)
                for name, rows in tensors.items():
                    if name not in whole:
                        whole[name] = torch.empty(vocab_size, *rows.shape[1:], dtype=rows.dtype, device=device)
                    whole[name][of["start"] : of["start"] + len(rows)] = rows.to(device)
        return whole["weight"], whole.get("bias")


def error_message(answer: httpx.Response) -> str:
    """Return the message of an answer that is an error."""
    with suppress(ValueError, KeyError, TypeError):
        return str(answer.json()["error"]["message"])
    return answer.text[:500]
