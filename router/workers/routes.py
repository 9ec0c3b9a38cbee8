"""The routes by which KV reaches one worker: introduced, reported, measured.

Owns the senders that the worker has to know, and what it found of each. Does not know streams.
"""

from __future__ import annotations

import asyncio

from core.session import ConnectPeers, RouteReport
from router.workers.outbox import Outbox

MEASURE_S = 15.0


class KVRoutes:
    """Routes to one worker, by the sender's transfer address."""

    def __init__(self, outbox: Outbox) -> None:
        """Start without peers; `outbox` takes the messages to the worker."""
        self.reports: dict[str, RouteReport] = {}
        self._outbox = outbox
        self._introduced: dict[str, None] = {}
        self._measured: dict[str, asyncio.Future[RouteReport]] = {}

    def introduce(self, address: str) -> None:
        """Let the worker connect to a peer that may send KV to it."""
        self._introduced[address] = None
        self._outbox.connect(address)

    def forget(self, address: str) -> None:
        """Drop a peer that is gone for good."""
        self._introduced.pop(address, None)
        self._outbox.withdraw(address)
        self.reports.pop(address, None)

    def reconnected(self) -> None:
        """Introduce again what was not reported: the message may be lost with its stream."""
        for address in self._introduced:
            # The worker keeps its routes while a router's session breaks: what is reported stands.
            if address in self.reports:
                self._outbox.withdraw(address)
            else:
                self._outbox.connect(address)

    def note(self, routes: tuple[RouteReport, ...]) -> None:
        """Keep what the worker reports, and answer those who measure."""
        for route in routes:
            has_news = bool(route.gb_per_s or route.error)
            # A connection made anew says less than a measurement made before.
            is_better = has_news or route.address not in self.reports
            if route.address in self._introduced and is_better:
                self.reports[route.address] = route
            found = self._measured.get(route.address)
            if found is not None and not found.done() and has_news:
                found.set_result(route)

    async def measure(self, address: str, probe_bytes: int) -> RouteReport:
        """Let the worker measure the route from a peer; one at a time.

        Raises:
            TimeoutError: The worker did not answer.
        """
        found: asyncio.Future[RouteReport] = asyncio.get_running_loop().create_future()
        self._measured[address] = found
        self._outbox.push(ConnectPeers((address,), probe_bytes))
        try:
            async with asyncio.timeout(MEASURE_S):
                return await found
        finally:
            del self._measured[address]
