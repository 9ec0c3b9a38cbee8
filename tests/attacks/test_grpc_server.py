"""The gRPC server before a key is seen: silent connections, many streams, rapid resets."""

import asyncio
import itertools
import struct
import time
from types import SimpleNamespace

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.http2 import (
    CANCEL,
    END_STREAM,
    HEADERS,
    MAX_CONCURRENT_STREAMS,
    RST_STREAM,
    RawClient,
    frame,
)
from support.process_cluster import is_long, note

from core.config import RouterConfig, SecurityConfig
from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc
from router.access.bad_keys import BadKeys
from router.access.credentials import Keyring, new_key
from router.body_limits import MAX_TOKEN_IDS
from router.grpc import incoming as grpc_incoming
from router.grpc import server as grpc_server
from router.grpc.server import MAX_STREAMS, GrpcServer

WATCH = "/grpc.health.v1.Health/Watch"
EMPTY = b"\0\0\0\0\0"


READY = SimpleNamespace(is_ready=True, proof=SimpleNamespace(checked=asyncio.Event()))


@pytest.fixture()
async def server():
    config = RouterConfig(grpc_port=0)
    service = SimpleNamespace(
        config=config,
        keyring=Keyring("", time.monotonic),
        status=READY,
        bad_keys=BadKeys(time.monotonic),
        recorder=SimpleNamespace(call_ended=lambda call: None),
        arrive=lambda identity: None,
    )
    made = GrpcServer(service, SecurityConfig())
    made.max_connections = 8
    await made.start()
    yield made
    await made.stop(0)


async def is_alive(server):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
        return reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_connection_that_never_greets_is_cut(server, monkeypatch):
    await server.stop(0)
    monkeypatch.setattr(grpc_server, "HANDSHAKE_TIMEOUT_MS", 300)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    async with asyncio.timeout(10):
        await reader.read()  # the server's own greeting, then the end
    writer.close()


async def test_connections_have_a_cap(server):
    several = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(20)]
    ends = [asyncio.create_task(reader.read()) for reader, _ in several]
    async with asyncio.timeout(10):
        while sum(end.done() for end in ends) < 12:
            await asyncio.sleep(0.02)
    for _, writer in several:
        writer.transport.abort()
    await asyncio.gather(*ends, return_exceptions=True)


async def test_streams_of_a_connection_have_a_limit_that_is_announced(server):
    client = await asyncio.to_thread(RawClient, server.port)
    assert client.settings[MAX_CONCURRENT_STREAMS] == MAX_STREAMS
    client.socket.close()


async def test_rapid_resets_leave_the_loop_to_others(server):
    """The library does not cut such a connection: it answers others all the while."""
    client = await asyncio.to_thread(RawClient, server.port)
    number = 100_000 if is_long() else 5_000

    def flood():
        for _ in range(number // 50):
            out = b""
            for _ in range(50):
                stream = client.next_stream
                out += client.call(WATCH, EMPTY) + frame(RST_STREAM, 0, stream, CANCEL)
            client.socket.sendall(out)

    flooding = asyncio.create_task(asyncio.to_thread(flood))
    gaps_s = [0.0]
    while not flooding.done():
        began = time.monotonic()
        await asyncio.sleep(0.001)
        gaps_s.append(time.monotonic() - began)
    await asyncio.gather(flooding, return_exceptions=True)
    assert await is_alive(server)
    client.socket.close()
    note("rapid_reset", {"streams": number, "longest_gap_ms": round(max(gaps_s) * 1000, 1)})


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_strangers_message_is_not_waited_for(server, tmp_path, method):
    """Half of it has come, and it would be held as long as the stranger likes."""
    keys = tmp_path / "keys"
    keys.write_text(new_key("acme", "standard")[1] + "\n")
    server._service.keyring = Keyring(str(keys), time.monotonic)
    size = struct.pack(">BI", 0, 4_000_000)

    def knock():
        client = RawClient(server.port, timeout_s=10)
        stream = client.next_stream
        client.socket.sendall(client.call(f"/baton.v1.Generation/{method}", size + b"a" * 10_000))
        while True:
            for kind, _, of, payload in client.read():
                if (kind, of) == (HEADERS, stream):
                    return payload

    assert b"no valid API key" in await asyncio.to_thread(knock)


async def test_half_sent_messages_are_given_up_and_whole_ones_answered(server, monkeypatch):
    """Some at once, where there are too many; the others when their time is over."""
    monkeypatch.setattr(grpc_incoming, "MAX_SLOW", 4)
    server._service.config = RouterConfig(grpc_port=0, body_timeout_s=3.0)
    server = GrpcServer(server._service, SecurityConfig())
    await server.start()
    half = struct.pack(">BI", 0, 4_000_000) + b"a" * 10_000
    client = await asyncio.to_thread(RawClient, server.port, 20)

    def send():
        for _ in range(10):
            client.socket.sendall(client.call("/grpc.health.v1.Health/Check", half))

    def endings():
        while True:
            for kind, flags, _, payload in client.read():
                if kind == HEADERS and flags & END_STREAM:
                    yield payload

    def first(number):
        return list(itertools.islice(ends, number))

    await asyncio.to_thread(send)
    ends = endings()
    evicted = await asyncio.to_thread(first, 6)
    assert all(b"too many messages are being received" in payload for payload in evicted)
    assert await is_alive(server)
    late = await asyncio.to_thread(first, 4)
    assert all(b"did not arrive within 3 s" in payload for payload in late)
    client.socket.close()
    await server.stop(0)


async def test_a_message_with_too_much_in_it_is_refused_before_it_is_built(server):
    """It reaches no service: this one has nothing to make requests with."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        ids = pb.TokenIds(ids=[1] * (MAX_TOKEN_IDS + 1))
        calls = (
            stub.Generate(pb.GenerateRequest(token_ids=ids), timeout=20),
            stub.Detokenize(pb.DetokenizeRequest(token_ids=ids.ids), timeout=20),
            stub.GenerateStream(pb.GenerateRequest(token_ids=ids), timeout=20).read(),
        )
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert f"more than {MAX_TOKEN_IDS} numbers" in refused.value.details()
