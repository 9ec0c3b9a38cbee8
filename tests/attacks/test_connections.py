"""Connections that say nothing, in numbers: liveness answers, and who works is left alone."""

import asyncio
import json
import resource
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

from support.http_server import HttpFixture, status

from router.http.server import listener as http_listener
from router.http.server.connections import ConnectionTable
from transport.certificates import make_certificates

ROOT = Path(__file__).parents[2]


async def hold(server, number):
    """Open connections that say nothing."""
    return [await server.connect() for _ in range(number)]


def drop(connections):
    for _, writer in connections:
        writer.transport.abort()


async def test_silent_connections_make_room():
    async with HttpFixture(limit=8) as server:
        silent = await hold(server, 40)
        assert await server.status_of("/health") == 200
        assert server.table.num_displaced >= 32 and len(server.table) <= 8
        drop(silent)


async def test_who_works_is_not_displaced_and_liveness_has_a_reserve():
    async with HttpFixture(limit=4, reserved=2) as server:
        busy = await hold(server, 4)
        for _, writer in busy:
            writer.write(b"GET /hold HTTP/1.1\r\nhost: x\r\n\r\n")
        while len(server.app.seen) < 4:
            await asyncio.sleep(0.01)
        assert await server.status_of("/health") == 200
        refusal = await server.say(b"GET /echo HTTP/1.1\r\nhost: x\r\n\r\n")
        assert status(refusal) == 503 and b"too_many_connections" in refusal
        assert "/echo" not in server.app.seen and not server.table.num_displaced
        server.app.let_go.set()
        for reader, _ in busy:
            assert status(await reader.readuntil(b"ok")) == 200
        drop(busy)


async def test_one_address_has_a_share():
    async with HttpFixture(limit=8, per_address=3) as server:
        mine = await hold(server, 6)
        while len(server.table) > 3:
            await asyncio.sleep(0.01)
        other = socket.socket()
        other.setblocking(False)
        other.bind(("127.0.0.2", 0))
        await asyncio.get_running_loop().sock_connect(other, ("127.0.0.1", server.port))
        reader, writer = await asyncio.open_connection(sock=other)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert status(await reader.readuntil(b"ok")) == 200
        assert (
            server.table.of_address("127.0.0.1") == 3 and server.table.of_address("127.0.0.2") == 1
        )
        drop([*mine, (reader, writer)])


def test_the_addresses_of_one_ipv6_host_share():
    table, close = ConnectionTable(8, 3, 1), lambda: None
    for host in range(3):
        table.admit(f"2001:db8::{host}", close).mark_busy()
    assert table.admit("2001:db8::ffff", close).is_reserved
    assert not table.admit("2001:db8:0:1::1", close).is_reserved
    assert table.of_address("2001:db8::1") == 4 and table.of_address("2001:db8:0:1::2") == 1


async def test_a_tls_handshake_is_due_in_time_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(http_listener, "HEAD_TIMEOUT_S", 0.5)
    make_certificates(tmp_path, ["127.0.0.1"])
    pair = tmp_path / "door.pem", tmp_path / "door.key"
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    async with HttpFixture(limit=4, tls=pair) as server:
        silent = await hold(server, 3)
        while len(server.table) < 3:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert status(await reader.readuntil(b"ok")) == 200
        more = await hold(server, 3)  # a handshake in progress makes room as well
        async with asyncio.timeout(20):
            while len(server.table) > 1:
                await asyncio.sleep(0.02)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert status(await reader.readuntil(b"ok")) == 200
        drop([*silent, *more, (reader, writer)])


SCRIPT = """
import asyncio, json, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
import uvloop
from core import logs
from router.descriptors import raise_descriptor_limit
from router.http.server.listener import make_connection_table
from support.http_server import HttpFixture

async def main():
    logs.configure("router", "json")
    server = HttpFixture()
    server.table = make_connection_table(4096, 0, raise_descriptor_limit(4096))
    async with server:
        print(server.port, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        print(json.dumps({"displaced": server.table.num_displaced, "refused": server.refused}))

uvloop.run(main())
"""


def test_fifteen_hundred_silent_connections_at_a_limit_of_1024_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": ""}
    server = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    silent = []
    try:
        port = int(server.stdout.readline())
        waits_s = []
        for number in range(1500):
            silent.append(socket.create_connection(("127.0.0.1", port), timeout=5))
            if number % 100 == 99:
                began = time.monotonic()
                with socket.create_connection(("127.0.0.1", port), timeout=5) as probe:
                    probe.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                    assert probe.recv(100).startswith(b"HTTP/1.1 200"), number
                waits_s.append(time.monotonic() - began)
        out, err = server.communicate()
        told = json.loads(out)
    finally:
        server.kill()
        server.wait()
        for one in silent:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert told["displaced"] > 900 and not told["refused"]
    line = json.loads(err)
    assert (line["event"], line["limit"], line["needed"]) == ("descriptors_scarce", 1024, 4096)
    print(f"longest wait for liveness: {max(waits_s) * 1000:.0f} ms")
