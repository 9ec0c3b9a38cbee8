"""What a router says to a worker, as bytes."""

import asyncio
from dataclasses import replace

import pytest

from core.session import (
    Hello,
    Submit,
    Task,
    Wanted,
)
from core.types import GenerateRequest, SamplingParams
from protos.baton.internal.v1 import session_pb2 as pb
from transport.to_worker_codec import from_worker_wire, to_worker_wire

REQUEST = GenerateRequest("r", "m", (1, 2, 3), SamplingParams(), 1, 0.0)


async def test_what_a_router_says_crosses_the_wire_whole():
    request = replace(REQUEST, deadline_at=asyncio.get_running_loop().time() + 9.0)
    sampling = SamplingParams(seed=1)
    request = replace(request, sampling=sampling, scope="acme\n", keeps_prefix=True)
    submit = Submit(request, 3, Task.LOCAL, ((),), age_s=2.5)
    wanted = (
        Wanted("r", 3, (4,), 256, num_scores=7, finished_choices=(0,), is_coming=True),
        Wanted("q", 1, (0, 2), 16),
    )
    hello = Hello("router", wanted, 77)
    for message in (submit, hello):
        wire = pb.ToWorker.FromString(to_worker_wire(5, message).SerializeToString())
        found = from_worker_wire(wire)
        if isinstance(found, Submit):
            assert found.request.deadline_at == pytest.approx(request.deadline_at, abs=5.0)
            deadline_at = found.request.deadline_at
            request = replace(request, deadline_at=deadline_at)
            message = replace(submit, request=request)
        assert (wire.number, found) == (5, message)
