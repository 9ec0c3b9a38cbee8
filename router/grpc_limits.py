"""How much may be in a gRPC request, counted on its bytes before anything is built from them.

Owns the walk over the wire format and the wrapping of handlers. Does not know what fields mean.
Called by `router.grpc_guard`.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from core.errors import InvalidRequest, ServingError
from router.body_limits import MAX_TOKEN_IDS, MAX_VALUES
from router.grpc_requests import abort

SMALL_BYTES = 64 << 10
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MORE = bytes(range(0x80, 0x100))
"""Bytes of a varint that are not its last."""
NOT_PACKED = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


class _Count:
    """Values and packed numbers seen so far."""

    def __init__(self) -> None:
        self.num_values = 0
        self.num_packed = 0


def check_size(data: bytes, kind: Descriptor) -> None:
    """Refuse a message with too much in it.

    Args:
        data: Its bytes; malformed ones are left to the parser.
        kind: What they should be.

    Raises:
        InvalidRequest: Names the field.
    """
    _walk(data, kind, _Count())


def _walk(data: bytes, kind: Descriptor, count: _Count) -> None:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, wire = kind.fields_by_number.get(tag >> 3), tag & 7
        name = field.name if field is not None else "unknown field"
        count.num_values += 1
        if count.num_values > MAX_VALUES:
            raise InvalidRequest(name, f"is one of more than {MAX_VALUES} values; send fewer")
        if wire == VARINT:
            _, at = _varint(data, at)
        elif wire == BYTES:
            size, at = _varint(data, at)
            part, at = data[at : at + size], at + size
            if field is None:
                continue
            if field.message_type is not None:
                _walk(part, field.message_type, count)
            elif field.type not in NOT_PACKED:
                count.num_packed += len(part.translate(None, MORE))
                if count.num_packed > MAX_TOKEN_IDS:
                    raise InvalidRequest(name, f"has more than {MAX_TOKEN_IDS} numbers")
        elif wire in (FIXED64, FIXED32):
            at += 8 if wire == FIXED64 else 4
        else:
            return  # not of this format: the parser says so


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
    return value, at + 1


def bounded(handler: Any) -> Any:  # noqa: ANN401 - grpc has no types
    """A handler of one request that refuses a message with too much in it."""
    parse = handler.request_deserializer
    kind = parse.__self__.DESCRIPTOR

    def read(data: bytes) -> Any:  # noqa: ANN401
        if len(data) > SMALL_BYTES:
            try:
                check_size(data, kind)
            except InvalidRequest as error:
                return error  # an exception here would be an internal error to the client
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
