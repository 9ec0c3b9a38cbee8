"""Plans and results as msgpack on the pipe between a worker and its ranks.

Owns the two encodings and the length prefix. Does not know processes. Called by
`engine.rank_group` and `engine.rank`. msgpack is data only: nothing on this pipe can execute.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack

from core.errors import InternalError
from core.plan import SampleSpec, StepItem, StepPlan, StepResult
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
        raise InternalError(f"a rank's message of {len(body)} bytes is malformed: {error}") from error


def plan_to_wire(plan: StepPlan) -> list[Any]:
    """Flatten a plan."""
    items = [
        [i.sequence_key, i.start, i.token_ids, i.block_table, [_spec_to_wire(s) for s in i.samples]] for i in plan.items
    ]
    return [plan.step_id, items, plan.copies, plan.report_layers]


def _spec_to_wire(s: SampleSpec) -> list[Any]:
    return [s.choice, s.position, s.seed, s.temperature, s.top_k, s.top_p, s.num_logprobs, s.banned]


def _spec_from_wire(wire: list[Any]) -> SampleSpec:
    choice, position, seed, temperature, top_k, top_p, num_logprobs, banned = wire
    return SampleSpec(choice, position, seed, temperature, top_k, top_p, num_logprobs, tuple(banned))


def plan_from_wire(wire: list[Any]) -> StepPlan:
    """Rebuild a plan."""
    step_id, items, copies, report_layers = wire
    return StepPlan(
        step_id,
        tuple(
            StepItem(key, start, tuple(ids), tuple(table), tuple(_spec_from_wire(s) for s in samples))
            for key, start, ids, table, samples in items
        ),
        tuple((source, destination) for source, destination in copies),
        report_layers,
    )


def result_to_wire(result: StepResult) -> list[Any]:
    """Flatten a result."""
    tokens = [[key, choice, t.token_id, t.logprob, t.top] for (key, choice), t in result.tokens.items()]
    return [result.step_id, tokens, list(result.failed.items())]


def result_from_wire(wire: list[Any]) -> StepResult:
    """Rebuild a result."""
    step_id, tokens, failed = wire
    return StepResult(
        step_id,
        {(k, c): Logprob(t, lp, tuple((i, p) for i, p in top)) for k, c, t, lp, top in tokens},
        {key: text for key, text in failed},  # noqa: C416 - a list of pairs
    )
