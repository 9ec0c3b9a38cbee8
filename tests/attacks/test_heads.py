"""Before anybody looks at a request: heads too large, too many, too slow,
or of another protocol."""

import asyncio
import logging
import socket
import ssl
import time
from collections import Counter

import pytest
from support.http_server import HttpFixture, SmallApp, read_all, status
from support.process_cluster import is_long
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from router.http.server import protocol as http_protocol
from router.http.server.fair_reading import READ_BYTES
from router.http.server.protocol import MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED, HttpProtocol
from transport.certificates import make_certificates

GET = b"GET /health HTTP/1.1\r\nhost: x\r\n"
END = b"connection: close\r\n\r\n"


def with_header(size):
    return GET + b"x-a: " + b"a" * size + b"\r\n" + END


@pytest.mark.parametrize(
    "size, expected",
    [(MAX_HEAD_BYTES - 200, 200), (MAX_HEAD_BYTES + 1, 431), (1 << 20, 431), (16 << 20, 431)],
)
async def test_a_header_has_a_limit(size, expected):
    async with HttpFixture() as server:
        reply = await server.say(with_header(size))
        assert status(reply) == expected
        if expected == 431:
            assert b'"headers_too_large"' in reply and str(MAX_HEAD_BYTES).encode() in reply
            assert server.refused["headers_too_large"] == 1 and not server.app.seen
        assert await server.status_of("/health") == 200


@pytest.mark.parametrize("number, expected", [(MAX_HEADERS - 2, 200), (MAX_HEADERS + 1, 431)])
async def test_headers_are_counted(number, expected):
    many = b"".join(b"x-%d: 1\r\n" % i for i in range(number))
    async with HttpFixture() as server:
        assert status(await server.say(GET + many + END)) == expected


async def test_a_request_line_has_the_same_limit():
    async with HttpFixture() as server:
        line = b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nhost: x\r\n"
        assert status(await server.say(line + END)) == 431


@pytest.mark.parametrize("pieces", [1, 40])
async def test_an_unfinished_header_is_not_gathered(pieces):
    """However it is cut: the parser tells of a header only when the next one begins."""
    async with HttpFixture() as server:
        reader, writer = await server.connect()
        writer.write(GET + b"x-a: ")
        for _ in range(pieces):
            writer.write(b"b" * (2 * MAX_HEAD_BYTES // pieces))
            await writer.drain()
        async with asyncio.timeout(10):
            assert status(await read_all(reader)) == 431
        writer.close()


async def test_trailers_have_the_limit_too():
    chunks = b"transfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n"
    async with HttpFixture() as server:
        start = b"POST /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + chunks
        assert status(await server.say(start + b"x-t: 1\r\n\r\n")) == 200
        reader, writer = await server.connect()
        writer.write(start)
        for _ in range(64):
            writer.write(b"y" * 1024)
        async with asyncio.timeout(10):
            await read_all(reader)
        writer.close()
        assert server.refused["headers_too_large"] == 1


async def test_trailers_are_no_headers():
    class App(SmallApp):
        async def __call__(self, scope, receive, send):
            await super().__call__(scope, receive, send)
            self.names = [name for name, _ in scope["headers"]]

    app = App()
    trailers = b"authorization: Bearer x\r\nx-forwarded-for: 10.0.0.1\r\n"
    chunked = b"transfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n" + trailers + b"\r\n"
    async with HttpFixture(app=app) as server:
        start = b"POST /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        assert status(await server.say(start + chunked)) == 200
    assert app.names == [b"host", b"connection", b"transfer-encoding"]


async def test_many_small_chunks_and_a_long_body_are_no_head():
    async with HttpFixture() as server:
        start = b"POST /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        ones = b"1\r\nx\r\n" * 30_000
        body = await server.say(start + b"transfer-encoding: chunked\r\n\r\n" + ones + b"0\r\n\r\n")
        assert body.endswith(b"\r\n30000")
        long = b"y" * (1 << 20)
        whole = start + b"content-length: %d\r\n\r\n" % len(long) + long
        assert (await server.say(whole)).endswith(b"\r\n1048576")


@pytest.mark.parametrize("has_tls", [False, True])
async def test_one_turn_of_the_loop_parses_a_little_of_a_connection(tmp_path, monkeypatch, has_tls):
    turn = 0
    parsed = Counter()
    receive = HttpProtocol.data_received

    def count(self, data):
        parsed[turn] += len(data)
        receive(self, data)

    async def tick():
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(HttpProtocol, "data_received", count)
    tls = context = None
    if has_tls:
        make_certificates(tmp_path, ["127.0.0.1"])
        tls = tmp_path / "door.pem", tmp_path / "door.key"
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    ticking = asyncio.create_task(tick())
    async with HttpFixture(tls=tls) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
        start = b"POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(start + b"1\r\nx\r\n" * 30_000 + b"0\r\n\r\n")
        await reader.readuntil(b"\r\n30000")
        writer.close()
    ticking.cancel()
    assert sum(parsed.values()) > 180_000
    assert max(parsed.values()) <= 2 * READ_BYTES  # under TLS a turn may decrypt twice


async def test_a_body_that_nobody_takes_is_not_read_on():
    class App(SmallApp):
        async def __call__(self, scope, receive, send):
            await self.let_go.wait()
            await super().__call__(scope, receive, send)

    async with HttpFixture(app=App()) as server:
        reader, writer = await server.connect()
        writer.write(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 4194304\r\n\r\n")
        writer.write(bytes(4 << 20))
        while not (protocols := server.protocols) or not protocols[0].flow.read_paused:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert len(protocols[0].cycle.body) <= HIGH_WATER_LIMIT + 2 * READ_BYTES
        server.app.let_go.set()
        assert await reader.readuntil(b"\r\n4194304")
        writer.close()


async def test_a_head_is_due_in_time(monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 1.0)
    async with HttpFixture() as server:
        reader, writer = await server.connect()
        assert await read_all(reader) == b""  # it never said a word, nothing is said to it
        slow, slow_writer = await server.connect()
        slow_writer.write(GET[:1])

        async def drip():
            for letter in GET[1:] * 100:
                slow_writer.write(bytes([letter]))
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        reply = await read_all(slow)
        dripping.cancel()
        assert status(reply) == 408 and b"1 s" in reply
        assert server.refused == {"silent": 1, "request_timeout": 1}
        writer.close()
        slow_writer.close()


async def test_the_next_head_is_due_in_time_too(monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.3)
    async with HttpFixture() as server:
        reader, writer = await server.connect()
        writer.write(GET + b"\r\n")
        assert status(await reader.readuntil(b"ok")) == 200
        await asyncio.sleep(0.5)  # a connection may rest
        writer.write(GET + b"\r\n")
        assert status(await reader.readuntil(b"ok")) == 200
        writer.write(GET)
        assert status(await read_all(reader)) == 408
        writer.close()


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
async def test_an_upgrade_is_answered_as_the_request_it_also_is(protocol, caplog):
    async with HttpFixture() as server:
        upgrade = b"connection: upgrade\r\nupgrade: " + protocol + b"\r\n\r\n"
        with caplog.at_level(logging.WARNING):
            reply = await server.say(GET + upgrade)
        assert status(reply) == 200 and b"connection: close" in reply
        assert not caplog.records


async def test_no_request_of_a_client_that_left_is_answered(caplog):
    """It sends several at once, the first one waits, and it goes."""
    async with HttpFixture() as server:
        reader, writer = await server.connect()
        writer.write(b"GET /hold HTTP/1.1\r\nhost: x\r\n\r\n" + GET + b"\r\n" + GET + b"\r\n")
        while not server.app.seen:
            await asyncio.sleep(0.01)
        writer.transport.abort()
        while len(server.table):
            await asyncio.sleep(0.01)
        with caplog.at_level(logging.WARNING):
            server.app.let_go.set()
            assert await server.status_of("/health") == 200
        assert server.app.seen == ["/hold", "/health"]
        assert not caplog.records


async def test_pipelined_requests_are_bounded():
    async with HttpFixture() as server:
        held = b"GET /hold HTTP/1.1\r\nhost: x\r\n\r\n"
        few = asyncio.create_task(server.say(held + (GET + b"\r\n") * 8 + GET + END))
        many = await server.say(held + (GET + b"\r\n") * 4 * MAX_PIPELINED)
        assert many == b"" and server.refused["too_many_pipelined"] == 1
        server.app.let_go.set()
        assert (await few).count(b"HTTP/1.1 200 OK") == 10


async def test_a_body_that_nobody_wants_is_not_waited_for():
    async with HttpFixture() as server:
        head = b"POST /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n{"
        began = time.monotonic()
        assert status(await server.say(head)) == 200
        while len(server.table):
            await asyncio.sleep(0.02)
        assert time.monotonic() - began < 30, "the connection was kept for the body"


async def test_a_client_that_reads_nothing_is_cut():
    async with HttpFixture(stall_s=0.3) as server:
        deaf = socket.create_connection(("127.0.0.1", server.port))
        deaf.sendall(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n")
        while not server.refused["slow_reader"]:
            await asyncio.sleep(0.05)
        while len(server.table):
            await asyncio.sleep(0.01)
        deaf.close()


async def test_a_client_that_reads_slowly_is_not():
    async with HttpFixture(stall_s=0.5) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 16)
        writer.write(b"GET /big HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        size = 0
        while piece := await reader.read(1 << 18):
            size += len(piece)
            await asyncio.sleep(0.05)
        writer.close()
        assert size > 16 << 20 and not server.refused


async def test_noise_gets_a_400_and_no_line_in_the_log(caplog):
    async with HttpFixture() as server:
        with caplog.at_level(logging.INFO):
            for _ in range(200 if is_long() else 20):
                assert status(await server.say(b"\x16\x03\x01 what is this\r\n\r\n")) == 400
        assert server.refused["bad_request"] == (200 if is_long() else 20)
        assert not caplog.records
