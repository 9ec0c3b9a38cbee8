"""The gRPC server: `baton.v1.Generation`, health and reflection on grpc.aio.

Owns the calls and the translation of answers; proto types stop here and in `router.grpc.requests`.
Does not know workers. Errors are statuses with `google.rpc` details; the usage of a failed request
is in its trailers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from core.addresses import join_address
from core.config import SecurityConfig
from core.errors import InvalidRequest, ServingError
from core.types import (
    ChatPrompt,
    ChoiceFinished,
    Logprob,
    PromptScored,
    RequestEnded,
    TextDelta,
)
from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc
from router.access.certificate import ServerCertificate
from router.access.identities import Identity
from router.calls import caller
from router.descriptors import MAX_GRPC_CONNECTIONS
from router.grpc import replies
from router.grpc.auth import GrpcGuard
from router.grpc.incoming import IncomingMessages
from router.grpc.requests import abort, chat_params, chat_prompt, generate_params, optional
from router.reply_thread import in_reply_thread
from router.request_params import RequestParams
from router.request_stream import StreamGroup, slow_reader
from router.service import GenerationService

SERVICE = "baton.v1.Generation"
REQUEST_ID_KEY = "x-request-id"
ROUTER_KEY = "x-baton-router"
USAGE_KEY = "baton-usage-bin"
KEEPALIVE_MS = 30_000
PING_INTERVAL_MS = 500
"""A client that pings an idle stream more often is cut off; the library allows one ping in five
minutes by default."""
HANDSHAKE_TIMEOUT_MS = 5_000
"""From accept to the client's HTTP/2 settings."""
IDLE_MS = 300_000
"""A connection without calls is closed after this; clients open another when they need one."""
MAX_STREAMS = 512
"""Concurrent calls of one connection; clients queue further ones themselves."""


class GenerationServicer(generation_pb2_grpc.GenerationServicer):
    """The public service over one `GenerationService`."""

    def __init__(self, service: GenerationService) -> None:
        """Answer calls from `service`."""
        self._service = service

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        """Return the whole answer at once."""
        if request.HasField("resume_from"):
            await abort(
                context,
                InvalidRequest(
                    "resume_from", "is for streams; a whole answer has nothing to resume"
                ),
            )
        group = await self._open(request, context, generate_params)
        texts: dict[int, str] = {}
        tokens: dict[int, list[pb.TokenInfo]] = {}
        finished: dict[int, pb.Finished] = {}
        prompt = None
        try:
            while True:
                for _, event in await group.batch():
                    match event:
                        case PromptScored(logprobs):
                            prompt = await in_reply_thread(self._prompt, logprobs)
                        case TextDelta():
                            texts[event.choice] = texts.get(event.choice, "") + event.text
                            tokens.setdefault(event.choice, []).extend(self._tokens(event))
                        case ChoiceFinished():
                            finished[event.choice] = replies.finished(event)
                        case RequestEnded():
                            await _check(context, event)
                            choices = [
                                pb.Choice(
                                    index=c,
                                    text=texts.get(c, ""),
                                    tokens=tokens.get(c, []),
                                    finished=finished[c],
                                )
                                # Choices finish in any order, and clients expect them by number.
                                for c in sorted(finished)
                            ]
                            return pb.GenerateResponse(
                                request_id=group.requests[0].request_id,
                                model=self._service.model.name,
                                choices=choices,
                                usage=replies.usage(event.usage),
                                timing=replies.timing(request, event.timing),
                                prompt=prompt,
                                service_tier=group.requests[0].tier,
                            )
        finally:
            await group.close()

    async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> None:
        """Stream the answer; dropping the stream cancels the request."""
        await self._stream(request, context, generate_params, pb.GenerateStreamResponse)

    async def Chat(self, request: pb.ChatRequest, context: Any) -> None:
        """Stream the answer to a conversation."""
        await self._stream(request, context, self._chat_params, pb.ChatResponse)

    async def _stream(
        self,
        request: Any,
        context: Any,
        to_params: Callable[[Any, Any], RequestParams],
        message: Any,
    ) -> None:
        group = await self._open(request, context, to_params)
        request_id = group.requests[0].request_id

        async def write(**event: Any) -> None:
            limit_s = self._service.config.slow_reader_s
            try:
                async with asyncio.timeout(limit_s):
                    await context.write(message(request_id=request_id, **event))
            except TimeoutError:
                error = slow_reader(limit_s)
                # Ended with its reason first: `abort` raises, and `close` below would say the
                # client left.
                await group.close(error)
                await abort(context, error)

        try:
            while True:
                for _, event in await group.batch():
                    match event:
                        case PromptScored(logprobs):
                            await write(prompt=await in_reply_thread(self._prompt, logprobs))
                        case TextDelta():
                            delta = pb.Delta(
                                choice=event.choice,
                                position=event.position,
                                text=event.text,
                                tokens=self._tokens(event),
                            )
                            await write(delta=delta)
                        case ChoiceFinished():
                            await write(finished=replies.finished(event))
                        case RequestEnded():
                            await _check(context, event)
                            summary = pb.Summary(
                                usage=replies.usage(event.usage),
                                timing=replies.timing(request, event.timing),
                                service_tier=group.requests[0].tier,
                            )
                            await write(summary=summary)
                            return
        finally:
            await group.close()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Turn a text or a conversation into token ids."""
        kind = request.WhichOneof("input")
        try:
            if kind is None:
                raise InvalidRequest("input", "is missing; set text or conversation")
            adds = optional(request, "add_special_tokens", kind == "text")
            talk = request.conversation
            prompt = (
                request.text
                if kind == "text"
                else self._chat_prompt(talk.messages, talk.options, adds)
            )
            tenant = caller().tenant
            ids, names = await self._service.tokenize(
                request.model, prompt, adds_special_tokens=adds, tenant=tenant
            )
        except ServingError as error:
            await abort(context, error)
        return pb.TokenizeResponse(
            token_ids=ids, tokens=names, max_model_len=self._service.model.max_model_len
        )

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Any
    ) -> pb.DetokenizeResponse:
        """Turn token ids into text."""
        skips = optional(request, "skip_special_tokens", default=False)
        try:
            text = await self._service.detokenize(
                request.model, list(request.token_ids), skips_special=skips
            )
        except ServingError as error:
            await abort(context, error)
        return pb.DetokenizeResponse(text=text)

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        """Cancel a request by id."""
        is_aborted = self._service.abort(caller().tenant, request.request_id)
        return pb.AbortResponse(
            outcome=pb.ABORT_OUTCOME_ABORTED if is_aborted else pb.ABORT_OUTCOME_NOT_RUNNING
        )

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Any
    ) -> pb.ListModelsResponse:
        """List the served model."""
        m = self._service.model
        return pb.ListModelsResponse(
            models=[pb.Model(id=m.name, max_model_len=m.max_model_len, dtype=m.dtype)]
        )

    async def _open(
        self, request: Any, context: Any, to_params: Callable[[Any, Any], RequestParams]
    ) -> StreamGroup:
        identity = caller()
        try:
            params = replace(to_params(request, context), identity=identity)
            (made,), charge = await self._service.prepare([params])
        except ServingError as error:
            context.set_trailing_metadata(self._quota_of(identity))
            await abort(context, error)
        shown_id = made.correlation_id or made.request_id
        # In the trailers, which an error has as well.
        names = ((REQUEST_ID_KEY, shown_id), (ROUTER_KEY, self._service.explanations.router_id))
        context.set_trailing_metadata((*names, *self._quota_of(identity)))
        return self._service.open(made, charge=charge)

    def _quota_of(self, identity: Identity) -> tuple[tuple[str, str], ...]:
        return tuple(self._service.charging.headers(identity).items())

    def _chat_params(self, request: pb.ChatRequest, context: Any) -> RequestParams:
        adds = optional(request.prompt, "add_special_tokens", default=False)
        return chat_params(
            request, context, self._chat_prompt(request.messages, request.chat, adds)
        )

    def _chat_prompt(self, messages: Any, options: Any, adds_special_tokens: bool) -> ChatPrompt:
        return chat_prompt(
            messages, options, self._service.config.chat_template_kwargs, adds_special_tokens
        )

    def _prompt(self, logprobs: tuple[Logprob, ...]) -> pb.PromptInfo:
        return pb.PromptInfo(tokens=[self._token(p.token_id, p) for p in logprobs])

    def _tokens(self, event: TextDelta) -> list[pb.TokenInfo]:
        logprobs = event.logprobs or (None,) * len(event.token_ids)
        return [self._token(i, p) for i, p in zip(event.token_ids, logprobs, strict=True)]

    def _token(self, token_id: int, logprob: Logprob | None) -> pb.TokenInfo:
        if logprob is None:
            return pb.TokenInfo(token_id=token_id)
        text = self._service.text.token_text
        # Without rivals `ranked` still lists the token itself, which nobody asked for.
        ranked = logprob.ranked if logprob.top else ()
        top = [pb.TopToken(token_id=i, text=text(i), logprob=p) for i, p in ranked]
        return pb.TokenInfo(token_id=token_id, logprob=logprob.logprob, top=top)


async def _check(context: Any, ended: RequestEnded) -> None:
    """End the call with the request's error, if it has one; its usage goes in the trailers."""
    if ended.error is not None:
        usage = (USAGE_KEY, replies.usage(ended.usage).SerializeToString())
        context.set_trailing_metadata((*context.trailing_metadata(), usage))
        await abort(context, ended.error)


class GrpcServer:
    """The server around the servicer."""

    def __init__(
        self,
        service: GenerationService,
        security: SecurityConfig,
        certificate: ServerCertificate | None = None,
    ) -> None:
        """Prepare; `start` listens. Without a certificate the server speaks plain text."""
        self._service = service
        self._security = security
        self._certificate = certificate
        self.max_connections = MAX_GRPC_CONNECTIONS
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._following: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> None:
        """Listen. Routers of one node share the port (SO_REUSEPORT), which `baton up` reserves."""
        config = self._service.config
        options = [
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", config.max_body_bytes),
            # What was asked for limits an answer; one over a limit here would be lost whole.
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", 16 << 10),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            # Idle connections are pinged, too: a vanished client's must not stand for long.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
            ("grpc.max_connection_idle_ms", IDLE_MS),
            ("grpc.max_concurrent_streams", MAX_STREAMS),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
        ]
        guard = GrpcGuard(self._service, IncomingMessages(config.body_timeout_s))
        server = grpc.aio.server(options=options, interceptors=[guard])
        generation_pb2_grpc.add_GenerationServicer_to_server(
            GenerationServicer(self._service), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        # Reflection shows every method to whoever asks; in production clients have the protos.
        if not self._security.production:
            reflection.enable_server_reflection(names, server)
        # The empty name is the process, which is alive; readiness is the named service's.
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self._show_readiness()
        self._following = asyncio.get_running_loop().create_task(self._follow_readiness())
        address = join_address(config.host, config.grpc_port)
        self.port = (
            server.add_secure_port(address, self._certificate.credentials())
            if self._certificate
            else server.add_insecure_port(address)
        )
        await server.start()
        self._server = server

    async def _follow_readiness(self) -> None:
        """Show what every canary finds."""
        while True:
            checked = self._service.status.proof.checked
            await self._show_readiness()
            await checked.wait()

    async def _show_readiness(self) -> None:
        """Set the service's health; the server itself, the empty name, stays healthy."""
        states = health_pb2.HealthCheckResponse
        is_ready = self._service.status.is_ready
        await self._health.set(SERVICE, states.SERVING if is_ready else states.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, let calls finish, close."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace=grace_s)
