"""The HTTP door: OpenAI's endpoints, vLLM's beside them, and what operators ask for.

Owns the routes and the reading of headers. Does not know workers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from core.errors import ClientError, InternalError, InvalidRequest, ModelNotFound, ServingError
from core.trace import TraceContext, parse_trace
from core.types import ChatPrompt
from router import calls
from router.access.identities import Right
from router.http.auth import Guard, needs
from router.http.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    MeasureBody,
    SamplingBody,
    TokenizeBody,
    TokenizeChatBody,
    parse_body,
)
from router.http.body_reading import BodyReader
from router.http.errors import error_response, plain_error
from router.http.json_pieces import UTF8, dumps
from router.http.other_fields import ignored_fields
from router.http.replies import (
    ChatFormatter,
    CompletionFormatter,
    Reply,
    ReplyOptions,
    server_timing,
)
from router.http.sse import (
    EventStream,
    StreamLimits,
    unless_disconnected,
    whole_reply,
)
from router.refusals import METHOD_NOT_ALLOWED, UNSUPPORTED_ENDPOINT
from router.reply_thread import in_reply_thread
from router.request_builder import MAX_ID_CHARACTERS, RequestParams, check_text, correlation_id_of
from router.resuming import parse_event_id, split_positions
from router.service import GenerationService

log = logging.getLogger(__name__)
MAX_HEADER_CHARACTERS = 1024
TIMING_HEADER = "x-baton-timing"
REQUEST_ID_HEADER = "x-request-id"
IGNORED_HEADER = "x-baton-ignored-params"
SHOWN_HEADERS = (
    REQUEST_ID_HEADER,
    IGNORED_HEADER,
    "server-timing",
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
)
"""Headers of replies that scripts of other origins may read."""
KEY_HEADER = "idempotency-key"
"""A request with the same key is the same request: one at a time, with the same randomness."""
EVENT_IDS_HEADER = "x-baton-event-ids"
LAST_EVENT_HEADER = "last-event-id"
AnyBody = TypeVar("AnyBody", bound=BaseModel)


def trace_of(request: Request) -> TraceContext | None:
    """W3C trace context of a request; baggage is not trusted and not read."""
    return parse_trace(
        request.headers.get("traceparent", ""), request.headers.get("tracestate", "")
    )


def correlation_of(request: Request) -> str:
    """What the caller calls the action it belongs to, if that may be echoed.

    A proxy gives all calls of one action the same, so it makes no request the same as another.
    """
    return correlation_id_of(request.headers.get(REQUEST_ID_HEADER, ""))


def key_of(request: Request) -> str:
    """The idempotency key; empty: the request has none.

    Raises:
        InvalidRequest: It cannot be a request's id.
    """
    key = request.headers.get(KEY_HEADER, "")
    check_text(KEY_HEADER, key, MAX_ID_CHARACTERS)
    return key


def _resumed(
    all_params: list[RequestParams], last_event: str, *, is_stream: bool
) -> list[RequestParams]:
    """The same wishes, from where the client is.

    Raises:
        InvalidRequest: The event id does not fit the body.
    """
    request_id, positions = parse_event_id(last_event)
    if not is_stream or all_params[0].request_id not in ("", request_id):
        raise InvalidRequest(
            "Last-Event-ID",
            "is for a stream; send the same body, with stream: true and the same id",
        )
    shares = split_positions(positions, len(all_params))
    return [
        replace(w, request_id=request_id, resume_from=s)
        for w, s in zip(all_params, shares, strict=True)
    ]


class HttpApi:
    """The endpoints over one service."""

    def __init__(self, service: GenerationService, created: int, bodies: BodyReader) -> None:
        """Keep the service; `created` is what OpenAI's field of that name says (Unix seconds)."""
        self.service = service
        self.created = created
        self.config = service.config
        self._bodies = bodies

    async def body(self, kind: type[AnyBody], request: Request) -> tuple[AnyBody, dict[str, str]]:
        """Read and validate a body.

        Returns:
            The body, and a header that names what was ignored.

        Raises:
            ServingError: Names what is wrong.
        """
        tree = await self._bodies.read(request)
        body = parse_body(kind, tree)
        ignored = ignored_fields(body, is_strict=self.config.is_strict)
        names = ",".join(sorted(ignored))[:MAX_HEADER_CHARACTERS]
        shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in names)
        return body, {IGNORED_HEADER: shown} if ignored else {}

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        body, headers = await self.body(CompletionBody, request)
        all_params = body.all_params(key_of(request), trace_of(request))
        options = ReplyOptions(
            has_logprobs=body.logprobs is not None,
            has_prompt_logprobs=body.prompt_logprobs is not None,
            echo=bool(body.echo),
            is_echo_only=body.is_echo_only,
            **self._shared_options(body, request),
        )
        return await self._reply(
            request, all_params, body, CompletionFormatter(self.service, options), headers
        )

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        body, headers = await self.body(ChatBody, request)
        chat = body.chat(
            self.config.chat_template_kwargs,
            trusts_template=self.config.trust_request_chat_template,
            adds_special_tokens=bool(body.add_special_tokens),
        )
        all_params = body.all_params(chat, key_of(request), trace_of(request))
        options = ReplyOptions(
            is_chat=True,
            has_logprobs=bool(body.logprobs),
            has_prompt_logprobs=body.prompt_logprobs is not None,
            **self._shared_options(body, request),
        )
        return await self._reply(
            request, all_params, body, ChatFormatter(self.service, options), headers
        )

    def _shared_options(self, body: SamplingBody, request: Request) -> dict[str, bool]:
        stream = body.stream_options
        return {
            "includes_usage": stream is not None
            and bool(stream.include_usage or stream.continuous_usage_stats),
            "has_continuous_usage": stream is not None and bool(stream.continuous_usage_stats),
            "wants_timing": request.headers.get(TIMING_HEADER) == "1",
            "returns_token_ids": bool(body.return_token_ids),
            "names_ids": bool(body.return_tokens_as_token_ids),
        }

    async def _reply(
        self,
        request: Request,
        all_params: list[RequestParams],
        body: SamplingBody,
        dialect: CompletionFormatter,
        headers: dict[str, str],
    ) -> Response:
        last_event = request.headers.get(LAST_EVENT_HEADER, "")
        if last_event:
            all_params = _resumed(all_params, last_event, is_stream=bool(body.stream))
        identity = request.state.identity
        correlation_id = correlation_of(request)
        named = [replace(w, identity=identity, correlation_id=correlation_id) for w in all_params]
        made = await unless_disconnected(
            request.receive,
            self.service.make_requests(named),
        )
        reply = Reply(dialect, made, self.created_now())
        group = self.service.open(*made)
        headers[REQUEST_ID_HEADER] = correlation_id or str(made[0].request_id)
        if body.stream:
            has_ids = bool(last_event) or request.headers.get(EVENT_IDS_HEADER) == "1"
            limits = StreamLimits(self.config.keep_alive_s, self.config.slow_reader_s, has_ids)
            return EventStream(reply, group, headers, limits)
        content = await whole_reply(request.receive, reply, group)
        headers["Server-Timing"] = server_timing(reply.timing)
        if not reply.is_heavy:
            return JSONResponse(content, headers=headers)
        text = await in_reply_thread(dumps, content, UTF8)
        return Response(text.encode(), headers=headers, media_type=JSONResponse.media_type)

    def created_now(self) -> int:
        """Unix seconds for a reply's `created`."""
        return self.created + int(self.service.uptime_s())

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`, of a text or of a conversation."""
        tree = await self._bodies.read(request)
        if "messages" in tree:
            chat = parse_body(TokenizeChatBody, tree)
            ignored_fields(chat, is_strict=self.config.is_strict)
            prompt = chat.chat(
                self.config.chat_template_kwargs,
                trusts_template=self.config.trust_request_chat_template,
                adds_special_tokens=chat.add_special_tokens,
            )
            ids, names = await self._tokenized(request, chat.model, prompt, adds=False)
            wants_names = chat.return_token_strs
        else:
            text = parse_body(TokenizeBody, tree)
            ignored_fields(text, is_strict=self.config.is_strict)
            adds = text.add_special_tokens
            ids, names = await self._tokenized(request, text.model, text.prompt, adds=adds)
            wants_names = text.return_token_strs
        model = self.service.model
        strings = names if wants_names else None
        body = {
            "count": len(ids),
            "max_model_len": model.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }
        return JSONResponse(body)

    async def _tokenized(
        self, request: Request, model: str, prompt: str | ChatPrompt, *, adds: bool
    ) -> tuple[list[int], list[str]]:
        tenant = request.state.identity.tenant
        work = self.service.tokenize(model, prompt, adds_special_tokens=adds, tenant=tenant)
        tokens: tuple[list[int], list[str]] = await unless_disconnected(request.receive, work)
        return tokens

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`."""
        body, headers = await self.body(DetokenizeBody, request)
        return JSONResponse(
            {"prompt": await self.service.detokenize(body.model, body.tokens)}, headers=headers
        )

    def card(self) -> dict[str, Any]:
        """The model, as OpenAI describes one."""
        model = self.service.model
        return {
            "id": model.name,
            "object": "model",
            "created": self.created,
            "owned_by": "baton",
            "root": model.name,
            "parent": None,
            "max_model_len": model.max_model_len,
            "vocabulary_size": model.vocabulary_size,
        }

    async def models(self) -> dict[str, Any]:
        """`GET /v1/models`."""
        return {"object": "list", "data": [self.card()]}

    async def model(self, model_id: str) -> dict[str, Any]:
        """`GET /v1/models/{id}`."""
        if model_id != self.service.model.name:
            raise ModelNotFound(
                f"model {model_id[:80]!r} is not served here; served: {self.service.model.name}"
            )
        return self.card()

    async def health(self) -> Response:
        """Alive."""
        return Response(status_code=200)

    async def ready(self) -> JSONResponse:
        """Able to get a request through; if not, that is an answer and no refusal."""
        call = calls.current()
        if call is not None:
            call.is_told = True
        return JSONResponse(
            self.service.readiness(), status_code=200 if self.service.is_ready else 503
        )

    async def load(self) -> dict[str, Any]:
        """Requests here and in each pool."""
        return self.service.load()

    async def metrics(self) -> PlainTextResponse:
        """Prometheus exposition."""
        return PlainTextResponse(
            self.service.telemetry.text(), media_type="text/plain; version=0.0.4"
        )

    async def show_version(self) -> dict[str, str]:
        """The version of Baton."""
        return {"version": version("baton-serve")}

    async def replicas(self) -> dict[str, Any]:
        """Every worker this router knows."""
        return {"replicas": self.service.replicas()}

    async def kv_routes(self) -> dict[str, Any]:
        """How KV goes between workers."""
        return {"links": self.service.routes()}

    async def measure_kv_routes(self, request: Request) -> Response:
        """`POST /links`: move some MiB over every way and say how fast it was."""
        body, headers = await self.body(MeasureBody, request)
        return JSONResponse({"links": await self.service.measure_routes(body.mib)}, headers=headers)


def _schema(*kinds: type[BaseModel]) -> dict[str, Any]:
    """Show bodies in `/docs`; they are read by hand, so that errors are OpenAI's."""
    schemas = [
        kind.model_json_schema(ref_template=f"#/components/schemas/{kind.__name__}_{{model}}")
        for kind in kinds
    ]
    for schema in schemas:
        schema.pop("$defs", None)
        for field in schema.get("properties", {}).values():
            _without_references(field)
    one = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": one}}}}


def _without_references(node: Any) -> None:  # noqa: ANN401 - any JSON
    if isinstance(node, dict):
        if "$ref" in node:
            node.pop("$ref")
            node["type"] = "object"
        for value in node.values():
            _without_references(value)
    elif isinstance(node, list):
        for value in node:
            _without_references(value)


def _add_error_pages(app: FastAPI) -> None:
    @app.exception_handler(ServingError)
    async def serving_error(request: Request, error: ServingError) -> JSONResponse:
        return error_response(error, correlation_of(request))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path[:80].encode("ascii", "replace").decode()
        facts = {404: f"there is no {path}", 405: f"{request.method[:10]} is not allowed on {path}"}
        codes = {kind.http_status: kind.code for kind in (UNSUPPORTED_ENDPOINT, METHOD_NOT_ALLOWED)}
        code = codes.get(error.status_code, ClientError.code)
        headers = dict(error.headers or {})
        return plain_error(
            error.status_code, facts.get(error.status_code, str(error.detail)), code, headers
        )

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed in a way it should not", exc_info=error)
        return plain_error(500, "the server failed in a way it should not", InternalError.code)


def make_app(
    service: GenerationService, created: int, bodies: BodyReader, *, is_production: bool = False
) -> FastAPI:
    """Build the HTTP application.

    Args:
        service: Behind every route.
        bodies: Reads every body.
        created: Unix seconds of the start, for OpenAI's `created` fields.
        is_production: Without the pages that describe the API.
    """
    about: dict[str, Any] = {"title": "Baton", "version": version("baton-serve"), "redoc_url": None}
    app: FastAPI = (
        FastAPI(**about, docs_url=None, openapi_url=None)
        if is_production
        else FastAPIOffline(**about)
    )
    api = HttpApi(service, created, bodies)
    _add_error_pages(app)
    work = Right.GENERATE
    observe = Right.OBSERVE
    operate = Right.OPERATE
    for path, endpoint, schema, right in (
        ("/v1/chat/completions", api.chat, _schema(ChatBody), work),
        ("/v1/completions", api.completions, _schema(CompletionBody), work),
        ("/tokenize", api.tokenize, _schema(TokenizeBody, TokenizeChatBody), work),
        ("/detokenize", api.detokenize, _schema(DetokenizeBody), work),
        ("/links", api.measure_kv_routes, _schema(MeasureBody), operate),
    ):
        rights = [Depends(needs(right))]
        app.post(path, openapi_extra=schema, response_model=None, dependencies=rights)(endpoint)
    readers: tuple[tuple[str, Callable[..., Any], Right | None], ...] = (
        ("/health", api.health, None),
        ("/ping", api.health, None),
        ("/v1/models", api.models, Right.ANY_KEY),
        ("/v1/models/{model_id:path}", api.model, Right.ANY_KEY),
        ("/ready", api.ready, Right.ANY_KEY),
        ("/version", api.show_version, Right.ANY_KEY),
        ("/load", api.load, observe),
        ("/metrics", api.metrics, observe),
        ("/replicas", api.replicas, observe),
        ("/links", api.kv_routes, observe),
    )
    for path, reader, asked in readers:
        rights = [Depends(needs(asked))] if asked else []
        app.get(path, response_model=None, dependencies=rights)(reader)
        app.head(path, response_model=None, include_in_schema=False, dependencies=rights)(reader)
    app.add_middleware(
        Guard, keyring=service.keyring, bad_keys=service.bad_keys, on_ended=service.call_ended
    )
    if service.config.cors_origins:
        _let_pages_call(app, service.config.cors_origins)
    return app


def _let_pages_call(app: FastAPI, origins: Sequence[str]) -> None:
    """Answer browsers that ask before they call. What they may call still needs a key.

    It stands before the guard: a browser's question carries no key, and its answer tells nothing
    but who may ask. Refusals get the headers too, or a page could not read them.
    """
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),
        expose_headers=SHOWN_HEADERS,
    )
