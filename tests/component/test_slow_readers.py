"""A client that stops reading: cut in time, and told apart from one that left, at both servers."""

import asyncio
import json

import pytest
from support.http_server import HttpFixture
from support.router_servers import RouterServers, counted, log_lines

from core.metrics import OUTCOMES
from core.types import ChoiceFinished, FinishReason, TextDelta
from protos.baton.v1 import generation_pb2 as pb

LIMIT_S = 0.3
PIECE = "x" * (1 << 15)


@pytest.fixture
async def servers(tmp_path):
    async with RouterServers(tmp_path, slow_reader_s=LIMIT_S).opened() as servers:
        servers.attempts.run = talk
        async with asyncio.timeout(30):
            yield servers


async def talk(run):
    """Say more than any buffer takes, for ever."""
    position = 0
    while True:
        run.emit(TextDelta(0, position, (7,), PIECE))
        position += 1
        await asyncio.sleep(0.001)


async def ask_http(servers, port, *, stream=True):
    """Send a request whose answer nobody reads yet."""
    body = json.dumps({"prompt": "abc", "max_tokens": 1000, "stream": stream})
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 10)
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {servers.keys['acme']}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    writer.write(f"{head}{body}".encode())
    await writer.drain()
    await reader.readexactly(15)
    return writer


def ask_grpc(servers):
    """Start a stream that nobody reads yet."""
    message = pb.GenerateRequest(model="tiny", text="abc")
    message.stopping.max_tokens = 1000
    return servers.call("GenerateStream", message, "acme")


async def told(lines):
    """Wait until the end of the one request stands in the log."""
    while not lines:
        await asyncio.sleep(0.01)


async def ended(servers, protocol, *, leaves):
    """Log line of a stream whose client leaves, or stays and never reads."""
    with log_lines() as lines:
        if protocol == "grpc":
            call = ask_grpc(servers)
            await call.initial_metadata()
            call.cancel() if leaves else None
            await told(lines)
            call.cancel()
        else:
            async with HttpFixture(stall_s=LIMIT_S, app=servers.app) as server:
                writer = await ask_http(servers, server.port)
                writer.transport.abort() if leaves else None
                await told(lines)
                writer.transport.abort()
    (line,) = lines
    return line


@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_a_client_that_never_reads_is_told_from_one_that_left(servers, protocol):
    assert (await ended(servers, protocol, leaves=False))["outcome"] == "slow_reader"
    errors = {"family": "baton_request_errors_total", "server": protocol}
    assert counted(servers, **errors, code="slow_reader") == 1
    assert counted(servers, **errors, code="cancelled") == 0
    assert (await ended(servers, protocol, leaves=True))["outcome"] == "cancelled"
    assert counted(servers, **errors, code="slow_reader") == 1
    assert counted(servers, **errors, code="cancelled") == 1
    assert counted(servers, "baton_requests_total", outcome="cancelled") == 2


async def test_the_event_stream_itself_cuts_a_reader_that_its_server_does_not(servers):
    """A server that waits longer than the stream does."""
    with log_lines() as lines:
        async with HttpFixture(stall_s=20.0, app=servers.app) as server:
            writer = await ask_http(servers, server.port)
            await told(lines)
            writer.transport.abort()
    assert [line["outcome"] for line in lines] == ["slow_reader"]


async def speak(run):
    """Say more than the buffers of a connection take, and end."""
    for position in range(128):
        run.emit(TextDelta(0, position, (7,), PIECE))
    run.emit(ChoiceFinished(0, FinishReason.STOP))


async def test_a_whole_answer_that_nobody_reads_is_one_request(servers):
    servers.attempts.run = speak
    refused = servers.service.recorder.connection_refused
    with log_lines() as lines:
        async with HttpFixture(stall_s=LIMIT_S, app=servers.app, on_refused=refused) as server:
            writer = await ask_http(servers, server.port, stream=False)
            while not server.refused["slow_reader"]:
                await asyncio.sleep(0.01)
            writer.transport.abort()
    assert [line["outcome"] for line in lines] == ["finished", "slow_reader"]
    assert counted(servers, "baton_refusals_total", server="http", code="slow_reader") == 1
    ended = {name: counted(servers, "baton_requests_total", outcome=name) for name in OUTCOMES}
    assert ended == {"finished": 1, "rejected": 0, "cancelled": 0, "failed": 0}
