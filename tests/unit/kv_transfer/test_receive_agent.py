"""How many routes a receiver probes at once."""

from support.peers import (
    ReceiveCallbacks,
    settle,
)
from support.peers import run as run_agent

from kv_transfer import receive_agent as agents


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
