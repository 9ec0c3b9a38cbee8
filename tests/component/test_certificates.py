"""New certificates are taken up where one listens and dials, and a broken pair shuts nothing."""

import asyncio
import collections
import contextlib
import logging
import ssl
import sys
from types import SimpleNamespace

import grpc
import grpc.aio
import pytest
from support.router_servers import RouterServers

from core.certificate_files import LOOK_S
from core.config import SecurityConfig
from core.errors import ConfigError
from core.ports import StreamClosed
from protos.baton.v1 import generation_pb2 as pb
from router.access.certificate import ServerCertificate
from transport.certificates import make_certificates
from transport.fetch_streams import fetch_network
from transport.tls import fetch_tls


class Pair:
    """The files of a server, and a clock to look at them by."""

    def __init__(self, folder):
        self.folder, self.now_s = folder, 0.0
        self.roots = self.renew()
        self.security = SecurityConfig(
            door_certificate=str(folder / "door.pem"), door_key=str(folder / "door.key")
        )
        self.certificate = ServerCertificate(self.security, lambda: self.now_s)
        self.files = self.certificate._pair

    def renew(self):
        """Put a pair of a new authority in place, whose certificate is returned."""
        folder = self.folder / "made"
        make_certificates(folder, ["localhost"])
        for name in ("door.pem", "door.key", "ca.pem"):
            (folder / name).replace(self.folder / name)
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()
        return (self.folder / "ca.pem").read_bytes()

    def make(self):
        """As uvicorn makes its context."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.security.door_certificate, self.security.door_key)
        return context


@pytest.fixture
def pair(tmp_path):
    (tmp_path / "tls").mkdir()
    return Pair(tmp_path / "tls")


async def believes(port, roots, *, names_server=True):
    """Does a client that believes `roots` get through the handshake?"""
    context = ssl.create_default_context(cadata=roots.decode())
    context.check_hostname = names_server
    try:
        async with asyncio.timeout(5):
            _, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=context, server_hostname="localhost" if names_server else ""
            )
    except ssl.SSLCertVerificationError:
        return False
    writer.close()
    return True


@pytest.mark.parametrize("names_server", [True, False])
async def test_the_http_server_takes_up_a_new_certificate(pair, names_server):
    async def greet(reader, writer):
        await reader.read(1)
        writer.close()

    context = pair.certificate.context(pair.make)
    server = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    try:
        for _ in range(2):
            before = pair.roots
            assert await believes(port, before, names_server=names_server)
            pair.roots = pair.renew()
            assert await believes(port, before, names_server=names_server), "it looks once a second"
            pair.now_s += LOOK_S
            assert await believes(port, pair.roots, names_server=names_server)
            assert not await believes(port, before, names_server=names_server)
    finally:
        server.close()


async def models(port, roots, key):
    credentials = grpc.ssl_channel_credentials(roots)
    options = [
        ("grpc.ssl_target_name_override", "localhost"),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        call = channel.unary_unary(
            "/baton.v1.Generation/ListModels",
            response_deserializer=pb.ListModelsResponse.FromString,
        )
        try:
            answer = await call(b"", metadata=(("authorization", f"Bearer {key}"),), timeout=5)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            return 0
        return len(answer.models)


async def test_the_grpc_server_takes_up_a_new_certificate(pair, tmp_path):
    async with RouterServers(tmp_path, certificate=pair.certificate).opened() as servers:
        key, port, before = servers.keys["acme"], servers.grpc.port, pair.roots
        assert await models(port, before, key) == 1
        after = pair.renew()
        pair.now_s += LOOK_S
        assert await models(port, after, key) == 1
        assert await models(port, before, key) == 0


def test_a_pair_that_does_not_fit_is_told_once_and_the_old_one_stays(pair, caplog):
    caplog.set_level(logging.WARNING)
    old = pair.files.content
    key = (pair.folder / "door.key").read_bytes()
    pair.renew()
    (pair.folder / "door.key").write_bytes(key)
    for _ in range(3):
        pair.now_s += LOOK_S
        assert pair.files.refresh() == 0
    assert pair.files.content == old
    assert [r.event for r in caplog.records] == ["certificate_unusable"]
    pair.renew()
    pair.now_s += LOOK_S
    assert pair.files.refresh() == 1 and pair.files.content != old


def test_a_pair_that_could_not_be_read_for_a_moment_is_taken_up_later(pair, caplog, monkeypatch):
    caplog.set_level(logging.INFO)

    def read():
        raise OSError(24, "Too many open files")

    new = pair.renew()
    with monkeypatch.context() as patch:
        patch.setattr(pair.files, "_read", read)
        for _ in range(3):
            pair.now_s += LOOK_S
            assert pair.files.refresh() == 0
    told = [record.event for record in caplog.records]
    assert told == ["certificate_unusable"]
    pair.now_s += LOOK_S
    assert pair.files.refresh() == 1 and new != pair.roots
    assert pair.certificate.chain() == (pair.folder / "door.pem").read_bytes()


def test_files_that_are_gone_leave_the_old_pair(pair, caplog):
    (pair.folder / "door.pem").unlink()
    for _ in range(3):
        pair.now_s += LOOK_S
        assert pair.files.refresh() == 0
    assert [r.event for r in caplog.records] == ["certificate_unusable"]
    pair.renew()
    pair.now_s += LOOK_S
    assert pair.files.refresh() == 1


def test_a_server_does_not_open_with_a_broken_pair(pair):
    (pair.folder / "door.key").write_text("nonsense")
    with pytest.raises(ConfigError, match="door_key cannot be used"):
        ServerCertificate(pair.security, lambda: 0.0)


# --- inside --------------------------------------------------------------------------------------


class Echo:
    """Two ends of the inside, each with its own look at the folder."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.now_s = folder, 0.0
        monkeypatch.setattr(
            "transport.tls.SystemClock", lambda: SimpleNamespace(now_s=lambda: self.now_s)
        )
        security = SecurityConfig(tls_dir=str(folder))
        self.server = fetch_network(tls=fetch_tls(security, "prefill"))
        self.security = security

    async def greet(self, stream):
        await stream.send(await stream.recv())
        await stream.close()

    async def is_heard(self, client, address):
        try:
            async with asyncio.timeout(5):
                stream = await client.dial(address)
                await stream.send(b"x")
                return await stream.recv() == b"x"
        except StreamClosed:
            return False


async def test_the_inside_takes_up_new_certificates_where_it_listens_and_where_it_dials(
    tmp_path, monkeypatch
):
    make_certificates(tmp_path / "new", ["localhost"])
    make_certificates(tmp_path / "tls", ["localhost"])
    echo = Echo(tmp_path / "tls", monkeypatch)
    old, new = (
        fetch_network(tls=fetch_tls(SecurityConfig(tls_dir=str(tmp_path / name)), "decode"))
        for name in ("tls", "new")
    )
    address = await echo.server.listen(echo.greet)
    try:
        assert await echo.is_heard(old, address) and not await echo.is_heard(new, address)
        for file in (tmp_path / "new").iterdir():
            (tmp_path / "tls" / file.name).write_bytes(file.read_bytes())
        echo.now_s += LOOK_S
        assert await echo.is_heard(new, address), "the server shows and believes what is new"
        late = fetch_network(tls=fetch_tls(echo.security, "decode"))
        assert await echo.is_heard(late, address)
        await late.close()
        old._channels, kept = {}, old._channels
        assert await echo.is_heard(old, address), "and who dials anew reads anew"
        for channel in kept.values():
            await channel.close()
    finally:
        for network in (old, new, echo.server):
            await network.close()


LISTEN = """
import asyncio, sys
from transport.tls import fetch_tls
from core.config import SecurityConfig
from transport.fetch_streams import fetch_network

async def main():
    async def silent(stream):
        await stream.recv()
    network = fetch_network(tls=fetch_tls(SecurityConfig(tls_dir=sys.argv[1]), "prefill"))
    print(await network.listen(silent), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_role_that_may_not_open_a_stream_hears_so_every_time(tmp_path):
    """Over a process border: within one process the refusal never crosses the first message."""
    make_certificates(tmp_path, ["localhost"])
    options = [
        ("grpc.ssl_target_name_override", "prefill.baton.internal"),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    certificate = grpc.ssl_channel_credentials(
        (tmp_path / "ca.pem").read_bytes(),
        (tmp_path / "router.key").read_bytes(),
        (tmp_path / "router.pem").read_bytes(),
    )
    ends = collections.Counter()

    async def request_pair(address):
        async with grpc.aio.secure_channel(address, certificate, options=options) as channel:
            call = channel.stream_stream("/baton.internal.v1.KVTransfer/Fetch")(timeout=20)
            with contextlib.suppress(
                grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError
            ):
                await call.write(b"a first message")
                await call.read()
            ends[await call.code(), await call.details()] += 1

    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LISTEN, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    try:
        address = (await child.stdout.readline()).decode().strip()
        for _ in range(20):
            await asyncio.gather(*(request_pair(address) for _ in range(8)))
    finally:
        child.kill()
        await child.wait()
    assert ends == {(grpc.StatusCode.PERMISSION_DENIED, "this role may not open this stream"): 160}


def test_the_inside_does_not_start_with_files_that_do_not_fit(tmp_path):
    make_certificates(tmp_path, ["localhost"])
    security = SecurityConfig(tls_dir=str(tmp_path))
    (tmp_path / "decode.key").write_bytes((tmp_path / "prefill.key").read_bytes())
    assert fetch_tls(security, "prefill") is not None
    with pytest.raises(ConfigError, match="role decode that cannot be used"):
        fetch_tls(security, "decode")
    (tmp_path / "decode.key").unlink()
    with pytest.raises(ConfigError, match="lacks a file of role decode"):
        fetch_tls(security, "decode")
