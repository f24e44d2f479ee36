"""A pair's server as a trainer uses it: weights pushed into its student, batches sampled with their record as bytes.

Weights come by vLLM's own routes (`/start_weight_update`, `/update_weights`, `/finish_weight_update`). An update begins by
ending the running requests, or by pausing them if the trainer asks for that (`running`); vLLM's scheduler stays paused until
every weight is there. Paused requests then go on with the new weights, under which the student's part of their KV is computed
anew; the teacher's is still right. A trainer adds to these routes

- a connection that stays open (`TRAINER_ROUTE`): while it is, no other trainer may update the weights;
- the name of its update, which it asks for in every batch (`SAMPLE_ROUTE`), unless its updates come under running requests;
  every answer has the names of the updates that drew its tokens.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import numpy as np
import torch
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from vllm.exceptions import GracefulHTTPError
from vllm.inputs.engine import tokens_input

from osd.core import MixingConfig
from osd.engine.asgi import HttpRequest
from osd.engine.backend.configuration import mixing_config
from osd.engine.backend.frontend import checked_params
from osd.engine.request import PairOptions, PairPrompt, check_request
from osd.engine.wire import (
    HEAD_ROUTE,
    SAMPLE_ROUTE,
    STATE_ROUTE,
    TRAINER_ROUTE,
    WEIGHTS_ROUTE,
    framed,
    pack,
    returned,
    split_rows,
)

_END_SECONDS = 30.0  # for paused requests to end; a worker that waits for a dead trainer's broadcast ends none
_PULSE_SECONDS = 1.0  # between two signs of life on a trainer's connections


class Training:
    """A trainer's access to one server, and the state of its student.

    Attributes:
        whole: the student has all weights of one update, or its files'.
        version: number of updates so far, failed ones included.
        sync: the name of the last update; None: its files' weights, or an update without a name.
        syncs: the names of all of them, by version.
        trainer: the id of the trainer that holds the server.
    """

    def __init__(self, app: Any, limits: Any) -> None:
        app_state = app.state
        self.client, self.limits = app_state.engine_client, limits
        config = self.client.vllm_config
        self.transfer = getattr(config.weight_transfer_config, "backend", None)
        self.mixing = self._own_mixing = mixing_config(config)
        self.dtype, self.hidden_size = config.model_config.dtype, config.model_config.get_hidden_size()
        self.whole, self.version = True, 0
        self.sync: str | None = None
        self.syncs: dict[int, str | None] = {0: None}
        self.trainer: str | None = None
        self._keeps = False  # an update has paused the running requests
        self._mixes, self._updates = asyncio.Lock(), asyncio.Lock()
        self._names = (f"osd-batch-{number}" for number in itertools.count())
        self._generate = self.client.generate
        if self.transfer is not None:
            for name in ("init_weight_transfer_engine", "update_weights"):
                setattr(self.client, name, self._of_trainer(getattr(self.client, name)))
            self.client.start_weight_update, self.client.finish_weight_update = self.start_update, self.finish_update
            _add_weight_routes(app)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one of the routes below `INFO_ROUTE`."""
        http = Request(scope, receive)
        try:
            if http.url.path.endswith(STATE_ROUTE) and http.method == "GET":
                return await self._state()(scope, receive, send)
            if self.transfer is None:
                raise HTTPException(404, "this server takes no weights; start it with --weight-transfer-config")
            if http.url.path.endswith(HEAD_ROUTE) and http.method == "GET":
                return await (await self._head(http))(scope, receive, send)
            if http.method != "POST":
                raise HTTPException(404, f"{http.method} {http.url.path} is not a route of this server")
            if http.url.path.endswith(TRAINER_ROUTE):
                return await self._hold(http, send)
            if http.url.path.endswith(SAMPLE_ROUTE):
                return await self._sample(http, send)
            if http.url.path.endswith(WEIGHTS_ROUTE):
                return await (await self._add_weights(http))(scope, receive, send)
            raise HTTPException(404, f"{http.url.path} is not a route of this server")
        except HTTPException as error:
            return await _error(error.status_code, error.detail)(scope, receive, send)
        except ValueError as error:
            return await _error(400, str(error))(scope, receive, send)
        except (LookupError, TypeError, AttributeError) as error:
            return await _error(400, f"this is not a body of {http.url.path}: {error!r}")(scope, receive, send)
        except Exception as error:
            return await _error(500, f"{type(error).__name__}: {error}")(scope, receive, send)

    def _state(self) -> Response:
        names = ("transfer", "whole", "version", "sync", "trainer")
        state = {name: getattr(self, name) for name in names}
        return JSONResponse({**state, "mixing": self.mixing.to_dict(), "dtype": str(self.dtype).removeprefix("torch.")})

    # -- one trainer ------------------------------------------------------------------------------------------------

    async def _hold(self, http: Request, send: Any) -> None:
        """Keep the server for one trainer until its connection ends: with its process, whatever ends that."""
        trainer = str((await http.json())["trainer"])
        if self.trainer is not None:
            raise HTTPException(409, f"another trainer ({self.trainer}) uses this server; end it, or start another server")
        self.trainer = trainer
        gone = asyncio.create_task(_disconnected(http))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while not gone.done() and not self.client.errored:
                await send({"type": "http.response.body", "body": b"\n", "more_body": True})
                await asyncio.wait({gone}, timeout=_PULSE_SECONDS)
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            with suppress(Exception):  # a dead engine
                async with self._updates:
                    if self._keeps:  # an update that never ended has paused them
                        await asyncio.wait_for(self._end_requests(), _END_SECONDS)
                await self._mix(self._own_mixing)
            self.trainer = None

    def _check_trainer(self, trainer: str | None) -> None:
        if trainer != self.trainer:
            raise HTTPException(
                409,
                f"another trainer ({self.trainer}) uses this server"
                if self.trainer is not None
                else "this trainer's connection to the server has ended",
            )

    # -- the student's weights --------------------------------------------------------------------------------------

    async def start_update(self) -> None:
        """End or pause every running request, and begin an update; stands before the client's ``start_weight_update``."""
        partial, running = (_query().get(name) == "true" for name in ("partial", "running"))
        # A trainer that died may have left a call that still runs. `_mix` must not let requests go on.
        async with self._updates, self._mixes:
            self._check_trainer(_query().get("trainer"))
            self.whole, self.sync = False, None
            if running and self.trainer is not None:  # whose connection says when to end them after all
                self._keeps = True
                await self.client.pause_generation(mode="keep", clear_cache=False)
            else:
                await self._end_requests()
            self.version = (await self.client.collective_rpc("start_weight_update", kwargs={"partial": partial}))[0]

    async def _end_requests(self) -> None:
        self._keeps = False
        await self.client.pause_generation(mode="abort", clear_cache=True)

    def _of_trainer(self, method: Any) -> Any:
        """Return a method of the engine client that only the trainer may call while there is one."""

        async def checked(*args: Any, **kwargs: Any) -> Any:
            self._check_trainer(_query().get("trainer"))
            return await method(*args, **kwargs)

        return checked

    async def _add_weights(self, http: Request) -> Response:
        update = {"tensors": await http.body()}
        self._check_trainer(http.query_params.get("trainer"))
        await self.client.collective_rpc("update_weights", kwargs={"update_info": update})
        return JSONResponse({})

    async def finish_update(self, weight_version: str | None = None) -> None:
        """End an update, and sample again if every weight came; stands before ``finish_weight_update``."""
        async with self._updates:
            self._check_trainer(_query().get("trainer"))
            [self.version] = set(await self.client.collective_rpc("finish_weight_update"))
            if weight_version is not None:
                await self.client.update_weight_version(weight_version)
            self.whole, self.sync, self._keeps = True, weight_version, False
            self.syncs[self.version] = weight_version
            await self.client.resume_generation()

    def check_open(self) -> None:
        """Raise while other clients than the trainer would get something else than the server says.

        Raises:
            GracefulHTTPError: which vLLM answers with 503.
        """
        if not self.whole:
            raise not_now("an update of the student's weights has begun and not ended; ask again when one has")
        if self.mixing != self._own_mixing:
            raise not_now(
                f"the trainer {self.trainer} has other mixing settings than this server was started with; "
                "ask again when it has ended"
            )

    # -- the teacher's output layer ---------------------------------------------------------------------------------

    async def _head(self, http: Request) -> Response:
        rows = [int(http.query_params[name]) for name in ("start", "stop")]
        parts = await self.client.collective_rpc("teacher_head_rows", args=tuple(rows))
        return Response(b"".join(framed(part) for part in parts if part), media_type="application/octet-stream")

    # -- batches ----------------------------------------------------------------------------------------------------

    async def _sample(self, http: Request, send: Any) -> None:
        """Answer with a frame per completion, as they finish, and an empty one as a sign of life while none does.

        Ends all of them if the trainer goes away.
        """
        body = await http.json()
        self._check_trainer(body["trainer"])
        mixing = MixingConfig.from_dict(body["mixing"])
        jobs = [self._job(index, body, *prompts) for index, prompts in enumerate(body["prompts"])]
        if self.trainer is None:
            raise HTTPException(409, f"no trainer holds this server; connect by {TRAINER_ROUTE} first")
        if body["running"] and not self.whole:
            raise HTTPException(503, "an update of the student's weights has begun and not ended; ask again when one has")
        await self._mix(mixing)
        if not body["running"] and (not self.whole or self.sync != body["sync"]):
            raise HTTPException(409, f"the student has the weights {self.sync!r}, and {body['sync']!r} were asked for")
        tasks = [asyncio.create_task(self._complete(*job)) for job in jobs]
        gone = asyncio.create_task(_disconnected(http))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            left: set[asyncio.Task[Any]] = set(tasks)
            while left and not gone.done():
                waited_for = {*left, gone}
                done, _ = await asyncio.wait(waited_for, timeout=_PULSE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    await send({"type": "http.response.body", "body": framed(b""), "more_body": True})
                for task in left & done:
                    await send({"type": "http.response.body", "body": framed(task.result()), "more_body": True})
                left -= done
            await send({"type": "http.response.body", "body": b""})
        finally:
            for task in (gone, *tasks):
                task.cancel()
            await asyncio.gather(gone, *tasks, return_exceptions=True)

    async def _mix(self, mixing: MixingConfig) -> None:
        async with self._mixes:
            if mixing == self.mixing:
                return
            others = self.mixing == self._own_mixing
            if others and not self.whole:
                raise HTTPException(
                    503, "the mixing changes when the update of the student's weights has ended; ask again then"
                )
            self.mixing = mixing  # from here on other clients' requests are refused
            if others:
                await self.client.pause_generation(mode="abort", clear_cache=False)
                await self.client.resume_generation()
            await self.client.collective_rpc("set_mixing", args=(mixing.to_dict(),))

    def _job(self, index: int, body: dict[str, Any], teacher: list[int], student: list[int]) -> tuple[Any, ...]:
        options = returned(
            PairOptions(
                student_prompt_token_ids=None if body["teacher_only"] else student,
                alpha=body["alpha"][index],
                mix_tokens=body["mix_tokens"],
                teacher_only=body["teacher_only"],
                record=True,
            )
        )
        options = replace(options, hidden=body["hidden"], topk=body["topk"])
        sampling, seed = body["sampling"][index if len(body["sampling"]) > 1 else 0], body["seeds"][index]
        if not all(type(number) is int for number in (seed, *teacher, *student)):
            raise ValueError(f"prompt {index}: token ids and the seed are whole numbers")
        if sampling.get("logit_bias"):
            sampling = {**sampling, "logit_bias": {int(token): bias for token, bias in sampling["logit_bias"].items()}}
        params = checked_params({**sampling, "seed": seed, "extra_args": options.to_extra_args()})
        prompt = PairPrompt(teacher_token_ids=teacher, student_token_ids=student)
        check_request(prompt, params, self.limits, options=options, name=f"prompt {index}: ")
        return index, teacher, params

    async def _complete(self, index: int, teacher: list[int], params: Any) -> bytes:
        """Return one completion, or the reason why there is none, as bytes."""
        try:
            async with aclosing(self._generate(tokens_input(teacher), params, next(self._names))) as outputs:
                *_, last = [output async for output in outputs]
        except Exception as error:
            cause = error if str(error) else error.__cause__ or error  # vLLM wraps some errors without a message
            unexpected = HTTPStatus.SERVICE_UNAVAILABLE if self.client.errored else HTTPStatus.INTERNAL_SERVER_ERROR
            status = getattr(error, "http_status", HTTPStatus.BAD_REQUEST if isinstance(cause, ValueError) else unexpected)
            return pack({"index": index, "status": int(status), "message": f"{type(cause).__name__}: {cause}"}, {})
        completion = last.outputs[0]
        if completion.finish_reason == "abort":
            return pack({"index": index, "status": 503, "message": "the weights were updated while the request ran"}, {})
        tensors: dict[str, torch.Tensor] = {"token_ids": torch.tensor(list(completion.token_ids), dtype=torch.int32)}
        versions, cached = [self.version], 0
        if completion.routed_experts is not None:
            rows = split_rows(completion.routed_experts[: len(completion.token_ids)])
            tensors["values"], cached = torch.from_numpy(np.ascontiguousarray(rows.values_TR)), rows.cached
            if rows.origin_T.any():
                tensors["origin"] = torch.from_numpy(rows.origin_T)
            if rows.signal_TX.shape[1]:
                signal_TX = torch.from_numpy(np.ascontiguousarray(rows.signal_TX))
                if PairOptions.of(params).topk:
                    tensors["topk"] = signal_TX
                else:
                    tensors["hidden"] = signal_TX.view(self.dtype)[:, : self.hidden_size].contiguous()
            versions = sorted(set(rows.version_T.tolist())) or versions
            if len(versions) > 1:
                tensors["version"] = torch.from_numpy(rows.version_T)
        described = {
            "index": index,
            "status": 200,
            "syncs": {version: self.syncs.get(version, f"version {version}") for version in versions},
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "version": versions[-1],
            "teacher_cached": last.num_cached_tokens or 0,
            "student_cached": cached,
        }
        return pack(described, tensors)


def not_now(message: str) -> GracefulHTTPError:
    """Return the exception that vLLM answers with 503: ask again later."""
    return GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE)


def _query() -> QueryParams:
    """Return the query of the HTTP request being served."""
    served = HttpRequest.current()
    return QueryParams("" if served is None else served.query)


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


async def _disconnected(http: Request) -> None:
    """Return when the client has hung up."""
    with suppress(Exception):
        while (await http.receive())["type"] != "http.disconnect":
            pass


def _add_weight_routes(app: Any) -> None:
    """Add vLLM's routes for weights, which it has in its development mode only, beside many others."""
    from vllm.entrypoints.rl.online.api_router import router

    wanted = {
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/get_world_size",
    }
    present: Sequence[Any] = app.router.routes
    known = {getattr(route, "path", None) for route in present}
    app.router.routes.extend(route for route in router.routes if route.path in wanted - known)
