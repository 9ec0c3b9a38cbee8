"""What a sender has to send: in which order it leaves, when, and what never does."""

import asyncio

import pytest
from support.peers import (
    FIRST,
    TRANSFER,
    SendCallbacks,
    blocks_of,
    partnered,
    run,
)

from core.errors import Cancelled
from core.ports import StreamClosed
from kv_transfer import frames


@pytest.mark.parametrize("frame_bytes", [1 << 20, 4096])
def test_parts_leave_in_the_order_in_which_they_were_published(frame_bytes, monkeypatch):
    """In one frame or in frames of two parts each; nothing is left out between two of them."""
    if frame_bytes == 4096:
        monkeypatch.setattr(frames, "fragments_per_frame", lambda *_, is_mapped: 2)

    async def scenario(world):
        talk = await partnered(world)
        for layer in (1, 0):
            world.agent.publish(TRANSFER, 0, blocks_of(layer))
        world.agent.commit(TRANSFER, 0, FIRST, frozenset())
        sent = []
        while not isinstance(message := await talk.hear(), frames.Commit):
            sent.append([(e["layer"].item(), e["block"].item()) for e in message.entries])
        world.agent.end_send(TRANSFER, None)
        return sent

    parts = [(layer, block) for layer in (1, 0) for block in range(3)]
    size = 2 if frame_bytes == 4096 else 6
    found = run(scenario, SendCallbacks(), frame_bytes=frame_bytes)
    assert found == [parts[at : at + size] for at in range(0, 6, size)]


@pytest.mark.parametrize("ending", ["restart", "all first tokens final", "end"])
def test_what_waits_to_be_sent_is_forgotten_with_its_sub_attempt(ending):
    """Its blocks are somebody else's by then: not a byte of them may leave."""

    async def scenario(world):
        talk = await partnered(world)
        world.agent.publish(TRANSFER, 0, blocks_of(0))
        if ending == "restart":
            world.agent.restart(TRANSFER, 1)
            world.agent.publish(TRANSFER, 1, blocks_of(1))
            world.agent.commit(TRANSFER, 1, FIRST, frozenset())
        elif ending == "end":
            world.agent.end_send(TRANSFER, Cancelled("the request ended"))
        else:
            world.agent.commit(TRANSFER, 0, FIRST, frozenset(FIRST))
        told = [await talk.hear()]
        if ending == "restart":
            told += [await talk.hear(), await talk.hear()]
            world.agent.end_send(TRANSFER, None)
        with pytest.raises(StreamClosed):
            await talk.hear()
        return told

    told = run(scenario, SendCallbacks())
    kinds = [type(message) for message in told]
    if ending != "restart":
        assert kinds == [frames.Failed if ending == "end" else frames.Finished]
        return
    assert kinds == [frames.Restart, frames.Frame, frames.Commit]
    assert told[1].sub_attempt == 1 and told[1].entries["layer"].tolist() == [1, 1, 1]
    assert told[2].num_entries == 3


@pytest.mark.parametrize(
    ("reason", "waited_s"),
    [("", 0.002), ("full", 0.0), ("commit", 0.0), ("restart", 0.0), ("end", 0.0)],
)
def test_a_frame_waits_for_more_parts_unless_there_is_a_reason_to_send(
    reason, waited_s, monkeypatch
):
    if reason == "full":
        monkeypatch.setattr(frames, "fragments_per_frame", lambda *_, is_mapped: 3)

    async def scenario(world):
        talk = await partnered(world)
        began_at = asyncio.get_running_loop().time()
        world.agent.publish(TRANSFER, 0, blocks_of(0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if reason == "commit":
            world.agent.commit(TRANSFER, 0, FIRST, frozenset())
        elif reason == "restart":
            world.agent.restart(TRANSFER, 1)
        elif reason == "end":
            world.agent.end_send(TRANSFER, Cancelled("the request ended"))
        await talk.hear()
        waited_s = asyncio.get_running_loop().time() - began_at
        world.agent.end_send(TRANSFER, None)
        return waited_s

    assert run(scenario, SendCallbacks()) == pytest.approx(waited_s)
