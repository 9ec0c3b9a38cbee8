"""Proto requests to request parameters, and errors to statuses.

Owns presence (absent means the default, 0 means 0), the metadata that is read, and the `google.rpc`
details. Does not know services or streams.
"""

from __future__ import annotations

from collections.abc import MutableMapping, MutableSequence
from dataclasses import fields
from typing import Any, NoReturn

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.json_format import MessageToDict
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from core.errors import (
    InternalError,
    InvalidRequest,
    ModelNotFound,
    ServingError,
)
from core.trace import parse_trace
from core.types import ChatPrompt, SamplingParams
from protos.baton.v1 import generation_pb2 as pb
from router.calls import note_error
from router.refusals import retry_after_s
from router.request_params import RequestParams, correlation_id_of
from router.tiers import HEADER

SAMPLING = frozenset(one.name for one in fields(SamplingParams)) - {"bad_words"}
"""Fields of `SamplingParams` that messages have as they are; bad words are text there."""


def optional(message: Any, field: str, default: Any) -> Any:
    """Value of a field that has presence."""
    return getattr(message, field) if message.HasField(field) else default


def _given(request: pb.GenerateRequest | pb.ChatRequest) -> dict[str, Any]:
    """Collect the sampling fields that are there: a scalar has presence, a list has entries."""
    return {
        field.name: _frozen(value)
        for group in (request.sampling, request.stopping, request.response)
        for field, value in group.ListFields()
        if field.name in SAMPLING
    }


def _frozen(value: Any) -> Any:
    """A protobuf list as a tuple, a map as pairs in order."""
    if isinstance(value, MutableMapping):
        return tuple(sorted(value.items()))
    return tuple(value) if isinstance(value, MutableSequence) else value


def _retention(value: int) -> str:
    """Name a retention as HTTP does; one of a newer version is refused by its number."""
    names: dict[int, str] = {
        pb.CACHE_RETENTION_UNSPECIFIED: "",
        pb.CACHE_RETENTION_IN_MEMORY: "in_memory",
        pb.CACHE_RETENTION_24H: "24h",
    }
    return names.get(value, str(value))


def _params(
    request: pb.GenerateRequest | pb.ChatRequest,
    context: Any,
    prompt: str | list[int] | ChatPrompt,
    *,
    adds: bool,
) -> RequestParams:
    metadata = dict(context.invocation_metadata() or ())
    return RequestParams(
        prompt=prompt,
        sampling=_given(request),
        model=request.model,
        time_limit_s=context.time_remaining(),
        request_id=request.request_id or str(metadata.get("idempotency-key", "")),
        correlation_id=correlation_id_of(str(metadata.get("x-request-id", ""))),
        bad_words=request.sampling.bad_words,
        adds_special_tokens=adds,
        truncate_prompt_tokens=optional(request.prompt, "truncate_tokens", None),
        cache_salt=request.prompt.cache_salt,
        prompt_cache_key=request.prompt.prompt_cache_key,
        prompt_cache_retention=_retention(request.prompt.prompt_cache_retention),
        session_id=request.prompt.session_id,
        service_tier=request.service_tier,
        tier_header=str(metadata.get(HEADER, "")),
        resume_from=tuple(request.resume_from.positions),
        resume_tokens=tuple(tuple(t.ids) for t in request.resume_from.tokens),
        trace=parse_trace(
            str(metadata.get("traceparent", "")), str(metadata.get("tracestate", ""))
        ),
    )


def generate_params(request: pb.GenerateRequest, context: Any) -> RequestParams:
    """What a Generate or GenerateStream call asks for.

    Raises:
        InvalidRequest: It has no input.
    """
    kind = request.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("input", "is missing; set text or token_ids")
    prompt = request.text if kind == "text" else list(request.token_ids.ids)
    return _params(
        request, context, prompt, adds=optional(request.prompt, "add_special_tokens", default=True)
    )


def chat_params(request: pb.ChatRequest, context: Any, chat: ChatPrompt) -> RequestParams:
    """What a Chat call asks for."""
    return _params(request, context, chat, adds=False)


def chat_prompt(
    messages: Any, options: pb.ChatOptions, allowed: tuple[str, ...], adds_special_tokens: bool
) -> ChatPrompt:
    """A conversation as the chat template gets it.

    Raises:
        InvalidRequest: No messages, or a variable that may not be set or has no value in JSON.
    """
    if not messages:
        raise InvalidRequest("messages", "is empty; send at least one")
    try:
        variables = MessageToDict(options.template_kwargs)
    except ValueError as error:  # NaN, an infinity
        raise InvalidRequest("template_kwargs", f"is no JSON: {error}") from error
    unknown = sorted(variables.keys() - set(allowed))
    if unknown:
        raise InvalidRequest(
            "template_kwargs", f"has {unknown[0][:40]!r}; allowed: {', '.join(allowed)}"
        )
    continues = options.continue_final_message
    adds = optional(options, "add_generation_prompt", not continues)
    if continues and adds:
        raise InvalidRequest(
            "continue_final_message", "and add_generation_prompt exclude each other"
        )
    turns = [
        {"role": m.role, "content": m.content, **({"name": m.name} if m.HasField("name") else {})}
        for m in messages
    ]
    return ChatPrompt(
        turns,
        variables,
        adds_generation_prompt=adds,
        continues_final=continues,
        adds_special_tokens=adds_special_tokens,
    )


async def abort(context: Any, error: ServingError) -> NoReturn:
    """End a call with a status and its details, and note its reason; never returns."""
    note_error(error)
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.code, domain="baton")]
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, ModelNotFound):
        details.append(
            error_details_pb2.ResourceInfo(resource_type="model", description=error.message)
        )
    wait_s = retry_after_s(error)
    if wait_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(wait_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        box = any_pb2.Any()
        box.Pack(detail)
        packed.append(box)
    status = status_pb2.Status(
        code=code_pb2.Code.Value(error.grpc_status), message=error.message, details=packed
    )
    made = rpc_status.to_status(status)
    # `abort` replaces the trailers that were set before, so they are carried over.
    await context.abort(
        made.code, made.details, (*made.trailing_metadata, *(context.trailing_metadata() or ()))
    )
    raise InternalError("a gRPC call went on after its abort")
