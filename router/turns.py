"""In which turn of the event loop a stream's consumer is woken: some in each, in order.

Owns who waits for a later turn. Does not know streams or what their consumers do.

A consumer takes all its events at once and sends them in one write. While the router keeps up, that
is each token as it comes. When tokens come faster than they can be written, every consumer still
gets its turn, and finds more of them there: a write costs nearly the same whatever it carries.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

MAX_WOKEN = 32
"""Consumers of one turn. What workers send is read between turns, so that it comes together."""


class Turns:
    """Wakes the consumers of one event loop, first come, first served."""

    def __init__(self) -> None:
        """Start with nobody waiting."""
        self._waiting: OrderedDict[asyncio.Event, None] = OrderedDict()
        self._num_woken = 0
        self._is_ending = False

    @property
    def is_behind(self) -> bool:
        """True while a consumer waits for a later turn."""
        return bool(self._waiting)

    def wake(self, consumer: asyncio.Event) -> None:
        """Set `consumer`, now or in a later turn; one that waits keeps its place."""
        if consumer.is_set():
            return
        if self._num_woken < MAX_WOKEN:
            self._num_woken += 1
            consumer.set()
        else:
            self._waiting[consumer] = None
        if not self._is_ending:
            self._is_ending = True
            asyncio.get_running_loop().call_soon(self._end_turn)

    def _end_turn(self) -> None:
        """Wake the next consumers; the turns end when nobody waits."""
        self._num_woken = min(MAX_WOKEN, len(self._waiting))
        for _ in range(self._num_woken):
            self._waiting.popitem(last=False)[0].set()
        self._is_ending = self._num_woken > 0
        if self._is_ending:
            asyncio.get_running_loop().call_soon(self._end_turn)
