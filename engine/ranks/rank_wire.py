"""Messages and results as msgpack on the pipe between a worker and its ranks.

Owns the encoding of results and the length prefix; plans are `engine.ranks.plan_wire`'s. Does not
know processes. msgpack is data only: nothing on this pipe can execute.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack

from core.errors import InternalError
from core.plan import StepResult
from core.types import Logprob

PREFIX = struct.Struct("<I")
MAX_MESSAGE_BYTES = 256 << 20


def pack(message: object) -> bytes:
    """Encode one message with its length in front."""
    body: bytes = msgpack.packb(message, use_bin_type=True)
    return PREFIX.pack(len(body)) + body


def unpack(body: bytes) -> Any:  # noqa: ANN401 - the caller knows the message's kind
    """Decode one message.

    Raises:
        InternalError: Not msgpack.
    """
    try:
        return msgpack.unpackb(body, raw=False, strict_map_key=False)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise InternalError(
            f"a rank's message of {len(body)} bytes is malformed: {error}"
        ) from error


def result_to_wire(result: StepResult) -> list[Any]:
    """Flatten a result."""
    tokens = [
        [key, choice, t.token_id, t.logprob, t.top] for (key, choice), t in result.tokens.items()
    ]
    scored = [
        [key, [[t.token_id, t.logprob, t.top] for t in row]] for key, row in result.scored.items()
    ]
    return [result.step_id, tokens, list(result.failed.items()), scored]


def result_from_wire(wire: list[Any]) -> StepResult:
    """Rebuild a result."""
    step_id, tokens, failed, scored = wire
    return StepResult(
        step_id,
        {(k, c): Logprob(t, lp, tuple((i, p) for i, p in top)) for k, c, t, lp, top in tokens},
        {key: text for key, text in failed},  # noqa: C416 - a list of pairs
        {
            key: tuple(Logprob(t, lp, tuple((i, p) for i, p in top)) for t, lp, top in row)
            for key, row in scored
        },
    )
