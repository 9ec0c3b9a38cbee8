"""How many routes a receiver probes at once, and a fetch that breaks before it begins."""

from support.peers import (
    OTHER,
    PEER,
    ReceiveCallbacks,
    settle,
)
from support.peers import run as run_agent

from core.errors import KVTransferError
from kv_transfer import receive_agent as agents
from kv_transfer.receiver import FetchOrder


def test_routes_are_probed_in_a_bounded_number_at_once_and_again_when_there_is_room(monkeypatch):
    monkeypatch.setattr(agents, "MAX_PROBES", 3)

    async def scenario(world):
        for number in range(4):
            world.agent.probe_peer(f"nowhere{number}", 0)
        await settle()
        tried = [call[1].address for call in world.host.calls]
        for number in range(4, 7):
            world.agent.probe_peer(f"nowhere{number}", 0)
        await settle()
        return tried, [call[1].address for call in world.host.calls]

    tried, later = run_agent(scenario, ReceiveCallbacks())
    assert tried == ["nowhere0", "nowhere1", "nowhere2"]
    assert later == [*tried, "nowhere4", "nowhere5", "nowhere6"]


def test_a_fetch_that_breaks_before_it_begins_fails_that_transfer(monkeypatch):
    def broken(*_):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(agents, "ReceiveStream", broken)

    async def scenario(world):
        world.agent.fetch(FetchOrder(OTHER, "nowhere", *PEER))
        return world.host.calls

    [(what, transfer_id, error)] = run_agent(scenario, ReceiveCallbacks())
    assert (what, transfer_id) == ("failed", OTHER)
    assert isinstance(error, KVTransferError) and "ValueError" in error.message
