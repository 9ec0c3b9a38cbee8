"""Our own Redis with real servers: who may open it, what its user may do,
and that it comes back."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from redis import asyncio as redis_asyncio
from redis.exceptions import AuthenticationError, ConnectionError, NoPermissionError, ResponseError
from support.descriptors import sockets_of
from support.process_cluster import is_gone

from cluster.redis import binary as redis_binary
from cluster.redis import server as redis_server
from cluster.redis.member_store import KEY, RedisMemberStore
from cluster.redis.server import RedisServer, with_redis
from cluster.secrets import secrets_of, with_read_secrets, with_secrets_in_files
from core.config import BatonConfig
from core.ports import StoreFailed

FOUND = {str(b): b for b in map(redis_binary._ask, redis_binary._candidates()) if b}
FLOOD_BYTES = 64 << 20


@pytest.fixture(params=FOUND.values(), ids=FOUND.keys())
def server(request, monkeypatch):
    """Every server program of this machine, one after the other."""
    monkeypatch.setattr(redis_server, "find_server", lambda: request.param)
    running = RedisServer()
    yield running
    running.stop()


async def put(server, members="[]", ttl_s=10.0):
    """Write once the server listens."""
    store = RedisMemberStore(server.url)
    async with asyncio.timeout(30):
        while True:
            try:
                await store.put(members, ttl_s)
                break
            except StoreFailed:
                await asyncio.sleep(0.05)
    await store.close()


def socket_of(server):
    return server.url.partition("@")[2]


async def test_routers_write_and_read_our_keys_and_may_do_nothing_else(server):
    await put(server, "[1]")
    client = redis_asyncio.Redis.from_url(server.url)
    try:
        assert await client.get(KEY) == b"[1]"
        forbidden = (
            ("EVAL", "return 1", "0"),
            ("SCRIPT", "FLUSH"),
            ("CONFIG", "GET", "*"),
            ("MODULE", "LIST"),
            ("KEYS", "*"),
            ("CLIENT", "LIST"),
            ("ACL", "LIST"),
            ("INFO",),
            ("RESTORE", KEY, "0", "x"),
            ("FLUSHALL",),
            ("SHUTDOWN",),
            ("REPLICAOF", "a", "1"),
            ("XGROUP", "CREATE", KEY, "g", "0"),
            ("XREVRANGE", KEY, "+", "-"),
            ("HGETALL", KEY),
            ("XADD", "log", "*", "a", "b"),
            ("SUBSCRIBE", "x"),
            ("SET", "members", "x"),
            ("GET", "members"),
        )
        for command in forbidden:
            with pytest.raises(NoPermissionError):
                await client.execute_command(*command)
        with pytest.raises(ResponseError):
            await client.execute_command("DEBUG", "SLEEP", "0")
    finally:
        await client.aclose()


async def test_nobody_enters_without_the_password_and_no_port_is_open(server):
    await put(server)
    for user in (
        {},
        {"username": "default", "password": ""},
        {"username": "baton", "password": "x"},
    ):
        stranger = redis_asyncio.Redis(unix_socket_path=socket_of(server), **user)
        with pytest.raises((AuthenticationError, ConnectionError, ResponseError)):
            await stranger.get(KEY)
        await stranger.aclose()
    folder = Path(socket_of(server)).parent
    modes = {p.name: p.stat().st_mode & 0o777 for p in (folder, *folder.iterdir())}
    assert modes == {folder.name: 0o700, "socket": 0o600, "url": 0o600}
    command = Path(f"/proc/{server.pid}/cmdline").read_text()
    assert server.url.split(":")[2].partition("@")[0] not in command
    inodes = sockets_of(server.pid)
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    assert inodes
    assert not inodes & {line.split()[9] for table in tables for line in table}


async def test_a_client_that_never_logs_in_and_never_reads_is_cut_and_takes_no_memory(server):
    """Published as CVE-2025-21605: answers to it were kept without bound."""
    await put(server)
    with socket.socket(socket.AF_UNIX) as flood:
        flood.settimeout(20)
        flood.connect(socket_of(server))
        pings = b"*1\r\n$4\r\nPING\r\n" * 5000
        sent = 0
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while sent < FLOOD_BYTES:
                sent += flood.send(pings)
    status = Path(f"/proc/{server.pid}/status").read_text()
    peak_kib = int(status.partition("VmHWM:")[2].split()[0])
    assert peak_kib < 32 << 10
    await put(server)


async def test_a_server_that_ends_is_started_again_and_takes_what_routers_write(server, caplog):
    await put(server, "[1]")
    for restart in (1, 2):
        old = server.pid
        os.kill(old, signal.SIGKILL)
        async with asyncio.timeout(30):
            while server.pid == old:
                await asyncio.sleep(0.02)
        assert server.num_restarts == restart
        await put(server, f"[{restart}]")
    told = [
        (r.fields["reason"], r.fields["restarts"], r.fields["retry_in_s"])
        for r in caplog.records
        if getattr(r, "event", "") == "store_restarted"
    ]
    assert told == [("exit code -9", 1, 0.2), ("exit code -9", 2, 0.4)]
    last = server.pid
    server.stop()
    assert is_gone(last)
    assert not Path(socket_of(server)).parent.exists()
    assert server.num_restarts == 2


async def test_what_a_terminal_sends_reaches_no_server_of_ours(server):
    """Ctrl-C goes to the whole group of the foreground: Redis would end, and be told as lost."""
    await put(server)
    assert os.getpgid(server.pid) != os.getpgid(0)
    old = server.pid
    os.kill(old, signal.SIGKILL)
    async with asyncio.timeout(30):
        while server.pid == old:
            await asyncio.sleep(0.02)
    assert os.getpgid(server.pid) != os.getpgid(0), "nor the one that is started again"


async def test_a_server_that_cannot_be_started_is_tried_again(server, monkeypatch):
    await put(server)
    start, refusals = server._spawn, []

    def refuse_twice():
        if len(refusals) < 2:
            refusals.append(1)
            raise BlockingIOError("no process to be had")
        return start()

    monkeypatch.setattr(server, "_spawn", refuse_twice)
    monkeypatch.setattr(redis_server, "MAX_PAUSE_S", 0.2)
    os.kill(server.pid, signal.SIGKILL)
    await put(server, "[2]")
    assert len(refusals) == 2
    assert server.num_restarts == 3


async def test_another_process_reads_the_address_from_the_file_that_its_config_names(
    server, tmp_path
):
    """The way of a replica on Ray: it is told the name of a file, and never the password."""
    config = with_redis(BatonConfig(seed_key="s" * 32), server.reference)
    (tmp_path / "private").mkdir()
    config = with_secrets_in_files(config, tmp_path / "private")
    text = config.model_dump_json()
    assert server.url not in text
    assert "s" * 32 not in text
    read = secrets_of(with_read_secrets(BatonConfig.model_validate_json(text)))
    assert (read["redis.url"], read["seed_key"]) == (server.url, "s" * 32)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "private").iterdir()} == {0o600}
    await put(server)
    code = """if True:
        import asyncio, sys
        from cluster.secrets import with_read_secrets
        from core.config import BatonConfig
        from cluster.redis.member_store import RedisMemberStore
        config = with_read_secrets(BatonConfig.model_validate_json(sys.stdin.read()))
        async def main():
            store = RedisMemberStore(config.redis.url)
            for _ in range(100):
                try:
                    return await store.put("[7]", 10.0)
                except Exception:
                    await asyncio.sleep(0.05)
        asyncio.run(main())"""
    subprocess.run([sys.executable, "-c", code], input=text, text=True, check=True, timeout=60)
    client = redis_asyncio.Redis.from_url(server.url)
    assert await client.get(KEY) == b"[7]"
    await client.aclose()


async def test_what_a_router_wrote_is_gone_soon_after_the_router(server):
    await put(server, "[1]", ttl_s=0.05)
    client = redis_asyncio.Redis.from_url(server.url)
    async with asyncio.timeout(20):
        while await client.get(KEY) is not None:
            await asyncio.sleep(0.02)
    await client.aclose()


def test_a_long_temporary_folder_does_not_keep_the_socket_from_being_made(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    folder = redis_server._private_folder()
    assert folder.parent == Path("/tmp")
    folder.rmdir()
    assert not list(long.iterdir())
