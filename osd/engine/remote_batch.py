"""Batch: prompts that are sampled through a server, by the caller's thread or by one of its own."""

from __future__ import annotations

import atexit
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any
from weakref import WeakSet

import httpx
import torch

from osd.core import RECORD_FIELDS, TokenRecord
from osd.engine.request import PairCompletion, PairPrompt

_END_SECONDS = 10.0  # for a thread to end after `cancel`
_started: WeakSet[Batch] = WeakSet()  # with a thread; one that has not ended keeps its batch alive


@dataclass(eq=False)
class Batch:
    """Prompts that are being sampled through the server.

    Attributes:
        body: of the request for all of them.
        prompts: token ids of both sides.
        completions: those that have come, by place.
        drawn_by: the names of the syncs that drew each of them, by place and by version of the weights.
        lost: how often the server has lost the weights meanwhile.
        trouble: why the server did not finish a prompt, the last time it said so.
        failure: the error that ended the batch's own thread.
        cancelled: set when nobody waits for the batch any longer.
    """

    body: dict[str, Any]
    prompts: list[PairPrompt]
    completions: dict[int, PairCompletion] = field(default_factory=dict)
    drawn_by: dict[int, dict[int, str | None]] = field(default_factory=dict)
    lost: int = 0
    trouble: str = ""
    failure: Exception | None = None
    cancelled: Event = field(default_factory=Event)
    _answer: httpx.Response | None = None
    _thread: Thread | None = None

    @property
    def is_whole(self) -> bool:
        """Every prompt has its completion."""
        return len(self.completions) == len(self.prompts)

    def rest(self) -> tuple[list[int], dict[str, Any]]:
        """Return the places of the prompts that have no completion, and the body of a request for these."""
        places = [i for i in range(len(self.prompts)) if i not in self.completions]
        body = {name: [self.body[name][i] for i in places] for name in ("prompts", "alpha", "seeds")}
        sampling = self.body["sampling"]
        return places, {**self.body, **body, "sampling": [sampling[i] for i in places] if len(sampling) > 1 else sampling}

    def take(self, place: int, of: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Keep a completion, as the server describes it."""
        self.drawn_by[place] = {int(version): name for version, name in of["syncs"].items()}
        self.completions[place] = _completion(self.prompts[place], of, tensors)

    # -- in a thread of its own -------------------------------------------------------------------------------------

    def start(self, ask: Callable[[Batch], None]) -> None:
        """Call ``ask`` with this batch in a new thread. Its error becomes `failure`."""

        def work() -> None:
            try:
                ask(self)
            except Exception as error:
                self.failure = error

        self.failure = None
        _started.add(self)
        # A daemon: the interpreter does not wait for it, however it ends.
        self._thread = Thread(target=work, name="osd-batch", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the thread has ended, if there is one."""
        if self._thread is not None:
            self._thread.join()

    def reads(self, answer: httpx.Response) -> None:
        """Note which answer the thread reads, so that `cancel` can end it."""
        self._answer = answer
        if self.cancelled.is_set():
            self._hang_up()

    def cancel(self) -> None:
        """End the thread and with it the server's work. Waits for that, but not for a server that hangs.

        A thread that still waits for one then reads no further completion.
        """
        self.cancelled.set()
        if self._thread is not None and self._thread.is_alive():
            self._hang_up()
            self._thread.join(_END_SECONDS)

    def _hang_up(self) -> None:
        # Closing a socket does not wake a thread that reads from it; shutting it down does.
        stream = self._answer and self._answer.extensions.get("network_stream")
        if stream and (sock := stream.get_extra_info("socket")) is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@atexit.register
def _cancel_all() -> None:
    """End the threads before the interpreter ends, which aborts the process if a daemon thread is inside a call of torch."""
    for batch in list(_started):
        batch.cancel()


def _completion(prompt: PairPrompt, of: dict[str, Any], tensors: dict[str, torch.Tensor]) -> PairCompletion:
    failed = of["finish_reason"] == "error"
    reason = of["stop_reason"] or "vLLM gives no reason; a grammar that no token can continue is one"
    values_TR = tensors.get("values", torch.empty(0, len(RECORD_FIELDS)))
    return PairCompletion(
        token_ids=tensors["token_ids"].tolist(),
        text=of["text"],
        finish_reason=of["finish_reason"],
        stop_reason=None if failed else of["stop_reason"],
        error=str(reason).removeprefix("osd: ") if failed else None,
        record=TokenRecord(
            values_TR=values_TR,
            teacher_hidden_TH=tensors.get("hidden"),
            teacher_topk_TX=tensors.get("topk"),
            weights_version=of["version"],
            origin_T=tensors.get("origin"),
            version_T=tensors.get("version"),
        ),
        weights_version=of["version"],
        teacher_prompt_tokens=len(prompt.teacher_token_ids),
        student_prompt_tokens=len(prompt.student_token_ids),
        teacher_cached_tokens=of["teacher_cached"],
        student_cached_tokens=of["student_cached"],
    )
