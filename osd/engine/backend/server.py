"""`osd serve`: vLLM's own OpenAI server with the pair plugged in.

The engine gets the pair's worker and scheduler, as in `PairEngine`. The HTTP side is one ASGI
middleware (vLLM's ``--middleware``), which

- takes the object ``osd`` out of a request's body (:mod:`osd.engine.wire`) and renders the student's prompt,
- wraps the engine client's ``generate``, which every route of vLLM calls: it checks each request as `PairEngine` does, so that
  a mistake is answered with 4xx before the engine sees it, and passes the options on,
- adds the per-token record to the choices of an answer.
"""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from vllm import envs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.exceptions import GenerationError
from vllm.renderers import renderer_from_config
from vllm.v1.metrics.loggers import PrometheusStatLogger

from osd.engine.asgi import HttpRequest, Sender, reading
from osd.engine.backend.arguments import server_arguments
from osd.engine.backend.configuration import mixing_config, most_drafts, side_limits, student_vllm_config
from osd.engine.backend.frontend import interruptible_start
from osd.engine.backend.training import Training, not_now
from osd.engine.request import EXTRA_ARGS_KEY, PairOptions, PairPrompt, check_request
from osd.engine.served import weights_digest
from osd.engine.wire import (
    FIELD,
    INFO_ROUTE,
    STUDENT_PROMPTS,
    pair_options,
    record_to_json,
    returned,
    take_options,
)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OPEN_ROUTES = ("/health", "/ping")  # need no API key

# -- the command --------------------------------------------------------------------------------------------------------


def serve(argv: Sequence[str]) -> None:
    """Run `osd serve` until a signal ends it. Raises as `server_arguments`."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's own command line does
    args = server_arguments(list(argv))
    args.osd = _Imported()
    args.middleware = [*args.middleware, f"{PairMiddleware.__module__}.{PairMiddleware.__name__}"]
    signal.signal(signal.SIGINT, _interrupt)  # asyncio's own handler would wait until the engines have started
    with interruptible_start():
        ServeSubcommand().cmd(args)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


class _Imported:
    """Imports this package where it is unpickled: in vLLM's further front end processes, before they read a configuration."""


# -- the middleware -----------------------------------------------------------------------------------------------------


class PairMiddleware:
    """ASGI middleware of a pair's server; see the module's docstring."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._server: _Server | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            try:
                self._server = await _Server.start(scope["app"])
            except Exception as error:
                await receive()
                await send({"type": "lifespan.startup.failed", "message": f"osd serve: {error}"})
                return None
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        assert self._server is not None, "the server has started"
        path, query = scope["path"].removeprefix(scope.get("root_path", "")), scope["query_string"].decode("latin-1")
        request = HttpRequest(path, query=query)
        if scope["method"] != "OPTIONS" and not self._server.allows(request.path, Headers(scope=scope)):
            return await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
        if request.path == INFO_ROUTE:
            info = self._server.info | {"weight_updates": self._server.training.version}
            return await JSONResponse(info)(scope, receive, send)
        if request.path.startswith(f"{INFO_ROUTE}/"):
            return await self._server.training(scope, receive, send)
        with request.served():
            if scope["method"] == "POST":
                receive, send = reading(self._server.read, request, receive), Sender(request, send)
            await self.app(scope, receive, send)
        return None


# -- the pair behind the routes -----------------------------------------------------------------------------------------


class _Server:
    """The pair of one front end process: its limits, the student's renderer, and the way to the engine.

    Attributes:
        info: the answer of `INFO_ROUTE`.
    """

    def __init__(self, app: Any) -> None:
        app_state = app.state
        teacher_config = app_state.vllm_config
        student_config = student_vllm_config(teacher_config)
        self.limits = side_limits(teacher_config, student_config)
        self.info = {
            "teacher": teacher_config.model_config.model,
            "student": student_config.model_config.model,
            "teacher_weights": weights_digest(teacher_config.model_config.model),
            "student_weights": weights_digest(student_config.model_config.model),
            "mixing": mixing_config(teacher_config).to_dict(),
            "limits": {side: vars(limits) for side, limits in self.limits.items()},
            "fields": sorted(CompletionRequest.model_fields),
        }
        keys = [key for key in (app_state.args.api_key or [envs.VLLM_API_KEY]) if key]
        self._keys = AuthenticationMiddleware(None, keys) if keys else None  # type: ignore[arg-type]
        self._generate = app_state.engine_client.generate
        self.training = Training(app, self.limits)
        # The student's prompts are rendered by vLLM's own renderer, with the same flags as the teacher's.
        renderer = app_state.online_renderer
        self.renderer = copy.copy(renderer)
        self.renderer.model_config = student_config.model_config
        self.renderer.renderer = renderer_from_config(student_config)
        self.renderer.chat_template = app_state.args.student_chat_template
        self.templates_differ = _chat_template(renderer) != _chat_template(self.renderer)

    @classmethod
    async def start(cls, app: Any) -> _Server:
        """Stand before the engine client's ``generate``.

        Raises:
            RuntimeError: vLLM does not use the pair's worker.
        """
        app_state = app.state
        client = app_state.engine_client
        if set(await client.collective_rpc("pair_active")) != {True}:
            raise RuntimeError("vLLM did not start the paired worker; sampling would be from the teacher alone")
        server = cls(app)
        client.generate = server.generate
        _count_drafts(client, app_state.vllm_config)
        return server

    def allows(self, path: str, headers: Headers) -> bool:
        """Return True if a request may pass. vLLM itself asks for the API key on some routes only."""
        return self._keys is None or path in OPEN_ROUTES or self._keys.verify_token(headers)

    async def read(self, request: HttpRequest, body: bytes) -> bytes:
        """Take the pair's options out of a body into ``request``; return the body that is left for vLLM.

        Raises:
            ValueError: options that are not valid, or on a route that takes none.
        """
        renders_chat = request.path == CHAT and self.templates_differ
        if f'"{FIELD}'.encode() not in body and not renders_chat:
            return body
        try:
            given = json.loads(body)
        except ValueError:
            return body  # vLLM answers
        if not isinstance(given, dict):
            return body
        options = take_options(given)
        if options and request.path not in (COMPLETIONS, CHAT):
            raise ValueError(f"{request.path} takes no {FIELD} options; use {COMPLETIONS} or {CHAT}")
        if renders_chat and not options.get("teacher_only") and not options.keys() & set(STUDENT_PROMPTS):
            options["student_messages"] = given.get("messages")
        text, messages = options.pop("student_prompt", None), options.pop("student_messages", None)
        if text is not None or messages is not None:
            options["student_prompt_token_ids"] = await self._render(request.path, given, text, messages)
        if given.get("use_beam_search") and options.keys() & {"student_prompt_token_ids", "record"}:
            raise ValueError(f"use_beam_search has one prompt for both sides and no record; remove them from {FIELD}")
        request.options = pair_options(options)
        return json.dumps(given).encode()

    async def _render(self, path: str, given: dict[str, Any], text: Any, messages: Any) -> list[int]:
        """Render the student's prompt as vLLM renders the request's own."""
        if (path == CHAT) == (text is not None):
            fit = "student_messages" if path == CHAT else "student_prompt"
            raise ValueError(f"{path} takes the student's prompt as {FIELD}.{fit} or {FIELD}.student_prompt_token_ids")
        try:
            if text is not None:
                if not isinstance(text, str):
                    raise ValueError(f"student_prompt={text!r:.200} is not text")
                body = {**given, "prompt": text, "echo": False}
                rendered = await self.renderer.render_completion(CompletionRequest.model_validate(body))
            else:
                body = {**given, "messages": messages}
                rendered = await self.renderer.render_chat(ChatCompletionRequest.model_validate(body))
                rendered = rendered[1] if isinstance(rendered, tuple) else rendered
        except Exception as error:  # templates raise anything
            raise ValueError(f"the student's prompt cannot be rendered: {error!s:.500}") from error
        if not isinstance(rendered, list):
            raise ValueError(f"the student's prompt cannot be rendered: {rendered.error.message}")
        if rendered[0]["type"] != "token":
            raise ValueError("the student's prompt has more than text; a pair takes text only")
        return list(rendered[0]["prompt_token_ids"])

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> AsyncIterator[Any]:
        """Stand for the engine client's ``generate``: check a request, give it its options, watch its outputs.

        It checks when it is called, before a streamed answer has begun.

        Raises:
            ValueError: what vLLM answers with 400.
            GracefulHTTPError: 503, while the student's weights are not whole, or while a trainer has set another mixing.
        """
        self.training.check_open()
        request = HttpRequest.current() or HttpRequest("")
        options = self._options(request, sampling_params)
        if not isinstance(prompt, dict) or prompt.get("type") != "token":
            raise ValueError("the paired engine serves text completion only (no pooling, images, embeddings, streaming input)")
        ids, own = prompt["prompt_token_ids"], options.student_prompt_token_ids
        pair = PairPrompt(teacher_token_ids=ids, student_token_ids=ids if own is None else own)
        params = copy.copy(sampling_params)  # vLLM's beam search uses one for many calls
        params.extra_args = {**(params.extra_args or {}), **options.to_extra_args()}
        if not options.teacher_only:
            self._fit_student(pair, params)
        check_request(pair, params, self.limits, options=options)
        first, request.calls = request.calls * params.n, request.calls + 1
        return self._watch(self._generate(prompt, params, request_id, **kwargs), request, first)

    def _options(self, request: HttpRequest, params: Any) -> PairOptions:
        extra = params.extra_args or {}
        for name in extra:
            if name == EXTRA_ARGS_KEY or name.startswith(f"{FIELD}_"):
                raise ValueError(f'vllm_xargs has {name!r}; write the pair\'s options into the object "{FIELD}" of the body')
        options = request.options or returned(PairOptions())
        if request.calls and options.student_prompt_token_ids is not None:
            raise ValueError("one student prompt for several prompts; send one request per prompt")
        return options

    def _fit_student(self, pair: PairPrompt, params: Any) -> None:
        """End a completion that may fill the teacher's context, as without max_tokens, where the student's is full."""
        if params.max_tokens == self.limits["teacher"].max_model_len - len(pair.teacher_token_ids):
            room = self.limits["student"].max_model_len - len(pair.student_token_ids)
            params.max_tokens = max(1, min(params.max_tokens, room))

    async def _watch(self, outputs: Any, request: HttpRequest, first: int) -> AsyncIterator[Any]:
        """Pass vLLM's outputs on; keep the records, and say why a request failed."""
        version = self.training.version
        async with aclosing(outputs):
            async for output in outputs:
                for completion in output.outputs:
                    if completion.finish_reason == "abort" and (version != self.training.version or not self.training.whole):
                        raise not_now("the student's weights were updated while the request ran; ask again")
                    if completion.finish_reason == "error":
                        raise _failure(completion.stop_reason)
                    if request.wants_records and completion.routed_experts is not None:
                        request.records[first + completion.index] = record_to_json(completion.routed_experts)
                        completion.routed_experts = None
                yield output


def _count_drafts(client: Any, config: Any) -> None:
    """Let vLLM's metrics of speculative decoding count the pair's drafts; vLLM has them only with its own draft models."""
    drafts = most_drafts(config)
    counting = drafts > 0 and client.logger_manager is not None
    for logger in client.logger_manager.stat_loggers if counting else ():
        if isinstance(logger, PrometheusStatLogger):
            labels = {index: [config.model_config.served_model_name, str(index)] for index in logger.engine_indexes}
            as_vllm = SimpleNamespace(num_speculative_tokens=drafts)
            logger.spec_decoding_prom = type(logger.spec_decoding_prom)(as_vllm, ["model_name", "engine"], labels)


def _failure(reason: Any) -> Exception:
    """Return the exception for a request that the engine ended: the client's fault unless logits were not numbers."""
    text = str(reason or "vLLM gives no reason").removeprefix("osd: ")
    return GenerationError(text) if reason is None or text.startswith("NaN") else ValueError(text)


def _chat_template(renderer: Any) -> Any:
    return renderer.chat_template or getattr(renderer.renderer.tokenizer, "chat_template", None)
