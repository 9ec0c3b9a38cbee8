"""The endpoints over HTTP: from a validated body to the reply.

Owns which body and which reply belong to an endpoint. Does not know paths, rights or workers.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from core.errors import InvalidRequest, ModelNotFound, RequestNotFound
from core.types import ChatPrompt
from router import calls, tiers
from router.access.identities import Right
from router.http.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ExplainBody,
    ExplainChatBody,
    MeasureBody,
    SamplingBody,
    TokenizeBody,
    TokenizeChatBody,
)
from router.http.body_model import parse_body
from router.http.body_reading import BodyReader
from router.http.conversation import Conversation
from router.http.errors import REQUEST_ID_HEADER, error_response
from router.http.formatters import (
    ChatFormatter,
    CompletionFormatter,
    ReplyOptions,
    request_id_of,
    server_timing,
)
from router.http.headers import (
    EVENT_IDS_HEADER,
    IGNORED_HEADER,
    LAST_EVENT_HEADER,
    ROUTER_HEADER,
    TIMING_HEADER,
    correlation_of,
    key_of,
    trace_of,
)
from router.http.json_pieces import UTF8, dumps
from router.http.metrics_api import MetricsApi, reached_at
from router.http.other_fields import ignored_fields
from router.http.replies import Reply
from router.http.sse import (
    EventStream,
    StreamLimits,
    unless_disconnected,
    whole_reply,
)
from router.reply_thread import in_reply_thread
from router.request_params import RequestParams
from router.resuming import parse_event_id, split_positions
from router.service import GenerationService

MAX_HEADER_CHARACTERS = 1024
AnyBody = TypeVar("AnyBody", bound=BaseModel)


def _resumed(
    all_params: list[RequestParams], last_event: str, *, is_stream: bool
) -> list[RequestParams]:
    """Make the requests begin where the client is.

    Raises:
        InvalidRequest: The event id does not fit the body.
    """
    request_id, positions = parse_event_id(last_event)
    # The seed follows from the id: under another one, the rest would belong to another answer.
    if not is_stream or all_params[0].request_id not in ("", request_id):
        raise InvalidRequest(
            "Last-Event-ID",
            "is for a stream; send the same body, with stream: true and the same id",
        )
    shares = split_positions(positions, len(all_params))
    return [
        replace(params, request_id=request_id, resume_from=share)
        for params, share in zip(all_params, shares, strict=True)
    ]


def _asked_by(request: Request, all_params: list[RequestParams]) -> list[RequestParams]:
    """Add to a body's parameters who calls, and what the call's headers say."""
    identity = request.state.identity
    correlation_id = correlation_of(request)
    tier_header = request.headers.get(tiers.HEADER, "")
    return [
        replace(params, identity=identity, correlation_id=correlation_id, tier_header=tier_header)
        for params in all_params
    ]


class HttpApi(MetricsApi):
    """The endpoints over one service."""

    def __init__(self, service: GenerationService, created: int, bodies: BodyReader) -> None:
        """Serve `service`; `created` is for OpenAI's field of that name (Unix seconds)."""
        super().__init__(service)
        self.created = created
        self.config = service.config
        self._bodies = bodies

    async def body(self, kind: type[AnyBody], request: Request) -> tuple[AnyBody, dict[str, str]]:
        """Read and validate a body.

        Returns:
            The body, and a header that names the ignored fields.

        Raises:
            ServingError: Names what is wrong.
        """
        tree = await self._bodies.read(request)
        body = parse_body(kind, tree)
        ignored = ignored_fields(body, is_strict=self.config.strict)
        names = ",".join(sorted(ignored))[:MAX_HEADER_CHARACTERS]
        # A client may name a field anything; a header may not hold everything.
        shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in names)
        return body, {IGNORED_HEADER: shown} if ignored else {}

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`: continue a text or token ids, as OpenAI does."""
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
            request, all_params, body, CompletionFormatter(self.service.text, options), headers
        )

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`: answer a conversation, as OpenAI does."""
        body, headers = await self.body(ChatBody, request)
        chat = self._chat_prompt(body, body.add_special_tokens)
        all_params = body.all_params(chat, key_of(request), trace_of(request))
        options = ReplyOptions(
            is_chat=True,
            has_logprobs=bool(body.logprobs),
            has_prompt_logprobs=body.prompt_logprobs is not None,
            **self._shared_options(body, request),
        )
        return await self._reply(
            request, all_params, body, ChatFormatter(self.service.text, options), headers
        )

    def _chat_prompt(self, body: Conversation, adds_special_tokens: bool | None) -> ChatPrompt:
        """Make a prompt of a conversation, of what the operator lets into templates."""
        return body.chat(
            self.config.chat_template_kwargs,
            trusts_template=self.config.trust_request_chat_template,
            adds_special_tokens=bool(adds_special_tokens),
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
        formatter: CompletionFormatter,
        headers: dict[str, str],
    ) -> Response:
        last_event = request.headers.get(LAST_EVENT_HEADER, "")
        if last_event:
            all_params = _resumed(all_params, last_event, is_stream=bool(body.stream))
        asked = _asked_by(request, all_params)
        has_ids = bool(last_event) or request.headers.get(EVENT_IDS_HEADER) == "1"
        work = self.service.prepare(asked, is_resumable=has_ids and bool(body.stream))
        made, charge = await unless_disconnected(request.receive, work)
        reply = Reply(formatter, made, self.service.model, self.created_now())
        group = self.service.open(*made, charge=charge)
        headers[REQUEST_ID_HEADER] = correlation_of(request) or str(made[0].request_id)
        headers[tiers.HEADER] = made[0].tier
        headers[ROUTER_HEADER] = self.service.explanations.router_id
        if body.stream:
            limits = StreamLimits(self.config.keep_alive_s, self.config.slow_reader_s, has_ids)
            return EventStream(reply, group, headers, limits)
        content = await whole_reply(request.receive, reply, group)
        headers["Server-Timing"] = server_timing(reply.timing)
        # A prompt's scores may be megabytes of JSON, and this loop has streams to serve.
        if not reply.is_heavy:
            return JSONResponse(content, headers=headers)
        text = await in_reply_thread(dumps, content, UTF8)
        return Response(text.encode(), headers=headers, media_type=JSONResponse.media_type)

    def created_now(self) -> int:
        """Return Unix seconds for a reply's `created`."""
        # The wall clock is read once: it may jump.
        return self.created + int(self.service.uptime_s())

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`: the token ids of a text or of a conversation."""
        tree = await self._bodies.read(request)
        body: TokenizeBody | TokenizeChatBody
        prompt: str | ChatPrompt
        if "messages" in tree:
            body = parse_body(TokenizeChatBody, tree)
            ignored_fields(body, is_strict=self.config.strict)
            prompt = self._chat_prompt(body, body.add_special_tokens)
            # The prompt says itself whether it adds special tokens: most templates write their own.
            adds = False
        else:
            body = parse_body(TokenizeBody, tree)
            ignored_fields(body, is_strict=self.config.strict)
            prompt = body.prompt
            adds = body.add_special_tokens
        tenant = request.state.identity.tenant
        work = self.service.tokenize(body.model, prompt, adds_special_tokens=adds, tenant=tenant)
        ids, names = await unless_disconnected(request.receive, work)
        return JSONResponse(
            {
                "count": len(ids),
                "max_model_len": self.service.model.max_model_len,
                "tokens": ids,
                "token_strs": names if body.return_token_strs else None,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`: the text of token ids."""
        body, headers = await self.body(DetokenizeBody, request)
        return JSONResponse(
            {"prompt": await self.service.detokenize(body.model, body.tokens)}, headers=headers
        )

    def card(self) -> dict[str, Any]:
        """Describe the model as OpenAI does."""
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
        """`GET /v1/models`: the served model, as OpenAI lists models."""
        return {"object": "list", "data": [self.card()]}

    async def model(self, model_id: str) -> dict[str, Any]:
        """`GET /v1/models/{id}`: one model."""
        if model_id != self.service.model.name:
            raise ModelNotFound(
                f"model {model_id[:80]!r} is not served here; served: {self.service.model.name}"
            )
        return self.card()

    async def ready(self) -> JSONResponse:
        """`GET /ready`: whether a request gets through."""
        call = calls.current()
        if call is not None:
            call.is_recorded = True  # this 503 is an answer: it must not count as a refusal
        status = self.service.status
        return JSONResponse(status.readiness(), status_code=200 if status.is_ready else 503)

    async def load(self) -> JSONResponse:
        """`GET /load`: requests here and in each pool."""
        return JSONResponse(self.service.status.load(), headers=self.own_name())

    async def show_version(self) -> dict[str, str]:
        """`GET /version`: the version of Baton."""
        return {"version": version("baton-serve")}

    async def replicas(self, request: Request) -> dict[str, Any]:
        """`GET /replicas`: every worker and every router that this router knows."""
        status = self.service.status
        return {
            "replicas": status.replicas(),
            "routers": status.routers.shown(reached_at(request)),
        }

    async def prefix_index(self) -> dict[str, Any]:
        """`GET /prefix-index`: how much this router knows of the workers' cached blocks."""
        return self.service.read_prefix_report()

    async def explain_prompt(self, request: Request) -> Response:
        """`POST /prefix-index/explain`: who holds how much of a prompt, and where it would go.

        Names of blocks differ by tenant: nobody learns what another one has asked.
        """
        tree = await self._bodies.read(request)
        body: ExplainBody | ExplainChatBody
        if "messages" in tree:
            body = parse_body(ExplainChatBody, tree)
            chat = self._chat_prompt(body, body.add_special_tokens)
            all_params = body.all_params(chat, "", None)
        else:
            body = parse_body(ExplainBody, tree)
            all_params = body.all_params("", None)
        ignored_fields(body, is_strict=self.config.strict)
        if len(all_params) != 1:
            raise InvalidRequest("prompt", f"has {len(all_params)} prompts; send one")
        identity = request.state.identity
        if body.tenant not in (None, identity.tenant):
            identity.check(Right.OPERATE)
            identity = replace(identity, tenant=body.tenant)
        params = replace(all_params[0], identity=identity)
        work = self.service.explain_prompt(params)
        return JSONResponse(await unless_disconnected(request.receive, work))

    async def explain(self, request: Request, request_id: str) -> JSONResponse:
        """`GET /explain/{id}`: why a request that has ended went where it did; tenants: their own.

        The id may be that of a reply. The answer names the router that gives it, and says how many
        there are.
        """
        # As it is first: a client may choose an id that looks like a reply's.
        names = (request_id, request_id_of(request_id))
        try:
            found = self.service.explain_request(names, request.state.identity)
            reply = JSONResponse(found)
        except RequestNotFound as error:
            reply = error_response(error, correlation_of(request))
        reply.headers.update(self.own_name())
        return reply

    async def kv_routes(self) -> dict[str, Any]:
        """`GET /links`: how KV travels between workers."""
        return {"links": self.service.status.routes()}

    async def measure_kv_routes(self, request: Request) -> Response:
        """`POST /links`: move some MiB over every KV route, and return its speed."""
        body, headers = await self.body(MeasureBody, request)
        routes = await self.service.status.measure_routes(body.mib)
        return JSONResponse({"links": routes}, headers=headers)
