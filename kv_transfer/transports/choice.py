"""The transport that a pair of workers takes: the first that both have and that answers.

Owns the list of transports of a worker, the address that names all of them, and the memory of which
did not answer. Does not know how any of them works.

An address is `name=where` for every transport the worker listens on, joined by `;`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping

from core.ports import MessageStream, Network, StreamClosed, StreamHandler

REST_S = 5.0
"""How long a transport that did not answer is left alone before it is tried again.

Each try may cost its dial timeout, for which a first token waits."""


class Transports:
    """The `Network` port over several networks, best first. Make and use it on one loop."""

    def __init__(self, networks: Mapping[str, Network]) -> None:
        """Keep the networks in the order of preference."""
        self._networks = dict(networks)
        self._resting_until: dict[tuple[str, str], float] = {}
        self.num_dialled: Counter[str] = Counter()
        self.num_fallen_back = 0

    async def listen(self, on_stream: StreamHandler) -> str:
        """See `Network`: listens on every transport."""
        offers = [
            f"{name}={await network.listen(on_stream)}" for name, network in self._networks.items()
        ]
        return ";".join(offers)

    async def dial(self, address: str) -> MessageStream:
        """See `Network`."""
        offers = read_address(address)
        reasons = []
        now_s = asyncio.get_running_loop().time()
        # In this worker's order of preference: whoever dials chooses.
        common = [name for name in self._networks if name in offers]
        rested = [
            name for name in common if self._resting_until.get((name, offers[name]), 0.0) <= now_s
        ]
        # If all of them rest, any is better than none.
        for name in rested or common:
            try:
                stream = await self._networks[name].dial(offers[name])
            except StreamClosed as error:
                reasons.append(f"{name}: {error}")
                self._resting_until[name, offers[name]] = now_s + REST_S
                self.num_fallen_back += 1
                continue
            # It answers again: the next dial need not wait for the end of its rest.
            self._resting_until.pop((name, offers[name]), None)
            self.num_dialled[name] += 1
            return stream
        raise StreamClosed(
            "; ".join(reasons)
            or f"no transport in common: {[*self._networks]} here, {[*offers]} there"
        )

    async def close(self) -> None:
        """See `Network`."""
        for network in self._networks.values():
            await network.close()


def read_address(address: str) -> dict[str, str]:
    """Parse an address: where each transport listens, by name."""
    return {
        name: where for name, _, where in (offer.partition("=") for offer in address.split(";"))
    }
