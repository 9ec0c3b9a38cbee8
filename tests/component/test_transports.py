"""The transports of KV behind their seam: what each must do, and which one a pair takes."""

import asyncio
import gc
import os
import sys

import pytest
from support.fault_proxy import FaultProxy
from support.in_process_cluster import NIXL, shared_pool
from support.in_process_network import InProcessNetwork

from core.kv_layout import KVLayout
from core.ports import MappedStream, StreamClosed
from examples.own_transport import TcpNetwork
from kv_transfer.frames import MAX_MESSAGE_BYTES
from kv_transfer.sidecar.network import SidecarNetwork
from kv_transfer.transports import shared_memory as shared_network
from kv_transfer.transports.choice import Transports, read_address
from kv_transfer.transports.shared_memory import SharedNetwork
from transport.fetch_streams import fetch_network

pytestmark = pytest.mark.sampled(2)

LAYOUT = KVLayout("m", "float32", 2, 2, 4, 4)


class Pair:
    """A listening and a dialling end of one transport."""

    def __init__(self, name):
        self.pools = []
        directory = {}
        make = {
            "grpc": fetch_network,
            "inproc": lambda: InProcessNetwork(directory),
            "shm": self._shared,
            "gloo": lambda: SidecarNetwork("gloo", "127.0.0.1", 10_000),
            "nixl": lambda: SidecarNetwork("nixl", "127.0.0.1", 10_000),
            "example": TcpNetwork,
        }
        self.server, self.client = make[name](), make[name]()
        self.accepted = asyncio.Queue()

    def _shared(self):
        kv = shared_pool(LAYOUT, 8)
        self.pools.append(kv)
        return SharedNetwork(kv.shared)

    async def __aenter__(self):
        self.over = asyncio.Event()

        async def serve(stream):
            await self.accepted.put(stream)
            await self.over.wait()

        self.address = await self.server.listen(serve)
        if isinstance(self.client, SidecarNetwork):
            await self.client.listen(serve)
        return self

    async def dial(self):
        stream = await self.client.dial(self.address)
        return stream, await asyncio.wait_for(self.accepted.get(), 5)

    async def __aexit__(self, *_):
        self.over.set()
        await asyncio.sleep(0)
        await self.client.close()
        await self.server.close()
        for kv in self.pools:
            kv.close()


@pytest.mark.parametrize("name", ["inproc", "grpc", "shm", "gloo", NIXL, "example"])
async def test_every_transport_keeps_the_contract_of_a_stream(name):
    """Order both ways, a good end after which nothing is lost,
    a cut that both ends see, nobody there."""
    async with Pair(name) as pair:
        up, down = await pair.dial()
        for n in range(20):
            await up.send(bytes([n]) * (n * 1000 + 1))
            await down.send(bytes([n + 100]))
        assert [len(await down.recv()) for _ in range(20)] == [n * 1000 + 1 for n in range(20)]
        assert [bytes(await up.recv()) for _ in range(20)] == [bytes([n + 100]) for n in range(20)]
        await up.send(b"last")
        await up.close()
        assert await down.recv() == b"last"
        with pytest.raises(StreamClosed):
            await asyncio.wait_for(down.recv(), 5)
        up, down = await pair.dial()
        up.reset()
        with pytest.raises(StreamClosed):
            await asyncio.wait_for(down.recv(), 5)
        # The accepting end cuts; garbage collection must not be what tells the other.
        up, down = await pair.dial()
        gc.disable()
        try:
            down.reset()
            with pytest.raises(StreamClosed):
                await asyncio.wait_for(up.recv(), 5)
        finally:
            gc.enable()
        address = pair.address
    with pytest.raises(StreamClosed):
        await asyncio.wait_for(pair.client.dial(address), 5)


async def test_shared_memory_is_mapped_once_and_again_when_the_pool_changes():
    async with Pair("shm") as pair:
        kv = pair.pools[0]
        kv.segments()[0][:5] = b"first"
        streams = [await pair.dial() for _ in range(3)]
        assert all(isinstance(up, MappedStream) for up, _ in streams)
        first = streams[0][0].peer_segments
        assert bytes(first[0][:5]) == b"first" and all(
            up.peer_segments is first for up, _ in streams
        )
        assert first[0].readonly, "a receiver must not be able to write into the sender's pool"
        fds = len(os.listdir("/proc/self/fd"))
        other = shared_pool(LAYOUT, 8)
        pair.pools.append(other)
        pair.server._pool = other.shared
        other.segments()[0][:5] = b"other"
        up, _ = await pair.dial()
        assert up.peer_segments is not first and bytes(up.peer_segments[0][:5]) == b"other"
        for up, down in streams:
            up.reset()
            down.reset()
        assert len(os.listdir("/proc/self/fd")) < fds + 6


async def test_a_mapping_that_is_not_used_is_let_go(monkeypatch):
    """It would keep the memory of a worker that is long dead."""
    monkeypatch.setattr(shared_network, "UNUSED_S", 0.2)
    async with Pair("shm") as pair:
        up, down = await pair.dial()
        assert len(pair.client._mapped) == 1
        up.reset()
        down.reset()
        await asyncio.sleep(0.7)
        assert pair.client._mapped == {} and pair.client._purge is None
        up, _ = await pair.dial()
        assert bytes(up.peer_segments[0][:1]) == b"\0"


async def test_without_a_pool_nobody_is_let_in():
    async with Pair("shm") as pair:
        pair.server._pool = lambda: None
        with pytest.raises(StreamClosed):
            await asyncio.wait_for(pair.client.dial(pair.address), 5)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
async def test_another_user_is_not_let_in_and_not_believed():
    async with Pair("shm") as pair:
        script = (
            "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
            "s.connect(sys.argv[1].replace('@', chr(0))); s.sendall(bytes(16)); "
            "print(len(s.recv(100)))"
        )
        guest = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            script,
            pair.address,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await guest.communicate()
        assert out.strip() in (b"", b"0") and (guest.returncode == 0 or b"Error: [Errno" in err), (
            out,
            err,
        )
        host = (
            "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
            "s.bind(chr(0) + 'baton-kv-impostor'); s.listen(1); print('up', flush=True); "
            "s.accept(); sys.stdin.read()"
        )
        impostor = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            host,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        await impostor.stdout.readline()
        with pytest.raises(StreamClosed, match="exchanges no KV with user 65534"):
            await asyncio.wait_for(pair.client.dial("@baton-kv-impostor"), 5)
        impostor.kill()
        await impostor.wait()


@pytest.mark.parametrize(
    "garbage", [b"", b"short", b"\xff" * 16 + b"\xff\xff\xff\xff" + b"x" * 100]
)
async def test_whoever_talks_nonsense_to_the_shared_socket_harms_nobody(garbage):
    async with Pair("shm") as pair:
        reader, writer = await asyncio.open_unix_connection(pair.address.replace("@", "\0"))
        writer.write(garbage)
        if garbage:
            await writer.drain()
        writer.write_eof()
        if len(garbage) > 16:
            stream = await asyncio.wait_for(pair.accepted.get(), 5)
            with pytest.raises(StreamClosed):
                await asyncio.wait_for(stream.recv(), 5)
        writer.close()
        up, down = await pair.dial()
        await up.send(b"well")
        assert await down.recv() == b"well"


async def two_routes():
    """A listening worker with both transports, and one that dials."""
    kv = shared_pool(LAYOUT, 8)
    server = Transports({"shm": SharedNetwork(kv.shared), "grpc": fetch_network()})
    client = Transports({"shm": SharedNetwork(lambda: None), "grpc": fetch_network()})

    async def echo(stream):
        try:
            while True:
                await stream.send(await stream.recv())
        except StreamClosed:
            pass

    return kv, server, client, await server.listen(echo)


async def test_a_pair_takes_the_first_way_that_answers_and_comes_back_to_the_better_one():
    kv, server, client, address = await two_routes()
    loop = asyncio.get_running_loop()
    try:
        assert list(read_address(address)) == ["shm", "grpc"]
        assert isinstance(await client.dial(address), MappedStream)
        shm = client._networks["shm"]
        client._networks["shm"] = SharedNetwork(lambda: None)
        client._networks["shm"].dial = lambda where: shm.dial(where + "-gone")
        began = loop.time()
        stream = await client.dial(address)
        assert not isinstance(stream, MappedStream) and loop.time() - began < 1
        await stream.send(b"over")
        assert await stream.recv() == b"over"
        client._networks["shm"] = shm
        # It rests for a while, then it is tried again.
        assert not isinstance(await client.dial(address), MappedStream)
        client._resting_until = {key: loop.time() for key in client._resting_until}
        assert isinstance(await client.dial(address), MappedStream)
        assert client.num_dialled == {"shm": 2, "grpc": 2} and client.num_fallen_back == 1
    finally:
        await client.close()
        await server.close()
        kv.close()


async def test_a_pair_without_a_common_or_a_living_way_is_told_why():
    only = Transports({"shm": SharedNetwork(lambda: None)})
    with pytest.raises(
        StreamClosed, match=r"no transport in common: \['shm'\] here, \['grpc'\] there"
    ):
        await only.dial("grpc=127.0.0.1:1")
    with pytest.raises(StreamClosed, match="shm: no shared memory with @nowhere"):
        await only.dial("shm=@nowhere")
    await only.close()


async def test_a_cut_link_ends_the_stream():
    network = fetch_network()

    async def quiet(stream):
        await asyncio.sleep(60)

    proxy = FaultProxy(await network.listen(quiet), seed=1)
    client = Transports({"grpc": fetch_network()})
    try:
        stream = await client.dial(f"grpc={await proxy.start()}")
        await proxy.stop()
        with pytest.raises(StreamClosed):
            await asyncio.wait_for(stream.recv(), 5)
    finally:
        await client.close()
        await network.close()


async def test_loopback_of_another_host_is_not_dialled():
    """Two hosts' loopback addresses look alike;
    the number behind ours may be somebody else's there."""
    async with Pair("gloo") as pair:
        where, _, here = pair.address.partition("/")
        assert where.startswith("127.") and here
        with pytest.raises(StreamClosed, match="another host"):
            await pair.client.dial(f"{where}/{'0' * len(here)}")


async def test_a_carrier_takes_messages_longer_than_a_slot_and_forgets_ended_streams():
    async with Pair("gloo") as pair:
        message = os.urandom(100_001)
        for _ in range(3):
            up, down = await pair.dial()
            await up.send(message)
            assert bytes(await down.recv()) == message
            await down.send(message[::-1])
            assert bytes(await up.recv()) == message[::-1]
            up.reset()
            with pytest.raises(StreamClosed):
                await asyncio.wait_for(down.recv(), 5)
            with pytest.raises(StreamClosed):
                await down.send(b"late")
        for network in (pair.client, pair.server):
            [link] = network.client._connections.values()
            assert link.streams == {}


async def test_a_reader_that_does_not_read_keeps_nobody_elses_slots():
    """Its messages are copied out; another stream of the same link goes on."""
    async with Pair("gloo") as pair:
        lazy_up, _ = await pair.dial()
        for _ in range(50):
            await lazy_up.send(bytes(9000))
        up, down = await pair.dial()
        await up.send(b"hello")
        assert bytes(await asyncio.wait_for(down.recv(), 5)) == b"hello"


async def test_a_peer_that_is_gone_is_refused_within_a_second():
    async with Pair("gloo") as pair:
        up, _ = await pair.dial()
        await pair.server.close()
        with pytest.raises(StreamClosed):
            await asyncio.wait_for(up.recv(), 5)
        with pytest.raises(StreamClosed):
            await asyncio.wait_for(pair.client.dial(pair.address), 3)


@pytest.mark.parametrize("name", ["inproc", "grpc", "shm", "gloo"])
async def test_every_transport_carries_the_longest_message(name):
    async with Pair(name) as pair:
        up, down = await pair.dial()
        longest = bytes(MAX_MESSAGE_BYTES - 1) + b"x"
        sending = asyncio.create_task(up.send(longest))
        message = await asyncio.wait_for(down.recv(), 30)
        await sending
        assert len(message) == MAX_MESSAGE_BYTES and bytes(message[-1:]) == b"x"


async def test_both_ends_know_which_pool_is_mapped():
    async with Pair("shm") as pair:
        up, down = await pair.dial()
        assert up.pool_name == down.pool_name == pair.pools[0].shared().name
