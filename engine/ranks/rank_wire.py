"""Messages on the pipe between a worker and its ranks: their shapes, and msgpack of them.

Owns the length prefix and the kinds of messages; what is in a plan is `engine.ranks.plan_wire`'s.
Does not know processes. msgpack is data only: nothing on this pipe can execute, and what does not
have the shape that the reader expects is an error.
"""

from __future__ import annotations

import struct
from typing import Any, TypeVar

import msgspec
from msgspec.msgpack import Decoder

from core.errors import InternalError
from core.plan import StepResult

PREFIX = struct.Struct("<I")
MAX_MESSAGE_BYTES = 256 << 20

Message = TypeVar("Message")


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """A rank has loaded its part of the model."""


class Fatal(msgspec.Struct, frozen=True, array_like=True, tag="fatal"):
    """A rank cannot load it, and ends."""

    message: str


class LayerDone(msgspec.Struct, frozen=True, array_like=True, tag="layer"):
    """The KV of one layer of a step is computed."""

    step_id: int
    layer: int


class Executed(msgspec.Struct, frozen=True, array_like=True, tag="result"):
    """A plan is executed."""

    result: StepResult


FromRank = Ready | Fatal | LayerDone | Executed
FROM_RANK: Decoder[FromRank] = Decoder(FromRank)
SETUP = Decoder(dict[str, Any])
"""The first message to a rank; all others are plans."""


def pack(message: object) -> bytes:
    """Encode one message with its length in front."""
    body = msgspec.msgpack.encode(message)
    return PREFIX.pack(len(body)) + body


def unpack(body: bytes, decoder: Decoder[Message]) -> Message:
    """Decode one message of the decoder's kind, or of one of its kinds.

    Raises:
        InternalError: It is something else.
    """
    try:
        return decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise InternalError(
            f"a rank's message of {len(body)} bytes is malformed: {error}"
        ) from error
