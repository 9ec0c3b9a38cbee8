"""Plans and results as msgpack on the pipe between a worker and its ranks.

Owns the two encodings and the length prefix. Does not know processes. Called by
`engine.rank_group` and `engine.rank`. msgpack is data only: nothing on this pipe can execute.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack

from core.errors import InternalError
from core.plan import Penalties, SampleSpec, StepItem, StepPlan, StepResult
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


def plan_to_wire(plan: StepPlan) -> list[Any]:
    """Flatten a plan."""
    items = [
        [
            i.sequence_key,
            i.start,
            i.token_ids,
            i.block_table,
            [_spec_to_wire(s) for s in i.samples],
            i.targets,
            i.num_target_logprobs,
        ]
        for i in plan.items
    ]
    return [plan.step_id, items, plan.copies, plan.report_layers, plan.arrived]


def _spec_to_wire(s: SampleSpec) -> list[Any]:
    p = s.penalties
    penalties = (
        None if p is None else [p.presence, p.frequency, p.repetition, p.prompt_ids, p.output_ids]
    )
    return [s.choice, s.position, s.seed, s.temperature, s.top_k, s.top_p, s.num_logprobs, s.banned, s.min_p, s.bias,
            s.allowed, penalties]  # fmt: skip


def _spec_from_wire(wire: list[Any]) -> SampleSpec:
    (
        choice,
        position,
        seed,
        temperature,
        top_k,
        top_p,
        num_logprobs,
        banned,
        min_p,
        bias,
        allowed,
        p,
    ) = wire
    penalties = None if p is None else Penalties(p[0], p[1], p[2], tuple(p[3]), tuple(p[4]))
    pairs = tuple((token_id, value) for token_id, value in bias)
    return SampleSpec(
        choice, position, seed, temperature, top_k, top_p, num_logprobs, tuple(banned), min_p, pairs, tuple(allowed),
        penalties,
    )  # fmt: skip


def plan_from_wire(wire: list[Any]) -> StepPlan:
    """Rebuild a plan."""
    step_id, items, copies, report_layers, arrived = wire
    return StepPlan(
        step_id,
        tuple(
            StepItem(
                key,
                start,
                tuple(ids),
                tuple(table),
                tuple(map(_spec_from_wire, samples)),
                "",
                tuple(targets),
                num_top,
            )
            for key, start, ids, table, samples, targets, num_top in items
        ),
        tuple((source, destination) for source, destination in copies),
        report_layers,
        tuple(arrived),
    )


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
