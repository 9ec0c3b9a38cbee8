"""The HTTP application: paths, the rights they need, error pages, CORS.

Owns which endpoint answers which path. Does not know bodies' meaning or workers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from core.errors import ClientError, InternalError, ServingError
from router.access.identities import Right
from router.http.api import HttpApi
from router.http.auth import HttpGuard, needs
from router.http.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ExplainBody,
    ExplainChatBody,
    MeasureBody,
    TokenizeBody,
    TokenizeChatBody,
)
from router.http.body_reading import BodyReader
from router.http.direct_routes import DirectRoutes
from router.http.early_refusal import CHAT_PATH, COMPLETIONS_PATH, REQUEST_PATHS, EarlyRefusal
from router.http.errors import REQUEST_ID_HEADER, error_response, plain_error
from router.http.headers import IGNORED_HEADER, ROUTER_HEADER, correlation_of
from router.http.metrics_api import MetricsApi
from router.quota_headers import HEADERS as QUOTA_HEADERS
from router.refusals import METHOD_NOT_ALLOWED, UNSUPPORTED_ENDPOINT
from router.service import GenerationService
from router.tiers import HEADER as TIER_HEADER

log = logging.getLogger(__name__)
SHOWN_HEADERS = (
    REQUEST_ID_HEADER,
    IGNORED_HEADER,
    TIER_HEADER,
    ROUTER_HEADER,
    "server-timing",
    "retry-after",
    "retry-after-ms",
    *QUOTA_HEADERS,
    "x-should-retry",
)
"""Reply headers that scripts of other origins may read."""

Method = Callable[..., Any]
POSTS: tuple[tuple[str, Method, tuple[type[BaseModel], ...], Right], ...] = (
    (CHAT_PATH, HttpApi.chat, (ChatBody,), Right.GENERATE),
    (COMPLETIONS_PATH, HttpApi.completions, (CompletionBody,), Right.GENERATE),
    ("/tokenize", HttpApi.tokenize, (TokenizeBody, TokenizeChatBody), Right.GENERATE),
    ("/detokenize", HttpApi.detokenize, (DetokenizeBody,), Right.GENERATE),
    (
        "/prefix-index/explain",
        HttpApi.explain_prompt,
        (ExplainBody, ExplainChatBody),
        Right.GENERATE,
    ),
    ("/links", HttpApi.measure_kv_routes, (MeasureBody,), Right.OPERATE),
)
"""Path, endpoint, the bodies it takes, and what its caller needs."""
METRICS_READERS: tuple[tuple[str, Method, Right | None], ...] = (
    ("/health", MetricsApi.health, None),
    ("/ping", MetricsApi.health, None),
    ("/metrics", MetricsApi.metrics, Right.OBSERVE),
    ("/metrics/targets", MetricsApi.metrics_targets, Right.OBSERVE),
)
"""Paths that GET and HEAD read on a router's own port for metrics, too."""
READERS: tuple[tuple[str, Method, Right | None], ...] = (
    *METRICS_READERS,
    ("/v1/models", HttpApi.models, Right.ANY_KEY),
    ("/v1/models/{model_id:path}", HttpApi.model, Right.ANY_KEY),
    ("/ready", HttpApi.ready, Right.ANY_KEY),
    ("/version", HttpApi.show_version, Right.ANY_KEY),
    ("/load", HttpApi.load, Right.OBSERVE),
    ("/replicas", HttpApi.replicas, Right.OBSERVE),
    ("/explain/{request_id:path}", HttpApi.explain, Right.ANY_KEY),
    ("/links", HttpApi.kv_routes, Right.OBSERVE),
    ("/prefix-index", HttpApi.prefix_index, Right.OBSERVE),
)
"""Paths that GET and HEAD read on the shared port."""


def _schema(*kinds: type[BaseModel]) -> dict[str, Any]:
    """Show bodies in `/docs`. FastAPI does not parse them: its errors are not OpenAI's."""
    schemas = [
        kind.model_json_schema(ref_template=f"#/components/schemas/{kind.__name__}_{{model}}")
        for kind in kinds
    ]
    for schema in schemas:
        # OpenAPI looks for definitions at its own root; here, each body is described by itself.
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
        # Cut and in ASCII: the client wrote it, and it goes into a log line and into a reply.
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
        log.error("a request failed unexpectedly", exc_info=error)
        return plain_error(500, "the server failed unexpectedly", InternalError.code)


def make_app(
    service: GenerationService, created: int, bodies: BodyReader, *, is_production: bool = False
) -> FastAPI:
    """Build the HTTP application.

    Args:
        service: Serves every endpoint.
        created: Unix seconds of the start, for OpenAI's `created` fields.
        bodies: Reads every body.
        is_production: Leave out the pages that describe the API.
    """
    about: dict[str, Any] = {"title": "Baton", "version": version("baton-serve"), "redoc_url": None}
    app: FastAPI = (
        FastAPI(**about, docs_url=None, openapi_url=None)
        if is_production
        else FastAPIOffline(**about)
    )
    api = HttpApi(service, created, bodies)
    _add_error_pages(app)
    for path, method, bodies_of, right in POSTS:
        app.post(
            path,
            openapi_extra=_schema(*bodies_of),
            response_model=None,
            dependencies=[Depends(needs(right))],
        )(getattr(api, method.__name__))
    _add_readers(app, api, READERS)
    direct = [r for r in app.routes if isinstance(r, APIRoute) and r.path in REQUEST_PATHS]
    # The last one that is added stands outermost: the guard is before the early refusal, and that
    # before the endpoints.
    app.add_middleware(DirectRoutes, routes=direct)
    app.add_middleware(EarlyRefusal, arrive=service.arrive)
    _guard(app, service)
    if service.config.cors_origins:
        _allow_origins(app, service.config.cors_origins)
    return app


def make_metrics_app(service: GenerationService) -> FastAPI:
    """Build the application of a router's own port: its metrics, for the same keys, and no more."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_error_pages(app)
    _add_readers(app, MetricsApi(service), METRICS_READERS)
    _guard(app, service)
    return app


def _add_readers(
    app: FastAPI, api: MetricsApi, readers: Sequence[tuple[str, Method, Right | None]]
) -> None:
    for path, method, needed in readers:
        rights = [Depends(needs(needed))] if needed else []
        reader = getattr(api, method.__name__)
        app.get(path, response_model=None, dependencies=rights)(reader)
        app.head(path, response_model=None, include_in_schema=False, dependencies=rights)(reader)


def _guard(app: FastAPI, service: GenerationService) -> None:
    app.add_middleware(
        HttpGuard,
        keyring=service.keyring,
        bad_keys=service.bad_keys,
        on_ended=service.recorder.call_ended,
        read_quota=service.charging.headers,
    )


def _allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Answer preflight requests, and add CORS headers to every reply.

    Outside of the guard: a preflight carries no key, and its answer names only the origins. The
    call that follows needs its key. Refusals get the headers too, or a page could not read them.
    """
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),
        expose_headers=SHOWN_HEADERS,
    )
