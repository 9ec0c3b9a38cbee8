"""Whom a transfer agent serves: streams that peers open, at once, too early, twice or in vain."""

import asyncio
import threading

import pytest
from support.peers import (
    FIRST,
    LAYOUT,
    NUM_TOKENS,
    OTHER,
    PEER,
    TRANSFER,
    ReceiveCallbacks,
    SendCallbacks,
    Talk,
    blocks_of,
    finished,
    offer_of,
    opened,
    partnered,
    run,
    settle,
)

from core.ids import Incarnation, TransferId, WorkerId
from core.ports import StreamClosed
from kv_transfer import frames
from kv_transfer.agent_thread import AgentThread
from kv_transfer.parking import MAX_PARKED, MAX_PARKED_PER_PEER


def test_a_second_open_is_turned_away_and_the_first_goes_on():
    async def scenario(world):
        talk = await partnered(world)
        second = await opened(world)
        answer = await second.hear()
        assert world.host.names() == ["reserved"]
        for layer in range(2):
            world.agent.publish(TRANSFER, 0, blocks_of(layer))
        world.agent.commit(TRANSFER, 0, FIRST, frozenset())
        await talk.hear()
        assert isinstance(await talk.hear(), frames.Commit)
        await finished(world, talk)
        assert world.agent.num_unknown == 1
        return answer

    host = SendCallbacks()
    answer = run(scenario, host)
    assert answer.kind == "KVTransferError" and "has a stream already" in answer.message
    assert host.names()[:2] == ["reserved", "sent"]


def test_a_stream_whose_beginning_is_missing_is_cut_and_a_whole_one_is_served():
    async def scenario(world):
        world.agent.offer(offer_of(world))
        world.agent.start(TRANSFER, NUM_TOKENS)
        late = Talk(await world.network.dial(world.address))
        late.number = 1
        await late.say(frames.Open(TRANSFER, *PEER, LAYOUT.identity, *LAYOUT.shape))
        with pytest.raises(StreamClosed):
            await late.hear()
        assert world.host.calls == []
        talk = await opened(world)
        answer = await talk.hear()
        world.agent.end_send(TRANSFER, None)
        return type(answer)

    assert run(scenario, SendCallbacks()) == frames.Starting


def test_an_open_after_the_end_is_turned_away_at_once():
    """It must not wait in the lot for a Submit that has long been served."""

    async def scenario(world):
        world.agent.offer(offer_of(world))
        world.agent.end_send(TRANSFER, None)
        began_at = asyncio.get_running_loop().time()
        talk = await opened(world)
        answer = await talk.hear()
        return answer, asyncio.get_running_loop().time() - began_at

    assert run(scenario, SendCallbacks(), park_s=1.0) == (frames.NotFound(), 0.0)


def test_an_open_that_is_cut_while_it_waits_gives_its_place_back():
    async def scenario(world):
        for _ in range(MAX_PARKED_PER_PEER):
            await opened(world, OTHER)
        await settle()
        waiting = world.agent.num_live
        for task in list(world.network._tasks):
            task.cancel()
        await settle()
        left = world.agent.num_live
        talk = await opened(world)
        world.agent.offer(offer_of(world))
        world.agent.start(TRANSFER, NUM_TOKENS)
        answer = await talk.hear()
        world.agent.end_send(TRANSFER, None)
        return waiting, left, type(answer)

    assert run(scenario, SendCallbacks()) == (MAX_PARKED_PER_PEER, 0, frames.Starting)


def test_a_peer_that_opens_what_nobody_submitted_takes_no_place_of_others():
    async def scenario(world):
        stranger = (WorkerId("stranger"), Incarnation(1))
        names = [TransferId(n.to_bytes(16, "big")) for n in range(MAX_PARKED_PER_PEER + 20)]
        talks = [await opened(world, name, stranger) for name in names]
        await settle()
        waiting = world.agent.num_live
        turned_away = await talks[-1].hear()
        honest = await opened(world)
        await settle()
        world.agent.offer(offer_of(world))
        world.agent.start(TRANSFER, NUM_TOKENS)
        answer = await honest.hear()
        world.agent.end_send(TRANSFER, None)
        return waiting, turned_away, type(answer)

    counted = run(scenario, SendCallbacks())
    assert counted == (MAX_PARKED_PER_PEER, frames.NotFound(), frames.Starting)


def test_places_are_bounded_in_all():
    async def scenario(world):
        for n in range(MAX_PARKED + 20):
            name = TransferId(n.to_bytes(16, "big"))
            await opened(world, name, (WorkerId(f"w{n}"), Incarnation(1)))
        await settle()
        waiting = world.agent.num_live
        await settle(2)
        return waiting, world.agent.num_live

    assert run(scenario, SendCallbacks(), park_s=1.0) == (MAX_PARKED, 0)


def test_no_kv_leaves_a_decode_worker_and_whoever_asks_hears_so_at_once():
    async def scenario(world):
        talk = await opened(world)
        async with asyncio.timeout(0.1):
            return await talk.hear(), world.agent.num_unknown, world.agent.num_live

    assert run(scenario, ReceiveCallbacks()) == (frames.NotFound(), 1, 0)


async def test_an_agents_loop_runs_in_a_thread_of_its_own_until_it_is_stopped():
    async def where():
        return threading.current_thread().name

    thread = AgentThread()
    try:
        async with asyncio.timeout(30):
            assert await thread.call(where()) == "transfer-agent"
    finally:
        thread.stop()
    assert thread.loop.is_closed()
    assert "transfer-agent" not in {one.name for one in threading.enumerate()}
