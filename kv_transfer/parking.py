"""Opens that came before their Submit, and wait for it a while.

Owns who waits, for how long, and how many may: in all, and per peer, so that one which opens what
nobody submitted does not use up the places of others. Does not know streams or offers.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from core.ids import TransferId, WorkerId

MAX_PARKED = 4096
MAX_PARKED_PER_PEER = 1024
"""As many as all routers may place on one pair at once while the sender's commands are late."""


class ParkingLot:
    """Places for early Opens."""

    def __init__(self) -> None:
        """Start empty."""
        self._waiting: dict[TransferId, dict[asyncio.Event, None]] = {}
        self._by_peer: Counter[WorkerId] = Counter()

    def __len__(self) -> int:
        """Opens that wait; zero at rest."""
        return self._by_peer.total()

    def has_room(self, peer: WorkerId) -> bool:
        """True if one more of this peer's Opens may wait."""
        return len(self) < MAX_PARKED and self._by_peer[peer] < MAX_PARKED_PER_PEER

    async def wait(self, transfer_id: TransferId, peer: WorkerId, park_s: float) -> None:
        """Wait until the transfer is offered, for at most `park_s`; then free the place again."""
        # An event each, not one a transfer: a peer may open twice, and one of them be cut.
        event = asyncio.Event()
        self._waiting.setdefault(transfer_id, {})[event] = None
        self._by_peer[peer] += 1
        try:
            async with asyncio.timeout(park_s):
                await event.wait()
        except TimeoutError:
            pass  # the caller looks for the offer in any case
        finally:
            # Also when the stream was cut and its task cancelled: a place would be lost for good.
            waiting = self._waiting[transfer_id]
            del waiting[event]
            if not waiting:
                del self._waiting[transfer_id]
            self._by_peer[peer] -= 1
            if not self._by_peer[peer]:
                del self._by_peer[peer]

    def offered(self, transfer_id: TransferId) -> None:
        """Wake whoever waits for a transfer whose Submit has arrived."""
        for event in self._waiting.get(transfer_id, ()):
            event.set()
