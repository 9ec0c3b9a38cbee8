"""How much a gRPC request may hold, counted in its bytes before they are parsed.

Owns the walk over the wire format and the wrapping of handlers. Does not know what fields mean.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from core.errors import InvalidRequest, ServingError
from router.body_limits import MAX_TOKEN_IDS, MAX_VALUES
from router.grpc.requests import abort

SMALL_BYTES = 64 << 10
VARINT = 0
BYTES = 2
GROUP = (3, 4)
"""Begin and end. We define none, but the parser accepts unknown ones."""
FIXED_BYTES = {1: 8, 5: 4}
MAX_VARINT_BYTES = 10
MAX_DEPTH = 100
"""Of nested messages; the parser's own limit."""
MORE = bytes(range(0x80, 0x100))
"""All bytes of a varint but its last one are these."""
NOT_PACKED = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


def check_size(data: bytes, kind: Descriptor) -> None:
    """Refuse a message that holds too much.

    Args:
        data: Its bytes; malformed ones are skipped, for the parser to refuse.
        kind: Type of the message.

    Raises:
        InvalidRequest: Names the field.
    """
    num_values = 0
    num_packed = 0
    within = [(kind, len(data))]  # the messages that `at` is in, each with its end
    at = 0
    while within:
        kind, end = within[-1]
        if at >= end:
            at = end
            within.pop()
            continue
        tag, at = _varint(data, at, end)
        field = kind.fields_by_number.get(tag >> 3)
        wire = tag & 7
        name = field.name if field is not None else "unknown field"
        num_values += 1
        if num_values > MAX_VALUES:
            raise InvalidRequest(name, f"is one of more than {MAX_VALUES} values; send fewer")
        if wire == VARINT:
            _, at = _varint(data, at, end)
        elif wire == BYTES:
            size, at = _varint(data, at, end)
            field_end = min(at + size, end)
            if field is not None and field.message_type is not None:
                within.append((field.message_type, field_end))
                if len(within) > MAX_DEPTH:
                    raise InvalidRequest(
                        name, f"is nested too deeply, the limit is {MAX_DEPTH} levels"
                    )
                continue
            if field is not None and field.type not in NOT_PACKED:
                num_packed += len(data[at:field_end].translate(None, MORE))
                if num_packed > MAX_TOKEN_IDS:
                    raise InvalidRequest(name, f"has more than {MAX_TOKEN_IDS} numbers; send fewer")
            at = field_end
        elif wire in FIXED_BYTES:
            at += FIXED_BYTES[wire]
        elif wire not in GROUP:  # begin and end count as values, and so does what is between
            at = end


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Return a number and where it ends; one that is too long takes all the rest."""
    value = 0
    for shift in range(0, 7 * MAX_VARINT_BYTES, 7):
        if at >= end:
            return 0, end
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    return 0, end


def bounded(handler: Any) -> Any:  # noqa: ANN401 - grpc has no types
    """Wrap a handler of one request: it refuses a message that holds too much."""
    parse = handler.request_deserializer
    kind = parse.__self__.DESCRIPTOR

    def read(data: bytes) -> Any:  # noqa: ANN401
        if len(data) > SMALL_BYTES:
            try:
                check_size(data, kind)
            except InvalidRequest as error:
                return error  # raised here, it would reach the client as an internal error
        return parse(data)

    behaviour = handler.unary_stream or handler.unary_unary

    async def answer(request: Any, context: Any) -> Any:  # noqa: ANN401
        if isinstance(request, ServingError):
            await abort(context, request)
        return await behaviour(request, context)

    make = (
        grpc.unary_stream_rpc_method_handler
        if handler.response_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return make(answer, read, handler.response_serializer)
