"""One HTTP request of a pair's server: takes the options out of its body, and puts the records into its answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers

from osd.engine.request import PairOptions
from osd.engine.wire import EventStream, add_records


@dataclass
class HttpRequest:
    """The HTTP request being served, as the middleware sees it.

    Attributes:
        path: its route.
        query: its query string.
        options: the pair's options, once its body was read.
        calls: the number of its engine requests, one per prompt.
        records: the records of finished choices, by index.
    """

    path: str
    query: str = ""
    options: PairOptions | None = None
    calls: int = 0
    records: dict[int, dict[str, list[Any]]] = field(default_factory=dict)

    @property
    def wants_records(self) -> bool:
        return self.options is not None and self.options.return_record

    @contextmanager
    def served(self) -> Iterator[None]:
        """Make this the current request inside the body and in the tasks started there."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    @staticmethod
    def current() -> HttpRequest | None:
        """Return the request being served."""
        return _current.get()


_current: ContextVar[HttpRequest | None] = ContextVar("osd_http_request", default=None)


def reading(
    read_body: Callable[[HttpRequest, bytes], Awaitable[bytes]], request: HttpRequest, receive: Any
) -> Callable[[], Awaitable[Any]]:
    """Return a ``receive`` that takes the pair's options out of the body.

    The route calls it after the API key was checked, and answers the HTTPException in OpenAI's form.
    """
    read = False

    async def receiving() -> Any:
        nonlocal read
        message = await receive()
        if read or message["type"] != "http.request":
            return message
        parts = [message.get("body", b"")]
        while message.get("more_body"):
            message = await receive()
            if message["type"] != "http.request":
                return message
            parts.append(message.get("body", b""))
        read = True
        try:
            body = await read_body(request, b"".join(parts))
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving


class Sender:
    """A ``send`` that adds the records to the answer of a request that wants them."""

    def __init__(self, request: HttpRequest, send: Any) -> None:
        self.request, self.send = request, send
        self._start: Any = None
        self._body = b""
        self._events: EventStream | None = None

    async def __call__(self, message: Any) -> None:
        if not self.request.wants_records:
            return await self.send(message)
        if message["type"] == "http.response.start":
            if Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream"):
                self._events = EventStream(self.request.records)
                return await self.send(message)
            self._start = message
            return None
        if message["type"] != "http.response.body":
            return await self.send(message)
        last = not message.get("more_body", False)
        if self._events is not None:
            return await self.send({**message, "body": self._events.feed(message.get("body", b""), last=last)})
        self._body += message.get("body", b"")
        if not last:
            return None
        body = add_records(self._body, self.request.records)
        headers = [(name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"]
        await self.send({**self._start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self.send({**message, "body": body})
        return None
