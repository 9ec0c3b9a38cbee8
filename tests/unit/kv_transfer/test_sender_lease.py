"""How long a sender keeps blocks: what renews its lease, and what ends it."""

from support.peers import (
    OTHER,
    TRANSFER,
    SendCallbacks,
    lost,
    offer_of,
    partnered,
    run,
    settle,
)

from core.errors import LeaseExpired
from kv_transfer.sender import Sender


def test_a_peer_that_is_silent_though_the_lease_is_renewed_is_given_up_with_the_time():
    async def scenario(world):
        await partnered(world)
        for _ in range(4):
            world.agent.renew([TRANSFER])
            await settle(0.6)

    error = lost(scenario, lease_s=2.0)
    assert error.message == "the decode worker's fetch stream was silent for 2 s"


# --- leases --------------------------------------------------------------------------------------


def test_the_owning_routers_traffic_renews_the_lease_and_its_silence_ends_it():
    async def scenario(world):
        world.agent.offer(offer_of(world))
        for _ in range(8):
            await settle(1.5)
            world.agent.renew([TRANSFER])
        held = world.host.names()
        await settle(3)
        return held, world.host.names()

    host = SendCallbacks()
    held, after = run(scenario, host, lease_s=2.0)
    assert held == [] and after == ["lost", "drained"]
    assert isinstance(host.error("lost"), LeaseExpired)


def test_a_lease_begins_with_its_offer_however_long_the_agent_has_run():
    async def scenario(world):
        await settle(100)
        world.agent.offer(offer_of(world))
        await settle(1.9)
        held = world.host.names()
        await settle(1)
        return held

    host = SendCallbacks()
    assert run(scenario, host, lease_s=2.0) == []
    assert host.names() == ["lost", "drained"]


def test_a_lease_whose_end_breaks_keeps_no_other_from_ending(monkeypatch, caplog):
    expire = Sender.expire

    def breaks(self):
        if self.offer.transfer_id == TRANSFER:
            raise ValueError("a bug")
        expire(self)

    monkeypatch.setattr(Sender, "expire", breaks)

    async def scenario(world):
        for name in (TRANSFER, OTHER):
            world.agent.offer(offer_of(world, name))
        await settle(4)
        return world.agent.num_live

    host = SendCallbacks()
    assert run(scenario, host, lease_s=2.0) == 0
    assert "ValueError: a bug" in caplog.text
    assert host.names() == host.names(OTHER) == ["lost", "drained"]


def test_a_watch_that_ends_by_a_bug_is_reported():
    """Without it no lease would ever end, and nobody would notice."""

    async def scenario(world):
        world.agent._tombstones = None
        await settle(1)
        world.agent._tombstones = {}
        return world.broken

    [error] = run(scenario, SendCallbacks())
    assert isinstance(error, AttributeError)
