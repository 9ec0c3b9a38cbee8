"""What could not be served in time is refused at once, by both servers, with when to come again.

Owns routers that have measured how fast permits come free, or workers with a long queue.
"""

import asyncio

import grpc
import grpc.aio
import pytest
from support.router_servers import RouterServers, counted, log_lines

from client.failures import error_of
from core.errors import TooLate
from core.session import Load, Role, WorkerDescriptor
from core.types import ChoiceFinished, FinishReason, GenerateRequest, SamplingParams, TextDelta
from protos.baton.v1 import generation_pb2 as pb
from router.candidate import Candidate
from router.expected_wait import MIN_INTERVALS

RUNNING = GenerateRequest("r", "m", (1,), SamplingParams(), 1, 0.0)
BODY = {"prompt": "abc", "max_tokens": 5}
ASK = pb.GenerateRequest(text="abc")
INTERVAL_S = 11.0
TTFT = {"batch": {"max_ttft_s": 5.0}}


def servers_with(tmp_path, **limits):
    return RouterServers(tmp_path, **{"max_running": 1, "max_queued": 9, **limits})


def measure(servers):
    """Let the router know how rarely a permit comes free."""
    shedding = servers.service._admission._shedding
    for n in range(MIN_INTERVALS, -1, -1):
        at_s = shedding._clock.now_s() - n * INTERVAL_S
        shedding._releases.released(at_s, is_awaited=True)


def full(servers):
    """Hold the only permit."""
    return servers.service._admission.permit(RUNNING)


async def failure_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def until(is_so):
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_over_http_it_is_a_503_that_says_when(tmp_path, is_stream):
    servers = servers_with(tmp_path, queue_wait_s=1.0)
    async with servers.opened(), servers.web("acme") as http, full(servers):
        measure(servers)
        with log_lines() as lines:
            reply = await http.post("/v1/completions", json={**BODY, "stream": is_stream})
        assert counted(servers, "baton_refusals_total", server="http", code="too_late") == 1
        assert counted(servers, "baton_requests_total", outcome="rejected") == 1
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "too_late"
    # Ten seconds too long, and a quarter more or less.
    wait_ms = int(reply.headers["retry-after-ms"])
    assert 7_500 <= wait_ms <= 12_500
    assert int(reply.headers["retry-after"]) == -(-wait_ms // 1000)
    assert reply.headers["x-should-retry"] == "true"
    assert [(line["event"], line["outcome"]) for line in lines] == [("refusal", "too_late")]


async def test_over_grpc_it_is_in_the_details(tmp_path):
    servers = servers_with(tmp_path, queue_wait_s=1.0)
    async with servers.opened(), full(servers):
        measure(servers)
        with log_lines() as lines:
            failure = await failure_of(servers.call("Generate", ASK, "acme"))
            await until(lambda: lines)
        assert counted(servers, "baton_refusals_total", server="grpc", code="too_late") == 1
    assert failure.code().name == "UNAVAILABLE"
    error = error_of(failure)
    assert type(error) is TooLate and 7.5 <= error.retry_after_s <= 12.5
    assert [(line["event"], line["outcome"]) for line in lines] == [("refusal", "too_late")]


@pytest.mark.parametrize("is_measured", [True, False])
async def test_a_deadline_that_cannot_be_met_is_not_waited_for(tmp_path, is_measured):
    # Below the 11 s that a permit takes, if that is known; otherwise the test waits for its end.
    deadline_s = 10.0 if is_measured else 2.0
    servers = servers_with(tmp_path, queue_wait_s=60.0, deadline_s=deadline_s)
    admission, waited = servers.service._admission, []
    join = admission._join

    def joining(*args):
        waited.append(args)
        join(*args)

    admission._join = joining
    async with servers.opened(), servers.web("acme") as http, full(servers):
        if is_measured:
            measure(servers)
        reply = await http.post("/v1/completions", json={**BODY, "stream": True})
        failure = await failure_of(servers.call("Generate", ASK, "acme"))
        expected = "too_late" if is_measured else "deadline_exceeded"
        for server in ("http", "grpc"):
            labels = {"server": server, "code": expected}
            assert counted(servers, "baton_request_errors_total", **labels) == 1
    code = reply.json()["error"]["code"]
    if is_measured:
        assert (reply.status_code, code) == (503, "too_late")
        assert type(error_of(failure)) is TooLate and waited == []
    else:
        assert (reply.status_code, code) == (504, "deadline_exceeded")
        assert failure.code().name == "DEADLINE_EXCEEDED" and len(waited) == 2


@pytest.mark.parametrize(("tokens_per_s", "status"), [(1.0, 503), (float("nan"), 200)])
async def test_a_queue_at_the_workers_refuses_and_figures_without_sense_do_not(
    tmp_path, tokens_per_s, status
):
    async def speak(run):
        run.emit(TextDelta(0, 0, (7,), "x"))
        run.emit(ChoiceFinished(0, FinishReason.STOP))

    servers = servers_with(tmp_path, max_running=2, tiers=TTFT)
    servers.attempts.run = speak
    who = WorkerDescriptor("w", Role.PREFILL, 1, "a", "b", "tiny", "digest", 16, 1_000, 2_048)
    busy = Candidate(who, Load(waiting_tokens=50), prefill_tokens_per_s=tokens_per_s)
    servers.service._admission._shedding._read_workers = lambda tier: [busy]
    async with servers.opened(), servers.web("acme") as http, full(servers):
        reply = await http.post("/v1/completions", json={**BODY, "prompt": "a" * 100})
    assert reply.status_code == status
    if status == 503:
        assert reply.json()["error"]["code"] == "too_late"
        assert "50.00 s for its turn, tiers.batch.max_ttft_s is 5.00 s" in reply.text
