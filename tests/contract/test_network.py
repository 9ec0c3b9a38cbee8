"""The `Network` and `MessageStream` ports: order, a good end, a cut that both ends see, nobody."""

import asyncio
import random

import pytest
from support.in_process_network import InProcessNetwork

from core.ports import StreamClosed
from examples.own_transport import TcpNetwork
from simulation.loop import run_virtual
from simulation.network import Hub, SimNetwork
from transport.fetch_streams import fetch_network


def grpc_pair():
    return fetch_network(), fetch_network()


def in_process_pair():
    directory = {}
    return InProcessNetwork(directory), InProcessNetwork(directory)


def simulated_pair():
    hub = Hub(random.Random(1), (0.001, 0.002))
    return SimNetwork(hub, "a", "fetch"), SimNetwork(hub, "b", "fetch")


ADAPTERS = {
    "grpc": (grpc_pair, asyncio.run),
    "the example's": (lambda: (TcpNetwork(), TcpNetwork()), asyncio.run),
    "in one process": (in_process_pair, asyncio.run),
    "simulated": (simulated_pair, run_virtual),
}


def with_pair(name, check):
    """Run a check on a listening and a dialling end."""
    make, run = ADAPTERS[name]

    async def main():
        server, client = make()
        accepted = asyncio.Queue()
        over = asyncio.Event()

        async def serve(stream):
            await accepted.put(stream)
            await over.wait()

        address = await server.listen(serve)

        async def dial():
            return await client.dial(address), await asyncio.wait_for(accepted.get(), 5)

        try:
            async with asyncio.timeout(30):
                await check(dial)
        finally:
            over.set()
            await asyncio.sleep(0)
            await server.close()
        try:
            with pytest.raises(StreamClosed):
                await asyncio.wait_for(client.dial(address), 5)
        finally:
            await client.close()

    run(main())


async def is_over(stream):
    with pytest.raises(StreamClosed):
        await asyncio.wait_for(stream.recv(), 5)
    return True


@pytest.mark.parametrize("name", ADAPTERS)
def test_messages_arrive_in_order_both_ways(name):
    async def check(dial):
        up, down = await dial()
        for n in range(20):
            await up.send(bytes([n]) * (n * 1000 + 1))
            await down.send(bytes([n + 100]))
        assert [len(await down.recv()) for _ in range(20)] == [n * 1000 + 1 for n in range(20)]
        assert [bytes(await up.recv()) for _ in range(20)] == [bytes([n + 100]) for n in range(20)]

    with_pair(name, check)


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_was_sent_before_a_good_end_still_arrives(name):
    async def check(dial):
        up, down = await dial()
        await up.send(b"last")
        await up.close()
        assert bytes(await down.recv()) == b"last"
        assert await is_over(down)

    with_pair(name, check)


def test_a_stream_that_ended_with_bytes_under_way_can_be_reset():
    async def check(dial):
        up, down = await dial()
        sending = asyncio.create_task(up.send(bytes(32 << 20)))  # more than the sockets hold
        await asyncio.sleep(0.01)
        await up.close()
        assert len(await down.recv()) == 32 << 20
        assert await is_over(down)
        await sending
        up.reset()

    with_pair("the example's", check)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("cutter", ["who dialled", "who listens"])
def test_a_cut_is_seen_at_the_other_end(name, cutter):
    async def check(dial):
        up, down = await dial()
        (up if cutter == "who dialled" else down).reset()
        assert await is_over(down if cutter == "who dialled" else up)

    with_pair(name, check)


@pytest.mark.parametrize("name", ADAPTERS)
def test_streams_of_one_pair_are_apart(name):
    async def check(dial):
        (up, down), (other_up, other_down) = await dial(), await dial()
        up.reset()
        assert await is_over(down)
        await other_up.send(b"still here")
        assert bytes(await other_down.recv()) == b"still here"

    with_pair(name, check)
