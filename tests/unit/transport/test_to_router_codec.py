"""What a worker says to a router, as bytes."""

from dataclasses import fields

import pytest

from core.errors import KVTransferError
from core.session import (
    AttemptEnded,
    Load,
    PeerReport,
    Progress,
    RouteReport,
    StepFrame,
    Task,
    TokenDelta,
    WorkerTiming,
)
from core.types import FinishReason, Logprob
from protos.baton.internal.v1 import session_pb2 as pb
from transport.to_router_codec import from_router_wire, to_router_wire


def filled(kind):
    """Every field with a value of its own, so that two that change places are seen."""
    given = {}
    for number, one in enumerate(fields(kind), 2):
        given[one.name] = f"{number}" if one.type == "str" else number
    return kind(**given)


TIMING = filled(WorkerTiming)
SCORES = (Logprob(7, -0.5, ((7, -0.5), (9, -1.5))),)
DELTA = TokenDelta(
    "r",
    3,
    1,
    40,
    (7,),
    SCORES,
    FinishReason.STOP,
    9,
    TIMING,
    prompt_logprobs=SCORES,
    prompt_start=5,
)
MESSAGES = [
    Progress(50, 60, work_in_hand=True, load=filled(Load), rank_pids=(7, 8), is_leaving=True),
    StepFrame(4, (DELTA,), (AttemptEnded("r", 3, Task.PREFILL, TIMING),)),
    PeerReport((RouteReport("a", "shm", 0.5, 2.5), RouteReport("b", error="no way"))),
]


def crossed(message):
    wire = pb.ToRouter.FromString(to_router_wire(5, message).SerializeToString())
    assert wire.number == 5
    return from_router_wire(wire)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_what_a_worker_says_crosses_the_wire_whole(message):
    assert crossed(message) == message


def test_an_error_keeps_its_kind_and_its_words():
    ended = AttemptEnded("r", 3, Task.DECODE, TIMING, KVTransferError("a fragment is missing"))
    found = crossed(StepFrame(4, ended=(ended,))).ended[0]
    assert type(found.error) is KVTransferError and "a fragment is missing" in str(found.error)
