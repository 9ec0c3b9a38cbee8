"""Every course of a transfer, by the transitions that are noted on it: each once, and no other.

The counters are what operators and the search read, so what is noted is compared whole.
"""

import ast
import asyncio

import pytest
from support.peers import (
    FIRST,
    LAYOUT,
    NUM_TOKENS,
    PEER,
    TRANSFER,
    ReceiveCallbacks,
    SendCallbacks,
    Talk,
    blocks_of,
    fetched,
    finished,
    offer_of,
    opened,
    partnered,
    reserved,
    run,
    settle,
)
from support.tree import ROOT

from core.config import TransferConfig
from core.errors import Cancelled, PoolExhausted
from kv_transfer import codec, frames
from kv_transfer.receiver import FetchOrder


def noted(scenario, host, **transfer):
    """What was noted until the scenario's end, in words."""

    async def main(world):
        await scenario(world)
        await settle()
        return {t.partition("_")[2]: count for t, count in world.agent.transitions.items()}

    return run(main, host, **transfer)


async def whole_send(world):
    talk = await partnered(world)
    for layer in range(2):
        world.agent.publish(TRANSFER, 0, blocks_of(layer))
    world.agent.commit(TRANSFER, 0, FIRST, frozenset())
    await talk.hear()
    await talk.hear()
    await finished(world, talk)


async def sent_again(world):
    talk = await partnered(world)
    world.agent.publish(TRANSFER, 0, blocks_of(0))
    await talk.hear()
    await talk.say(frames.Resend(0, ((0, 0, 1), (0, 0, 2))))
    await talk.hear()
    world.agent.end_send(TRANSFER, None)


async def restarted(world):
    talk = await partnered(world)
    world.agent.restart(TRANSFER, 1)
    await talk.hear()
    world.agent.end_send(TRANSFER, Cancelled("the request ended"))


async def all_final(world):
    talk = await partnered(world)
    world.agent.commit(TRANSFER, 0, FIRST, frozenset(FIRST))
    await talk.hear()


async def refused_by_peer(world):
    world.agent.offer(offer_of(world))
    talk = await opened(world)
    world.agent.start(TRANSFER, NUM_TOKENS)
    await talk.hear()
    await talk.say(frames.Refused("no room"))


async def other_layout(world):
    world.agent.offer(offer_of(world))
    talk = Talk(await world.network.dial(world.address))
    await talk.say(frames.Open(TRANSFER, *PEER, "model=another", *LAYOUT.shape))
    assert (await talk.hear()).kind == "LayoutMismatch"


async def never_submitted(world):
    talk = await opened(world)
    assert await talk.hear() == frames.NotFound()
    assert world.agent.num_unknown == 1


async def submitted_late(world):
    await opened(world)
    await settle()
    world.agent.offer(offer_of(world))
    await settle()
    world.agent.end_send(TRANSFER, None)


async def never_fetched(world):
    world.agent.offer(offer_of(world))
    await settle(TransferConfig().lease_s + 1)


BEGUN = {"offered": 1, "opened": 1, "started": 1}
PARTNERED = BEGUN | {"partnered": 1}


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        (whole_send, PARTNERED | {"sent": 1, "committed": 1, "acked": 1}),
        (sent_again, PARTNERED | {"sent": 2, "resent": 1}),
        (restarted, PARTNERED | {"restarted": 1, "ended": 1}),
        (all_final, PARTNERED | {"finished": 1}),
        (refused_by_peer, BEGUN | {"refused": 1, "lost": 1}),
        (other_layout, {"offered": 1, "incompatible": 1, "lost": 1}),
        (never_submitted, {"parked": 1, "not_found": 1}),
        (submitted_late, {"parked": 1, "offered": 1, "opened": 1}),
        (never_fetched, {"offered": 1, "expired": 1, "ended": 1}),
    ],
)
def test_a_sender_notes_each_of_its_steps_once(scenario, expected):
    assert noted(scenario, SendCallbacks()) == expected


async def whole_fetch(world):
    source = await fetched(world)
    await reserved(world, source)
    for layer in range(2):
        await source.frame(0, source.entries(layer))
    await source.commit(0, FIRST)
    await settle()
    world.agent.ack(TRANSFER)


async def damaged_once(world):
    source = await fetched(world)
    await reserved(world, source)

    def flip(payload):
        payload[0] ^= 1

    await source.frame(0, source.entries(0), flip)
    assert await source.hear() == frames.Resend(0, ((0, 0, 0),))
    await source.frame(0, source.entries(0)[:1])
    await settle()
    world.agent.end_fetch(TRANSFER)
    await settle()
    assert world.agent.num_resent == 1


async def begun_again(world):
    source = await fetched(world)
    await reserved(world, source)
    await source.say(frames.Restart(1))
    await source.say(frames.Finished())


async def no_room(world):
    source = await fetched(world)
    await source.start()
    await settle()
    world.agent.refuse(TRANSFER, PoolExhausted("no 3 free blocks"))
    assert await source.hear() == frames.Refused("no 3 free blocks")


async def unknown_there(world):
    source = await fetched(world)
    await source.say(frames.NotFound())


async def nobody_there(world):
    world.agent.fetch(FetchOrder(TRANSFER, "nowhere", *PEER))


async def not_wanted(world):
    await fetched(world)
    world.agent.end_fetch(TRANSFER)
    world.agent.end_fetch(TRANSFER)


READY = {"fetching": 1, "starting": 1, "reserved": 1}


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        (whole_fetch, READY | {"received": 2, "committed": 1, "arrived": 1, "acked": 1}),
        (damaged_once, READY | {"received": 2, "damaged": 1, "ended": 1}),
        (begun_again, READY | {"restarted": 1, "finished": 1}),
        (no_room, {"fetching": 1, "starting": 1, "refused": 1}),
        (unknown_there, {"fetching": 1, "not_found": 1, "failed": 1}),
        (nobody_there, {"fetching": 1, "unreached": 1, "failed": 1}),
        (not_wanted, {"fetching": 1, "ended": 1}),
    ],
)
def test_a_receiver_notes_each_of_its_steps_once(scenario, expected):
    assert noted(scenario, ReceiveCallbacks()) == expected


@pytest.mark.parametrize("is_sender", [True, False])
def test_an_end_with_nothing_to_say_says_so_twice_a_second(is_sender):
    """Four times between the first half second and the end of the second second."""

    async def scenario(world):
        talk = await (partnered(world) if is_sender else fetched(world))
        heard = []

        async def listen():
            while True:
                heard.append(codec.decode(await talk.stream.recv())[1])

        listening = asyncio.ensure_future(listen())
        await settle(2.2)
        listening.cancel()
        world.agent.end_send(TRANSFER, None) if is_sender else world.agent.end_fetch(TRANSFER)
        await settle()
        return heard

    host = SendCallbacks() if is_sender else ReceiveCallbacks()
    assert run(scenario, host) == [frames.Heartbeat()] * 4


@pytest.mark.parametrize("name", ["sender", "receiver", "frame_builder", "reserved_blocks"])
def test_the_states_of_a_transfer_never_wait(name):
    """What decides is apart from what waits, so that each transition is one call."""
    tree = ast.parse((ROOT / "kv_transfer" / f"{name}.py").read_text())
    waiting = ast.Await | ast.AsyncFunctionDef | ast.AsyncWith | ast.AsyncFor
    assert not [node for node in ast.walk(tree) if isinstance(node, waiting)]
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert not imported & {"asyncio", "threading", "time"}
