"""How long leases and the ids of transfers that have ended are kept."""

import asyncio

import pytest
from support.peers import (
    TRANSFER,
    SendCallbacks,
    offer_of,
    opened,
    settle,
)
from support.peers import run as run_agent

from kv_transfer import frames
from kv_transfer.send_agent import TOMBSTONE_S

# --- an agent's -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("at_s", "is_held"), [(2.2, True), (2.7, False)])
def test_a_lease_ends_with_the_first_look_after_it_is_over(at_s, is_held):
    """Looks are half a second apart; the one at exactly two seconds is not after it."""

    async def scenario(world):
        world.agent.offer(offer_of(world))
        await settle(at_s)
        held = world.agent.num_live
        world.agent.end_send(TRANSFER, None)
        return held

    assert run_agent(scenario, SendCallbacks(), lease_s=2.0) == int(is_held)


@pytest.mark.parametrize(("after_s", "waited_s"), [(-0.1, 0.0), (0.1, 1.0)])
def test_a_transfer_that_has_ended_is_remembered_for_a_while(after_s, waited_s):
    async def scenario(world):
        world.agent.offer(offer_of(world))
        world.agent.end_send(TRANSFER, None)
        await settle(TOMBSTONE_S + after_s)
        began_at = asyncio.get_running_loop().time()
        talk = await opened(world)
        assert await talk.hear() == frames.NotFound()
        return asyncio.get_running_loop().time() - began_at

    assert run_agent(scenario, SendCallbacks(), park_s=1.0) == pytest.approx(waited_s)
