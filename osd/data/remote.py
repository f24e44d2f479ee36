"""The pair behind servers: `osd generate --server` samples through `osd serve` processes, on this machine or others.

Servers share the requests of a batch: each takes the next one whenever it has room. A request that a server did not answer goes
to whichever server takes it next. It has its own seed, so that the answer is the same from any of them, at any time; and a
batch returns when it is whole, so that nothing is lost or written twice.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import httpx

from osd.data.requests import Request
from osd.data.settings import GenerateConfig
from osd.engine.request import PairPrompt, SideLimits, check_request
from osd.engine.served import API_KEY_VARIABLE, DIRECT, through_proxy, weights_digest, without_engine
from osd.engine.wire import FIELD, INFO_ROUTE, record_from_json

if TYPE_CHECKING:
    from osd.core import MixingConfig, TokenRecord

_CONNECT_SECONDS = 10.0
_LONGEST_PAUSE = 5.0  # seconds between two looks for a server that is away
_TIMEOUTS = 3  # of one request, before the run ends
_BUSY = (429, 502, 503, 504)


@dataclass(frozen=True, kw_only=True)
class RemoteCompletion:
    """The result of one request; attributes as in `osd.engine.request.PairCompletion`."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    error: str | None
    record: TokenRecord | None
    weights_version: int


class _Away(Exception):
    """The server did not answer, or is too busy: ask again later, or another."""


@dataclass
class _Server:
    """One server. `back` is held by the task that checks whether the server answers again."""

    url: str
    back: asyncio.Lock = field(default_factory=asyncio.Lock)


class ServerPair:
    """A pair that `osd serve` processes sample from; takes the place of `osd.data.pair.EnginePair`.

    Raises:
        ValueError: models that are missing here (their tokenizers render the prompts), sampling parameters that a server does
            not take, servers whose mixing is not that of the settings or that serve different pairs.
        RuntimeError: no server answers within `server_wait` seconds.
    """

    def __init__(self, settings: GenerateConfig) -> None:
        from osd.engine.config import PairConfig
        from osd.engine.engine import checked_params
        from osd.validate_models import check_models, load_tokenizer

        self.settings, self.mixing = settings, settings.mixing()
        self.urls = settings.server_urls()
        kwargs: dict[str, Any] = without_engine(settings.pair_kwargs())
        config = PairConfig(
            teacher=str(settings.teacher_model_name_or_path),
            student=str(settings.model_name_or_path),
            mixing=self.mixing,
            **kwargs,
        )
        self._checked_params = checked_params
        checked_params(settings.sampling())
        check_models(config)
        self.teacher_tokenizer, self.student_tokenizer = (load_tokenizer(config, side) for side in ("teacher", "student"))
        self._info: dict[str, Any] = {}
        self._updated: set[str] = set()  # servers whose student is not that of its files
        self._last_answer = 0.0
        self._asking = 0
        if not settings.dry_run:
            asyncio.run(self._connect())

    def refusal(self, request: Request, sampling: dict[str, Any]) -> str | None:
        limits = {side: SideLimits(**given) for side, given in self._info["limits"].items()}
        prompt = PairPrompt(teacher_token_ids=request.teacher.token_ids, student_token_ids=request.student.token_ids)
        try:
            check_request(prompt, self._checked_params(sampling), limits)
        except ValueError as error:
            return str(error)
        return None

    def sample(
        self,
        requests: Sequence[Request],
        sampling: dict[str, Any],
        *,
        alpha: float | None = None,
        mixing: MixingConfig | None = None,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[RemoteCompletion]:
        assert mixing in (None, self.mixing), "the servers' mixing is theirs"
        bodies = [self._body(request, sampling, alpha) for request in requests]
        return asyncio.run(self._all(bodies, on_finished or (lambda tokens: None)))

    def close(self) -> None:
        """Do nothing: the servers go on."""

    def __enter__(self) -> ServerPair:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def _body(self, request: Request, sampling: dict[str, Any], alpha: float | None) -> dict[str, Any]:
        options = {"student_prompt_token_ids": request.student.token_ids, "alpha": alpha, "record": True}
        prompt = {"prompt": request.teacher.token_ids, "seed": request.seed, "return_token_ids": True}
        return {**sampling, **prompt, FIELD: options}

    # -- what the servers are -------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        """Wait for the first server; check it, and every other that is there."""
        async with self._client() as client:
            self._start_waiting()
            pause = 0.1
            while not any(await asyncio.gather(*(self._look(client, url) for url in self.urls))):
                self._check_waiting()
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _look(self, client: httpx.AsyncClient, url: str) -> bool:
        """Return whether a server answers. Raises a ValueError if it serves another pair than the settings or the others."""
        try:
            answer = await client.get(f"{url}{INFO_ROUTE}", timeout=_CONNECT_SECONDS)
        except httpx.TransportError:
            return False
        _check_access(url, answer)
        if answer.status_code != 200:
            return False
        info = answer.json()
        updates = info.pop("weight_updates", 0)
        info |= {side: PurePath(info[side]).name for side in ("teacher", "student")}  # folders differ between machines
        if updates and url not in self._updated:
            self._updated.add(url)
            warnings.warn(
                f"the student of server {url} has weights that a trainer pushed, not those of its files", stacklevel=2
            )
        if not self._info:
            self._check_info(url, info)
            self._info = info
        elif difference := _difference(info, self._info):
            raise ValueError(f"server {url} is not the pair that the others are: {difference}; restart it")
        return True

    def _check_info(self, url: str, info: dict[str, Any]) -> None:
        if info["mixing"] != (wanted := self.mixing.to_dict()):
            raise ValueError(
                f"server {url} has other mixing settings: {_difference(info['mixing'], wanted)}; "
                "change the settings, or start the server with the same options"
            )
        if unknown := sorted(self.settings.sampling().keys() - set(info["fields"])):
            raise ValueError(f"generation_kwargs has {unknown[0]!r}, which a server does not take; remove it")
        names = {"teacher": self.settings.teacher_model_name_or_path, "student": self.settings.model_name_or_path}
        for side, name in names.items():
            if PurePath(str(name)).name != info[side]:
                warnings.warn(f"the {side} of server {url} is {info[side]!r}, and of the settings {name!r}", stacklevel=2)
            elif None not in (digests := (weights_digest(str(name)), info[f"{side}_weights"])) and digests[0] != digests[1]:
                warnings.warn(f"the {side} of server {url} has other weights than {name!r} of the settings", stacklevel=2)

    def _client(self) -> httpx.AsyncClient:
        key = self.settings.api_key or os.environ.get(API_KEY_VARIABLE)
        connections = self.settings.server_concurrency * len(self.urls)
        return httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(self.settings.server_timeout, connect=_CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=connections + len(self.urls), max_keepalive_connections=connections),
            mounts=DIRECT,
        )

    # -- one batch ------------------------------------------------------------------------------------------------------

    async def _all(self, bodies: Sequence[dict[str, Any]], on_finished: Callable[[int], None]) -> list[RemoteCompletion]:
        """Return the completion of every request, in order."""
        answers: dict[int, RemoteCompletion] = {}
        waiting: asyncio.Queue[int] = asyncio.Queue()
        for index in range(len(bodies)):
            waiting.put_nowait(index)
        timeouts = [0] * len(bodies)
        whole = asyncio.Event()

        async def lane(client: httpx.AsyncClient, server: _Server) -> None:
            while True:
                index = await waiting.get()
                try:
                    answer = await self._ask(client, server, bodies[index])
                except _Away as error:
                    timeouts[index] += isinstance(error.__cause__, httpx.ReadTimeout)
                    waiting.put_nowait(index)
                    if timeouts[index] >= _TIMEOUTS:
                        raise RuntimeError(
                            f"a request had no answer {_TIMEOUTS} times within server_timeout={self.settings.server_timeout:g} "
                            "seconds; raise it, or lower server_concurrency"
                        ) from error
                    await self._until_back(client, server)
                    continue
                answers[index] = answer
                on_finished(len(answer.token_ids))
                if len(answers) == len(bodies):
                    whole.set()

        self._start_waiting()
        servers = [_Server(url) for url in self.urls]
        lanes = min(self.settings.server_concurrency, len(bodies))
        async with self._client() as client:
            work = [lane(client, server) for server in servers for _ in range(lanes)]
            await _until_set(whole, work)
        return [answers[index] for index in range(len(bodies))]

    async def _ask(self, client: httpx.AsyncClient, server: _Server, body: dict[str, Any]) -> RemoteCompletion:
        """Send one request; raises `_Away` if another attempt may succeed."""
        self._asking += 1
        try:
            answer = await client.post(f"{server.url}/v1/completions", json=body)
        except httpx.TransportError as error:
            raise _Away from error
        finally:
            self._asking -= 1
        _check_access(server.url, answer)
        if answer.status_code in _BUSY:
            raise _Away
        if answer.status_code >= 500 and not await self._healthy(client, server):
            raise _Away
        try:
            completion = _completion(answer)
        except (KeyError, TypeError, ValueError) as error:  # half an answer, or a proxy's page
            raise _Away from error
        self._start_waiting()
        return completion

    async def _healthy(self, client: httpx.AsyncClient, server: _Server) -> bool:
        with suppress(httpx.TransportError):
            return (await client.get(f"{server.url}/health", timeout=_CONNECT_SECONDS)).status_code == 200
        return False

    async def _until_back(self, client: httpx.AsyncClient, server: _Server) -> None:
        """Wait until a server answers again. One lane checks; the others wait for it."""
        async with server.back:
            pause = 0.1
            while True:
                self._check_waiting()
                await asyncio.sleep(pause)
                if await self._look(client, server.url):
                    return
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _start_waiting(self) -> None:
        self._last_answer = asyncio.get_running_loop().time()

    def _check_waiting(self) -> None:
        """Raise if no server has answered for `server_wait` seconds, and none is at work."""
        waited = asyncio.get_running_loop().time() - self._last_answer
        if not self._asking and waited > self.settings.server_wait:
            urls = ", ".join(url + through_proxy(url) for url in self.urls)
            raise RuntimeError(f"no server has answered for {waited:.0f} seconds (server_wait): {urls}")


async def _until_set(event: asyncio.Event, work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run endless coroutines until an event is set; raise what one of them raises."""
    tasks = [asyncio.ensure_future(event.wait()), *map(asyncio.ensure_future, work)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0] not in done:
            await next(iter(done))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _completion(answer: httpx.Response) -> RemoteCompletion:
    if answer.status_code != 200:
        error = str(answer.json()["error"]["message"])
        return RemoteCompletion(token_ids=[], text="", finish_reason="error", error=error, record=None, weights_version=0)
    [choice] = answer.json()["choices"]
    record = record_from_json(choice[FIELD])
    if len(record) != len(choice["token_ids"]):
        raise ValueError(f"a record of {len(record)} tokens for {len(choice['token_ids'])}")
    return RemoteCompletion(
        token_ids=choice["token_ids"],
        text=choice["text"],
        finish_reason=choice["finish_reason"],
        error=None,
        record=record,
        weights_version=record.weights_version,
    )


def _check_access(url: str, answer: httpx.Response) -> None:
    """Raise if another attempt would get the same refusal: a wrong API key, or not an `osd serve`."""
    if answer.status_code in (401, 403):
        raise ValueError(f"server {url} refuses the API key; set api_key or the variable {API_KEY_VARIABLE}")
    if answer.status_code == 404:
        raise ValueError(f"server {url} is not an `osd serve`; start one there, or correct the URL (http://host:port)")


def _difference(given: dict[str, Any], other: dict[str, Any]) -> str:
    names = [name for name in {**given, **other} if given.get(name) != other.get(name)]
    return ", ".join(f"{name} is {given.get(name)!r:.100}, not {other.get(name)!r:.100}" for name in names)
