"""Wrong keys: how many came from where, and how long the next refusal waits.

Owns a bounded table of addresses. A good key is never looked up here: a client that has one is
never slowed by a neighbour without. Does not know keys, HTTP or gRPC.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from router.calls import network_of

MAX_ADDRESSES = 4096
MAX_HELD = 256
"""Refusals that may wait at one time; further ones are answered immediately."""
FREE_MISTAKES = 10
FORGIVEN_PER_S = 0.2
DELAY_STEP_S = 0.1
MAX_DELAY_S = 2.0


class BadKeys:
    """Mistakes by address: they expire, and many of them slow the refusals down."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._mistakes: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self.num_held = 0

    def delay_s(self, address: str) -> float:
        """Count a mistake; return how long its refusal waits (seconds)."""
        now_s = self._now_s()
        network = network_of(address)
        # Taken out and put back at the end: the address that is silent longest is forgotten first.
        count, at_s = self._mistakes.pop(network, (0.0, now_s))
        count = max(0.0, count - (now_s - at_s) * FORGIVEN_PER_S) + 1
        self._mistakes[network] = count, now_s
        if len(self._mistakes) > MAX_ADDRESSES:
            self._mistakes.popitem(last=False)
        return min(MAX_DELAY_S, max(0.0, count - FREE_MISTAKES) * DELAY_STEP_S)

    async def hold(self, address: str) -> None:
        """Count a mistake, and wait before its refusal unless too many wait already."""
        # Counted even when the refusal is not held back, so that a flood is no way around the
        # delay.
        delay_s = self.delay_s(address)
        if delay_s <= 0 or self.num_held >= MAX_HELD:
            return
        self.num_held += 1
        try:
            await asyncio.sleep(delay_s)
        finally:
            self.num_held -= 1
