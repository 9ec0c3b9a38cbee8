"""Places for Opens that came before their Submit, and what is left of who had one."""

import asyncio

from support.peers import OTHER, TRANSFER, settle

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


def test_whoever_waits_goes_on_with_the_offer_and_nobody_else_does():
    async def main():
        lot, loop = ParkingLot(), asyncio.get_running_loop()

        async def waited_s(transfer_id):
            began_at = loop.time()
            await lot.wait(transfer_id, WorkerId("peer"), 1.0)
            return loop.time() - began_at

        waits = [asyncio.ensure_future(waited_s(t)) for t in (TRANSFER, TRANSFER, OTHER)]
        await settle(0.25)
        lot.offered(TRANSFER)
        return await asyncio.gather(*waits)

    assert run_virtual(main()) == [0.25, 0.25, 1.0]
