"""The gRPC door: `baton.v1.Generation`, health and reflection, on an own grpc.aio server.

Owns the translation between proto and core types; proto types stop here. Does not know workers.
Called by the composition root. Errors are statuses with `google.rpc` details.
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from core.errors import InternalError, InvalidRequest, ServingError, Unavailable
from core.types import Anatomy, ChoiceFinished, FinishReason, Logprob, RequestEnded, SamplingParams, TextDelta, Usage
from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc
from router.service import GenerationService, RequestStream

SERVICE = "baton.v1.Generation"
KEEPALIVE_MS = 30_000
_REASONS = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}


def _optional(message: Any, field: str, default: Any) -> Any:  # noqa: ANN401
    return getattr(message, field) if message.HasField(field) else default


def _sampling(request: pb.GenerateRequest) -> SamplingParams:
    sampling, stopping = request.sampling, request.stopping
    return SamplingParams(
        temperature=_optional(sampling, "temperature", 1.0),
        top_k=_optional(sampling, "top_k", 0),
        top_p=_optional(sampling, "top_p", 1.0),
        seed=_optional(sampling, "seed", None),
        n=_optional(sampling, "n", 1),
        max_tokens=_optional(stopping, "max_tokens", 16),
        min_tokens=_optional(stopping, "min_tokens", 0),
        stop=tuple(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=_optional(stopping, "ignore_eos", default=False),
        logprobs=_optional(request.response, "logprobs", None),
    )


class GenerationServicer(generation_pb2_grpc.GenerationServicer):
    """The public service over one `GenerationService`."""

    def __init__(self, service: GenerationService) -> None:
        """Keep the service."""
        self._service = service

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:  # noqa: ANN401
        """The whole answer at once."""
        stream = await self._open(request, context)
        texts: dict[int, str] = {}
        tokens: dict[int, list[pb.TokenInfo]] = {}
        finished: dict[int, pb.Finished] = {}
        try:
            while True:
                match event := await stream.next():
                    case TextDelta():
                        texts[event.choice] = texts.get(event.choice, "") + event.text
                        tokens.setdefault(event.choice, []).extend(self._tokens(event))
                    case ChoiceFinished():
                        finished[event.choice] = _finished(event)
                    case RequestEnded():
                        if event.error is not None:
                            await _abort(context, event.error)
                        choices = [
                            pb.Choice(index=c, text=texts.get(c, ""), tokens=tokens.get(c, []), finished=finished[c])
                            for c in sorted(finished)
                        ]
                        return pb.GenerateResponse(
                            request_id=stream.request.request_id, model=self._service.model.name, choices=choices,
                            usage=_usage(event.usage), timing=_timing(request, event.anatomy),
                        )  # fmt: skip
        finally:
            await stream.close()

    async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> None:  # noqa: ANN401
        """The answer as it is made; dropping the stream cancels the request."""
        stream = await self._open(request, context)
        request_id = stream.request.request_id
        try:
            while True:
                match event := await stream.next():
                    case TextDelta():
                        delta = pb.Delta(
                            choice=event.choice, position=event.position, text=event.text, tokens=self._tokens(event)
                        )
                        await context.write(pb.GenerateStreamResponse(request_id=request_id, delta=delta))
                    case ChoiceFinished():
                        await context.write(pb.GenerateStreamResponse(request_id=request_id, finished=_finished(event)))
                    case RequestEnded():
                        if event.error is not None:
                            await _abort(context, event.error)
                        summary = pb.Summary(usage=_usage(event.usage), timing=_timing(request, event.anatomy))
                        await context.write(pb.GenerateStreamResponse(request_id=request_id, summary=summary))
                        return
        finally:
            await stream.close()

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:  # noqa: ANN401
        """Cancel a request by id."""
        is_aborted = self._service.abort(request.request_id)
        return pb.AbortResponse(outcome=pb.ABORT_OUTCOME_ABORTED if is_aborted else pb.ABORT_OUTCOME_NOT_RUNNING)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: ANN401
        """What is served here."""
        m = self._service.model
        return pb.ListModelsResponse(models=[pb.Model(id=m.name, max_model_len=m.max_model_len, dtype=m.dtype)])

    async def _open(self, request: pb.GenerateRequest, context: Any) -> RequestStream:  # noqa: ANN401
        try:
            if request.WhichOneof("input") is None:
                raise InvalidRequest("input", "is missing; set text or token_ids")
            prompt = request.text if request.WhichOneof("input") == "text" else list(request.token_ids.ids)
            made = await self._service.make_request(
                request.model, prompt, _sampling(request), request.request_id, context.time_remaining()
            )
        except ServingError as error:
            await _abort(context, error)
        return self._service.open(made)

    def _tokens(self, event: TextDelta) -> list[pb.TokenInfo]:
        logprobs = event.logprobs or (None,) * len(event.token_ids)
        return [self._token(i, p) for i, p in zip(event.token_ids, logprobs, strict=True)]

    def _token(self, token_id: int, logprob: Logprob | None) -> pb.TokenInfo:
        if logprob is None:
            return pb.TokenInfo(token_id=token_id)
        text = self._service.text.token_text
        top = [pb.TopToken(token_id=i, text=text(i), logprob=p) for i, p in logprob.top]
        return pb.TokenInfo(token_id=token_id, logprob=logprob.logprob, top=top)


def _finished(event: ChoiceFinished) -> pb.Finished:
    out = pb.Finished(choice=event.choice, reason=_REASONS[event.reason])
    if isinstance(event.stop_match, str):
        out.stop_string = event.stop_match
    elif event.stop_match is not None:
        out.stop_token_id = event.stop_match
    return out


def _usage(u: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=u.prompt_tokens, completion_tokens=u.completion_tokens,
        total_tokens=u.prompt_tokens + u.completion_tokens, cached_tokens=u.cached_tokens,
    )  # fmt: skip


def _timing(request: pb.GenerateRequest, a: Anatomy) -> pb.Timing | None:
    if not request.response.timing:
        return None
    return pb.Timing(
        queue_s=a.queue_s, prefill_s=a.prefill_s, exposed_transfer_s=a.exposed_transfer_s, decode_s=a.decode_s,
        ttft_s=a.ttft_s, e2e_s=a.e2e_s, kv_bytes=a.kv_bytes, kv_blocks=a.kv_blocks, path=a.path,
        prefill_worker=a.prefill_worker, decode_worker=a.decode_worker, prefill_pid=a.prefill_pid,
        decode_pid=a.decode_pid, attempts=a.attempts,
    )  # fmt: skip


async def _abort(context: Any, error: ServingError) -> NoReturn:  # noqa: ANN401
    """End a call with a status and its details."""
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.code, domain="baton")]
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, Unavailable):
        delay = duration_pb2.Duration(seconds=max(1, round(error.retry_after_s)))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        box = any_pb2.Any()
        box.Pack(detail)
        packed.append(box)
    status = status_pb2.Status(code=code_pb2.Code.Value(error.grpc_status), message=error.message, details=packed)
    await context.abort_with_status(rpc_status.to_status(status))
    raise InternalError("a gRPC call went on after its abort")


class GrpcDoor:
    """The server around the servicer."""

    def __init__(self, service: GenerationService) -> None:
        """Nothing listens yet."""
        self._service = service
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        """Listen. Routers of one node share the port, hence SO_REUSEPORT; `baton up` checks that it is free."""
        config = self._service.config
        options = [
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", config.max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", 16 << 10),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
        server = grpc.aio.server(options=options)
        generation_pb2_grpc.add_GenerationServicer_to_server(GenerationServicer(self._service), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self.port = server.add_insecure_port(f"{config.host}:{config.grpc_port}")
        await server.start()
        self._server = server

    async def stop(self, grace_s: float) -> None:
        """Say NOT_SERVING, let calls finish, close."""
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(grace=grace_s)
