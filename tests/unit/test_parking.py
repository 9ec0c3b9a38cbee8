"""Places for Opens that came before their Submit, and what is left of who had one."""

import asyncio

from support.peers import TRANSFER, settle

from core.ids import WorkerId
from kv_transfer.parking import ParkingLot
from simulation.loop import run_virtual


def test_nothing_is_kept_of_a_peer_whose_opens_have_left_their_places():
    """Peers name themselves: a name kept of each would be memory without a bound."""

    async def main():
        lot = ParkingLot()
        peers = [WorkerId(f"peer{i}") for i in range(3)]
        waits = [asyncio.ensure_future(lot.wait(TRANSFER, p, 1.0)) for p in [*peers, peers[0]]]
        await settle()
        assert len(lot) == 4
        waits[0].cancel()
        await settle()
        assert len(lot) == 3 and lot.has_room(peers[0])
        await settle(1.0)
        await asyncio.gather(*waits, return_exceptions=True)
        return len(lot), dict(lot._by_peer), lot._waiting

    assert run_virtual(main()) == (0, {}, {})
