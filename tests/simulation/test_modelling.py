"""The simulation is as hostile as the world: each of its means, seen at work."""

import asyncio
import contextvars
import random

import pytest

from core.kv_layout import KVLayout
from core.ports import StreamClosed
from core.session import RouterHeartbeat, StepFrame, TokenDelta
from core.types import Logprob
from simulation.hash_runner import MemoryKV
from simulation.loop import NODE, VirtualLoop, run_virtual
from simulation.network import Hub
from simulation.sizes import message_bytes
from simulation.traps import Injected, Place, Traps
from transport.sequenced import Numbered


async def pair(limit=None, kind="session"):
    """Two ends of a stream on a hub with a limit."""
    hub = Hub(random.Random(1), (0.001, 0.001), limit)
    accepted = asyncio.get_running_loop().create_future()

    async def serve(stream):
        accepted.set_result(stream)
        await asyncio.Event().wait()

    client = await hub.dial("a", hub.listen("b", kind, serve))
    return hub, client, await accepted


def test_memory_that_was_replaced_is_another_and_old_views_stay_readable():
    layout = KVLayout("hash", "uint8", 2, 1, 8, 4)
    kv = MemoryKV(layout, 3)
    old, generation = kv.view(1, 2, 0), kv.generation
    old[:] = b"x" * len(old)
    kv.replace()
    assert kv.generation == generation + 1
    assert bytes(kv.view(1, 2, 0)) == bytes(len(old))
    assert bytes(old) == b"x" * len(old)
    kv.view(1, 2, 0)[:1] = b"y"
    assert bytes(kv.segments()[0]).count(b"y") == 1
    assert bytes(old[:1]) == b"x"


def virtual_loop():
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop


def test_timers_that_come_due_during_one_turn_run_in_the_same_one():
    async def num_turns_between(turn_s):
        loop = virtual_loop()
        turn = [0]
        seen = {}
        loop.turn_s = turn_s

        def count():
            turn[0] += 1
            if len(seen) < 2:
                loop.call_soon(count)

        loop.call_later(0.010, count)
        loop.call_later(0.010, lambda: seen.update(first=turn[0]))
        loop.call_later(0.014, lambda: seen.update(second=turn[0]))
        await asyncio.sleep(0.1)
        return seen["second"] - seen["first"]

    assert run_virtual(num_turns_between(0.005)) == 1
    assert run_virtual(num_turns_between(0.001)) == 4


def test_a_failure_that_nobody_asks_for_is_told():
    async def main():
        async def fail():
            raise ValueError("lost")

        loop = virtual_loop()
        unheard, heard = loop.create_task(fail()), loop.create_task(fail())
        await asyncio.sleep(0.1)
        assert isinstance(heard.exception(), ValueError)
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(0.1)
        assert unheard.done()
        return loop.uncaught()

    first, second = run_virtual(main())
    assert first.startswith("Exception in callback")
    assert first.endswith("ZeroDivisionError('division by zero')")
    assert second.endswith("fail: ValueError('lost')")


@pytest.mark.parametrize(("before_s", "is_told"), [(0.0, False), (0.1, True)])
def test_what_fails_in_a_nodes_last_turn_is_forgiven_and_what_failed_before_is_told(
    before_s, is_told
):
    async def main():
        async def fail():
            raise ValueError("lost")

        loop = virtual_loop()
        context = contextvars.copy_context()
        context.run(NODE.set, "a")
        failed = loop.create_task(fail(), context=context)
        while not failed.done():
            await asyncio.sleep(0)
        await asyncio.sleep(before_s)
        loop.kill("a")
        await asyncio.sleep(1)
        return loop.uncaught()

    assert len(run_virtual(main())) == is_told


def test_a_message_over_the_limit_breaks_its_stream_on_both_sides():
    async def main():
        hub, client, server = await pair(limit=10)
        await client.send(b"x" * 10)
        assert await server.recv() == b"x" * 10
        with pytest.raises(StreamClosed, match="RESOURCE_EXHAUSTED"):
            await client.send(b"x" * 11)
        with pytest.raises(StreamClosed):
            await server.recv()
        assert hub.too_large == ["a sent a message of 11 bytes, the limit is 10"]

    run_virtual(main())


def test_the_limit_is_for_sessions_alone():
    async def main():
        hub, client, server = await pair(limit=10, kind="fetch")
        await client.send(b"x" * 11)
        assert await server.recv() == b"x" * 11
        assert hub.too_large == []

    run_virtual(main())


def test_an_exception_put_on_the_wire_is_raised_where_it_is_read():
    async def main():
        hub, client, server = await pair()
        hub.mangle = lambda stream, message: [Injected("reading")]
        await client.send(b"x")
        with pytest.raises(Injected):
            await server.recv()

    run_virtual(main())


def test_sizes_grow_with_scores_and_tokens():
    scores = tuple(Logprob(i, -1.0, tuple((j, -1.0) for j in range(20))) for i in range(100))
    delta = TokenDelta("r", 0, 0, 0, (1, 2, 3), prompt_logprobs=scores)
    small = message_bytes(Numbered(0, RouterHeartbeat()))
    large = message_bytes(Numbered(1, StepFrame(1, (delta,))))
    assert small < 100
    assert 100 * 21 * 12 < large < 100 * 21 * 18


def test_a_trap_springs_once_for_whom_it_waits_and_names_its_victim():
    traps = Traps()
    traps.arm(Place.DECODER, "r1", after=1)
    traps.step(Place.DECODER, "r2", "r2")
    traps.step(Place.DECODER, "r1", "r1~key")
    with pytest.raises(Injected):
        traps.step(Place.DECODER, "r1", "r1~key")
    traps.step(Place.DECODER, "r1", "r1~key")
    assert traps.victims == {"r1"}
    assert traps.sprung == {Place.DECODER: 1}
    traps.arm(Place.SUBMIT, "decode1")
    assert traps.disarm(Place.SUBMIT, "decode1")
    assert not traps.disarm(Place.SUBMIT, "decode1")
