"""The HTTP door: `/v1/completions` and what operators ask for.

Owns bodies, SSE and the OpenAI error object. Does not know workers. Called by the composition root,
which serves `make_app(service)` with uvicorn.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from core.errors import Cancelled, DeadlineExceeded, InvalidRequest, PayloadTooLarge, ServingError, Unavailable
from core.types import Anatomy, ChoiceFinished, Logprob, RequestEnded, SamplingParams, TextDelta, Usage
from router.service import GenerationService, RequestStream

Number = StrictFloat | StrictInt
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
MAX_HEADER_CHARACTERS = 1024
MAX_DEPTH_HINT = "the body is nested too deeply"


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="allow")
    include_usage: StrictBool = False


class CompletionBody(BaseModel):
    """Fields of `/v1/completions` that are built."""

    model_config = ConfigDict(extra="allow")
    model: StrictStr = ""
    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    max_tokens: StrictInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    n: StrictInt | None = None
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: list[StrictInt] | None = None
    min_tokens: StrictInt | None = None
    ignore_eos: StrictBool | None = None
    logprobs: StrictInt | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    request_id: StrictStr | None = None

    def the_prompt(self) -> str | list[int]:
        """Reduce the four forms to one prompt."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        if not prompt:
            raise InvalidRequest("prompt", "is empty; send at least one token")
        first = prompt[0]
        if isinstance(first, int):
            return [t for t in prompt if isinstance(t, int)]
        if len(prompt) > 1:
            raise InvalidRequest("prompt", f"is a list of {len(prompt)} prompts; one prompt per request is supported")
        return first

    def sampling(self) -> SamplingParams:
        """Collect the sampling fields; absent means default."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        given: dict[str, Any] = {
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "n": self.n, "seed": self.seed,
            "max_tokens": self.max_tokens, "min_tokens": self.min_tokens, "ignore_eos": self.ignore_eos,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(
            **given, stop=stop, stop_token_ids=tuple(self.stop_token_ids or ()), logprobs=self.logprobs
        )


HARMLESS: dict[str, Any] = {
    "user": None, "metadata": None, "store": False, "service_tier": "auto", "best_of": 1, "echo": False,
    "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "suffix": "",
}  # fmt: skip
"""Known fields that are not built, with the value that means "off". `user` and `metadata` are free."""
FREE = {"user", "metadata"}


def ignored_fields(extra: dict[str, Any]) -> list[str]:
    """Sort out fields beyond the built ones.

    Returns:
        Unknown ones, which are ignored and reported.

    Raises:
        InvalidRequest: A known field asks for something that is not built.
    """
    unknown = []
    for name, value in extra.items():
        if name not in HARMLESS:
            unknown.append(name)
        elif name not in FREE and value is not None and value != HARMLESS[name]:
            raise InvalidRequest(name, f"= {json.dumps(value)[:40]} is not supported; leave it out")
    return unknown


async def read_body(request: Request, limit_bytes: int) -> Any:  # noqa: ANN401
    """Read a JSON body, bounded.

    Raises:
        PayloadTooLarge: More bytes than allowed; reading stops there.
        InvalidRequest: Not a JSON object.
    """
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            raise PayloadTooLarge(f"the body has more than {limit_bytes} bytes; raise router.max_body_bytes")
        chunks.append(chunk)
    try:
        body = json.loads(b"".join(chunks))
    except RecursionError as error:
        raise InvalidRequest("body", MAX_DEPTH_HINT) from error
    except ValueError as error:
        raise InvalidRequest("body", f"is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidRequest("body", f"is a JSON {type(body).__name__}, must be an object")
    return body


def parse_body(body: Any) -> CompletionBody:  # noqa: ANN401
    """Validate a completion body.

    Raises:
        InvalidRequest: Names the first wrong field.
    """
    try:
        return CompletionBody.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "body"
        raise InvalidRequest(name, f"is not valid: {first['msg']}") from error
    except RecursionError as error:
        raise InvalidRequest("body", MAX_DEPTH_HINT) from error


def error_body(error: ServingError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "invalid_request_error" if error.http_status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    param = error.field if isinstance(error, InvalidRequest) else None
    return {"error": {"message": error.message, "type": kind, "param": param, "code": error.code}}


def error_response(error: ServingError) -> JSONResponse:
    """Error object, status and the headers that steer a client's retries."""
    headers = {}
    may_retry = error.http_status in (429, 503) and not isinstance(error, DeadlineExceeded)
    headers["x-should-retry"] = "true" if may_retry else "false"
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return JSONResponse(error_body(error), status_code=error.http_status, headers=headers)


def usage_body(u: Usage) -> dict[str, Any]:
    """OpenAI's usage object, cached tokens always filled."""
    return {
        "prompt_tokens": u.prompt_tokens,
        "completion_tokens": u.completion_tokens,
        "total_tokens": u.prompt_tokens + u.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": u.cached_tokens},
    }


def timing_body(a: Anatomy) -> dict[str, Any]:
    """Where the time went, on demand."""
    names = ("queue_s", "prefill_s", "exposed_transfer_s", "decode_s", "ttft_s", "e2e_s")
    times = {name.replace("_s", "_ms"): round(getattr(a, name) * 1000, 3) for name in names}
    return {
        **times, "kv_bytes": a.kv_bytes, "kv_blocks": a.kv_blocks, "path": a.path,
        "prefill_worker": a.prefill_worker, "decode_worker": a.decode_worker, "prefill_pid": a.prefill_pid,
        "decode_pid": a.decode_pid, "attempts": list(a.attempts),
    }  # fmt: skip


class Completion:
    """The replies to one completion request, whole or in chunks."""

    def __init__(self, service: GenerationService, stream: RequestStream, created: int, *, wants_timing: bool) -> None:
        """Keep what every reply repeats."""
        self._service, self._stream = service, stream
        self._wants_timing = wants_timing
        self._head = {
            "id": f"cmpl-{stream.request.request_id}",
            "object": "text_completion",
            "created": created,
            "model": service.model.name,
        }

    def _logprobs(self, parts: list[tuple[str, tuple[Logprob, ...]]]) -> dict[str, Any] | None:
        if self._stream.request.sampling.logprobs is None:
            return None
        text, entries = self._service.text.token_text, [entry for _, entries in parts for entry in entries]
        tokens = [text(entry.token_id) for entry in entries]
        offsets, at = [], 0
        for token in tokens:
            offsets.append(at)
            at += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{text(i): p for i, p in entry.top} for entry in entries],
            "text_offset": offsets,
        }

    async def whole(self) -> dict[str, Any]:
        """Wait for the end and reply at once.

        Raises:
            ServingError: The request failed.
        """
        parts: dict[int, list[tuple[str, tuple[Logprob, ...]]]] = {}
        finished: dict[int, ChoiceFinished] = {}
        try:
            while True:
                match event := await self._stream.next():
                    case TextDelta(choice, _, _, text, logprobs):
                        parts.setdefault(choice, []).append((text, logprobs))
                    case ChoiceFinished():
                        finished[event.choice] = event
                    case RequestEnded():
                        if event.error is not None:
                            raise event.error
                        choices = [self._choice(c, parts.get(c, []), finished[c]) for c in sorted(finished)]
                        reply = {**self._head, "choices": choices, "usage": usage_body(event.usage)}
                        return {**reply, "timing": timing_body(event.anatomy)} if self._wants_timing else reply
        finally:
            await self._stream.close()

    def _choice(
        self, index: int, parts: list[tuple[str, tuple[Logprob, ...]]], finished: ChoiceFinished | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(text for text, _ in parts),
            "logprobs": self._logprobs(parts),
            "finish_reason": finished.reason.value if finished else None,
            "stop_reason": finished.stop_match if finished else None,
        }

    async def chunks(self, *, include_usage: bool) -> AsyncIterator[str]:
        """Reply in server-sent events; an error is an event of its own, `[DONE]` is always last."""
        try:
            while True:
                match event := await self._stream.next():
                    case TextDelta(choice, _, _, text, logprobs):
                        if text or logprobs:
                            yield self._sse(choices=[self._choice(choice, [(text, logprobs)], None)])
                    case ChoiceFinished():
                        yield self._sse(choices=[self._choice(event.choice, [], event)])
                    case RequestEnded():
                        if event.error is not None:
                            yield f"data: {json.dumps(error_body(event.error))}\n\n"
                        elif include_usage or self._wants_timing:
                            timing = {"timing": timing_body(event.anatomy)} if self._wants_timing else {}
                            yield self._sse(choices=[], usage=usage_body(event.usage), **timing)
                        yield "data: [DONE]\n\n"
                        return
        finally:
            await self._stream.close()

    def _sse(self, **fields: object) -> str:
        return f"data: {json.dumps({**self._head, **fields}, ensure_ascii=False)}\n\n"


async def unless_disconnected(request: Request, reply: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Wait for a reply, and cancel it when the client leaves: starlette does so for streams only.

    Raises:
        Cancelled: The client left.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    loop = asyncio.get_running_loop()
    work, watcher = loop.create_task(reply), loop.create_task(watch())
    watcher.add_done_callback(lambda task: None if task.cancelled() else work.cancel())
    try:
        return await work
    except asyncio.CancelledError:
        if watcher.done():
            raise Cancelled("the client left") from None
        raise
    finally:
        watcher.cancel()


def make_app(service: GenerationService, created: int) -> FastAPI:
    """Build the HTTP application.

    Args:
        service: Behind every route.
        created: Unix seconds of the start, for OpenAI's `created` fields.
    """
    app = FastAPI(title="Baton", version=version("baton-serve"), docs_url=None, redoc_url=None)

    @app.exception_handler(ServingError)
    async def serving_error(_: Request, error: ServingError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(404)
    async def not_found(request: Request, _: Exception) -> JSONResponse:
        message = f"there is no {request.url.path[:80]}"
        body = {"message": message, "type": "invalid_request_error", "param": None, "code": "unsupported_endpoint"}
        return JSONResponse({"error": body}, status_code=404)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse_body(await read_body(request, service.config.max_body_bytes))
        ignored = ignored_fields(body.model_extra or {})
        request_id = body.request_id or request.headers.get("x-request-id", "")
        made = await service.make_request(body.model, body.the_prompt(), body.sampling(), request_id)
        wants_timing = request.headers.get("x-baton-timing") == "1"
        completion = Completion(service, service.open(made), created, wants_timing=wants_timing)
        headers = {"x-request-id": str(made.request_id)}
        if ignored:
            names = ",".join(sorted(ignored))[:MAX_HEADER_CHARACTERS]
            headers["x-baton-ignored-params"] = "".join(c if c.isascii() and c.isprintable() else "?" for c in names)
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            chunks = completion.chunks(include_usage=include_usage)
            return StreamingResponse(chunks, media_type="text/event-stream", headers={**headers, **SSE_HEADERS})
        return JSONResponse(await unless_disconnected(request, completion.whole()), headers=headers)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        card = {"id": service.model.name, "object": "model", "created": created, "owned_by": "baton",
                "max_model_len": service.model.max_model_len}  # fmt: skip
        return {"object": "list", "data": [card]}

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        return JSONResponse(service.readiness(), status_code=200 if service.is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.telemetry.text(), media_type="text/plain; version=0.0.4")

    @app.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": version("baton-serve")}

    @app.get("/replicas")
    async def replicas() -> dict[str, Any]:
        return {"replicas": service.replicas()}

    return app
