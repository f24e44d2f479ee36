"""RemoteEngine: the pair of an `osd serve` process, as a trainer in other processes uses it; takes the place of `PairEngine`.

Every process of a training run has one. Each sends its own prompts; the main process alone pushes weights. If a call of
`generate` or `load_student_weights` fails in one process, it raises in all of them.

A batch is drawn from the weights of one sync. Every request and every answer names that sync. If the server goes away, the
engine waits for it. If it comes back without those weights, `ServerLost` is raised: the caller syncs again and asks for the
rest of the batch.

`begin` asks for a batch in a thread, while the caller does other things. The thread makes HTTP requests and no collective
calls. What would change weights or mixing waits until the thread has ended (`settle`). With ``running``, several batches can
be in the background, and a sync does not end their requests. Answers name all syncs that drew a completion's tokens. `finish`
knows them: by then, every process is past these syncs.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import torch
from accelerate.utils import gather_object, set_seed

from osd.core import MixingConfig
from osd.engine.remote_batch import Batch
from osd.engine.remote_weights import ServerLost, WeightSender
from osd.engine.request import PairCompletion, PairPrompt, SideLimits, draw_seeds, one_each
from osd.engine.served import LONGEST_PAUSE, ServedPair, error_message
from osd.engine.wire import SAMPLE_ROUTE, frames, unpack
from osd.validate_models import load_tokenizer

_MOST_LOSSES = 5  # of the weights, in one batch


class RemoteEngine:
    """The pair of a server; methods and attributes as of `PairEngine`. Collective: every process of a run calls each method.

    Args:
        pair: the server and its models.
        rank: of this process; the process of rank 0 pushes the weights.
        device: of this process, for NCCL.
        running: syncs come under the running requests of the batches in the background, of which there can be several.

    Attributes:
        updates: optimizer updates of the weights that the next sync pushes; whoever syncs sets it.

    Raises:
        ValueError, RuntimeError: as `ServedPair.info`; another trainer uses the server.
    """

    asleep = False

    def __init__(self, pair: ServedPair, *, rank: int = 0, device: torch.device | None = None, running: bool = False) -> None:
        self.pair, self.config, self.mixing = pair, pair.config, pair.config.mixing
        self.rank, self.device = rank, device or torch.device("cpu")
        self.running, self.updates = running, 0
        self._ahead: list[Batch] = []  # in the order in which threads began to ask for them
        self._since = 0.0  # when the last completion came, or a batch was asked for (`time.monotonic`)
        self._sync: str | None = None
        self._updates_at: dict[str | None, int] = {None: 0}  # of every sync, by its name
        self._stale = False
        self._client = pair.client()
        self._sender = WeightSender(pair, self._client, self.device)
        seed = self.config.engine_kwargs.get("seed", 0) + rank
        self._seed = random.Random(str(seed)).getrandbits(63)
        self.tokenizer: Any = load_tokenizer(self.config, "teacher")
        self.student_tokenizer: Any = load_tokenizer(self.config, "student")
        self._trainer, self.weights_version = self._connect()
        info = pair.info()
        self.limits = {side: SideLimits(**given) for side, given in info["limits"].items()}
        self.config = replace(self.config, engine_kwargs={**self.config.engine_kwargs, "dtype": info["state"]["dtype"]})
        set_seed(seed)  # as vLLM does in a process where an engine starts: a run draws the same in both modes

    @property
    def student_is_whole(self) -> bool:
        """True if no weight sync was made, or the last one succeeded."""
        return not self._stale

    # -- what all processes do together -----------------------------------------------------------------------------

    def _connect(self) -> tuple[str, int]:
        """Take the server for this run, from its main process; return the run's id and the version of the student's weights."""
        held, failure = None, None
        if self.rank == 0:
            try:
                held = self._sender.connect()
            except Exception as error:
                failure = error
        return self._agree(failure, held)[0]

    def _agree(self, failure: Exception | None, result: Any = None) -> list[Any]:
        """Return the results of all processes; raise in every process if one has failed.

        A process raises its own error, or else the first of the others'; a `ServerLost` only if there is nothing worse.
        """
        kind = None if failure is None else ("lost" if isinstance(failure, ServerLost) else type(failure).__name__)
        outcomes = gather_object([(kind, str(failure), result)])
        if failure is not None and not isinstance(failure, ServerLost):
            raise failure
        for rank, (other, message, _) in enumerate(outcomes):
            if other not in (None, "lost"):
                raise RuntimeError(f"process {rank} failed ({other}: {message}), and all of them stop")
        if lost := [message for other, message, _ in outcomes if other == "lost"]:
            self._stale = True
            raise failure or ServerLost(lost[0])
        return [result for *_, result in outcomes]

    # -- sampling ---------------------------------------------------------------------------------------------------

    def set_mixing(self, mixing: MixingConfig) -> None:
        """Replace the mixing (``self.mixing``), from the next batch on."""
        self.mixing = mixing

    def generate(
        self, prompts: Sequence[PairPrompt], *, sampling: dict[str, Any] | Sequence[dict[str, Any]], **options: Any
    ) -> list[PairCompletion]:
        """Sample one completion per prompt, in the order of the prompts; arguments as of `PairEngine.generate`.

        Raises:
            ValueError: what the server refuses; nothing has been sampled then.
            ServerLost: its ``batch`` has the completions that came before.
            RuntimeError: the last weight sync failed; no completion within the timeout; another trainer uses the server.
        """
        return self.finish(self._batch(prompts, sampling, self.mixing, **options))

    def _batch(
        self,
        prompts: Sequence[PairPrompt],
        sampling: dict[str, Any] | Sequence[dict[str, Any]],
        mixing: MixingConfig,
        *,
        alpha: float | Sequence[float | None] | None = None,
        **options: Any,
    ) -> Batch:
        per_prompt = one_each("sampling", sampling, len(prompts))
        body: dict[str, Any] = {
            "prompts": [[list(prompt.teacher_token_ids), list(prompt.student_token_ids)] for prompt in prompts],
            "sampling": [sampling] if isinstance(sampling, dict) else per_prompt,
            "seeds": draw_seeds([params.get("seed") for params in per_prompt], self._seed),
            "alpha": one_each("alpha", alpha, len(prompts)),
            "mixing": mixing.to_dict(),
            "mix_tokens": None,
            "teacher_only": False,
            "hidden": False,
            "topk": 0,
            "running": False,
            **options,
        }
        return Batch(body, list(prompts))

    def begin(
        self,
        prompts: Sequence[PairPrompt],
        *,
        sampling: dict[str, Any],
        mixing: MixingConfig,
        alpha: float | Sequence[float | None] | None = None,
        **options: Any,
    ) -> Batch:
        """Ask for a batch in the background and return it; `finish` waits for its completions.

        Its weights are those of the last sync, and one batch is in the background at most; with ``running``, its weights are
        those of each sync while it runs. Errors come with `finish`, or before it with any call that must wait for the batch
        (`generate`, `load_student_weights`).

        Args:
            mixing: of this batch, whatever `set_mixing` chooses meanwhile. With ``running`` the server draws every token with
                the mixing of the batch that was begun last, as the token's record says.
            prompts, sampling, alpha, options: as of `generate`.
        """
        if not self.running:
            self.drop()
        batch = self._batch(prompts, sampling, mixing, alpha=alpha, running=self.running, **options)
        self._ahead.append(batch)
        self._since = time.monotonic()
        batch.start(self._ask)
        return batch

    def settle(self) -> None:
        """Wait until no process has a batch in the background. All of its completions are kept.

        With ``running`` nothing waits for them, and this does nothing.

        Raises:
            ValueError, RuntimeError: as `generate`, except for `ServerLost`: `finish` asks for what is missing then.
        """
        if self.running or not self._ahead:
            return
        [batch] = self._ahead
        batch.join()
        self._ahead = []
        self._agree(None if isinstance(batch.failure, ServerLost) else batch.failure)

    def drop(self) -> None:
        """End the batches in the background, if there are any; not collective."""
        for batch in self._ahead:
            batch.cancel()
        self._ahead = []

    def finish(self, batch: Batch) -> list[PairCompletion]:
        """Return the completions of a batch; asks for those that have not come. Raises as `generate`."""
        self.settle()
        failure: Exception | None = None
        self._since = time.monotonic()
        try:
            if batch in self._ahead:
                batch.join()
                self._ahead.remove(batch)
                if not isinstance(batch.failure, ServerLost | None):
                    raise batch.failure
            if self._stale:
                raise RuntimeError("the student's weights are not to be sampled from (the last sync failed); sync them first")
            self._ask(batch)
            if unknown := {name for of in batch.drawn_by.values() for name in of.values()} - self._updates_at.keys():
                raise RuntimeError(f"server {self.pair.url} answered from weights that this run never pushed: {unknown}")
        except Exception as error:
            failure = error
        try:
            self._agree(failure)
        except ServerLost as error:
            batch.lost += 1
            if batch.lost == _MOST_LOSSES:
                raise RuntimeError(f"the server went away {_MOST_LOSSES} times in one batch; the last time: {error}") from error
            error.batch = batch
            raise
        return [batch.completions[i] for i in range(len(batch.prompts))]

    def updates_of(self, batch: Batch) -> list[dict[int, int]]:
        """Return the optimizer updates of the weights that drew each completion of a finished batch, by their version."""
        places = range(len(batch.prompts))
        return [{version: self._updates_at[name] for version, name in batch.drawn_by[i].items()} for i in places]

    def _ask(self, batch: Batch) -> None:
        pause = 0.1
        while not (batch.is_whole or batch.cancelled.is_set()):
            before = len(batch.completions)
            try:
                self._ask_once(batch)
            except (httpx.TransportError, _HalfAnswer) as error:
                if batch.cancelled.is_set():
                    return
                self._check_still_there(batch, error)
            pause = 0.1 if len(batch.completions) > before else min(2 * pause, LONGEST_PAUSE)
            self._check_progress(batch)
            if not batch.is_whole:
                batch.cancelled.wait(pause)

    def _check_progress(self, batch: Batch) -> None:
        """Raise if no completion has come for too long. A sync pauses the requests, and has timeouts of its own."""
        if not self._stale and (waited := time.monotonic() - self._since) > self.pair.timeout:
            raise RuntimeError(
                f"server {self.pair.url} has not finished a completion for {waited:.0f} seconds, and "
                f"{len(batch.prompts) - len(batch.completions)} of {len(batch.prompts)} are left; if completions take that "
                f"long, raise vllm_server_timeout{batch.trouble and f' (the server says: {batch.trouble})'}"
            )

    def _ask_once(self, batch: Batch) -> None:
        """Ask for what is left of a batch, and take what comes."""
        places, body = batch.rest()
        if self.running:  # the server has one mixing for all requests
            body["mixing"] = [batch, *self._ahead][-1].body["mixing"]
        content = _json({**body, "trainer": self._trainer, "sync": self._sync})
        with self._client.stream("POST", SAMPLE_ROUTE, content=content) as answer:
            batch.reads(answer)
            if answer.status_code != 200:
                answer.read()
                self._refuse(answer)
            for data in _whole_frames(answer):
                if batch.cancelled.is_set():
                    return
                if data:
                    self._take(batch, places, *unpack(data))
                else:  # a sign of life
                    self._check_progress(batch)

    def _refuse(self, answer: httpx.Response) -> None:
        message = f"server {self.pair.url}: {error_message(answer)}"
        if answer.status_code == 409:
            raise ServerLost(message)
        if answer.status_code in (400, 401, 403, 404, 422):
            raise ValueError(message)
        raise _HalfAnswer(message)

    def _take(self, batch: Batch, places: list[int], of: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if of["status"] == 400:
            raise ValueError(f"server {self.pair.url}: {of['message']}")
        if of["status"] == 500:
            place = places[of["index"]]
            raise RuntimeError(f"server {self.pair.url} cannot sample prompt {place} of the batch: {of['message']}")
        if of["status"] != 200:
            batch.trouble = of["message"]
            return  # `_ask` asks for it again
        syncs = set(of["syncs"].values())
        if not batch.body["running"] and syncs != {self._sync}:
            raise ServerLost(f"server {self.pair.url} answered from the weights {syncs}, not {self._sync!r}")
        batch.take(places[of["index"]], of, tensors)
        self._since = time.monotonic()

    def _check_still_there(self, batch: Batch, error: Exception) -> None:
        """Wait for the server; raise `ServerLost` if it no longer has the weights (with ``running``, any of this run)."""
        state = self.pair.wait(self._client, batch.cancelled)["state"]
        in_sync = batch.body["running"] or (state["sync"] == self._sync and state["whole"])
        if state["trainer"] != self._trainer or not in_sync:
            raise ServerLost(f"server {self.pair.url} went away ({error}), and came back without the student's weights")

    # -- the student's weights --------------------------------------------------------------------------------------

    def load_student_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, partial: bool = False) -> int:
        """Push a live student into the server; return the new ``weights_version``, which is the server's own count.

        Every process walks through ``named_tensors``, whose shards are gathered on the way; the main process sends them.

        Raises:
            ServerLost: the server went away meanwhile.
            ValueError, RuntimeError: as `PairEngine`; what the server refuses.
        """
        self.settle()
        self._stale = True
        tensors, name = iter(named_tensors), uuid.uuid4().hex
        failure, pushed = None, None
        try:
            if self.rank == 0:
                pushed = self._sender.push(tensors, name, partial=partial, running=self.running)
        except Exception as error:
            failure = error
        try:
            for _ in tensors:  # gathers are collective, also after a failure
                pass
        except Exception as error:
            failure = failure or error
        name, (self._trainer, self.weights_version) = self._agree(failure, (name, pushed))[0]
        self._sync = name
        self._since = time.monotonic()
        self._stale = False
        self._updates_at.pop(None, None)  # the weights on the server's disk are never this run's again
        self._updates_at[name] = self.updates
        for batch in self._ahead:
            if isinstance(batch.failure, ServerLost):
                batch.start(self._ask)
        return self.weights_version

    # -- the teacher's output layer ---------------------------------------------------------------------------------

    def teacher_lm_head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a copy of the teacher's output layer on this process's device: weight [V, H] and bias [V] or None.

        Raises:
            RuntimeError: logits that are not one layer's product with the hidden state.
        """
        return self.pair.output_layer(self._client, self.limits["teacher"].vocab_size, self.device)

    # -- the rest of PairEngine -------------------------------------------------------------------------------------

    def wake_up(self) -> None:
        """Do nothing: the server is awake."""

    def sleep(self) -> None:
        """Raise: other clients may use the server."""
        raise RuntimeError("a server does not sleep; leave enable_sleep_mode out")

    def close(self) -> None:
        """End this run's hold on the server, which goes on. Idempotent."""
        self.drop()
        self._sender.disconnect()
        self._client.close()


class _HalfAnswer(Exception):
    """An answer that ended too early, or that asks to come back later."""


def _whole_frames(answer: httpx.Response) -> Iterator[bytes]:
    try:
        yield from frames(answer.iter_raw())
    except ValueError as error:
        raise _HalfAnswer(str(error)) from error


def _json(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body).encode()
    except TypeError as error:
        raise ValueError(f"a sampling parameter cannot be sent to a server: {error}; use plain values") from None
