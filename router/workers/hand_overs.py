"""How late KV that one worker sends reaches its receivers, from the hand-overs that were made.

Owns the smoothing, for each route and over all of them, and what is too old to count. Does not know
how a hand-over is timed.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping

from core.ids import WorkerId

NEWEST_SHARE = 0.2
"""Weight of the newest hand-over in a smoothed time."""
KEPT_S = 60.0
"""A route that nobody used for so long counts as not measured. Placement avoids a late one: without
this, one bad moment would count for ever."""


class HandOvers:
    """Exposed times of one sender's hand-overs, smoothed (seconds)."""

    def __init__(self) -> None:
        """Know of none."""
        self.mean_s = 0.0
        """Over all routes; 0 while none is known."""
        self.by_receiver: Mapping[WorkerId, float] = {}
        """Of each route that is known. Another mapping after each change: snapshots keep this."""
        self._used_at: OrderedDict[WorkerId, float] = OrderedDict()

    def note(self, receiver: WorkerId, exposed_s: float, now_s: float) -> None:
        """Take one hand-over into account."""
        # What is no number would stay in the mean for ever.
        if not 0 <= exposed_s < math.inf:
            return
        mean_s = self.mean_s if self.by_receiver else exposed_s
        self.mean_s = mean_s + NEWEST_SHARE * (exposed_s - mean_s)
        known_s = self.by_receiver.get(receiver, exposed_s)
        newer_s = known_s + NEWEST_SHARE * (exposed_s - known_s)
        self.by_receiver = {**self.by_receiver, receiver: newer_s}
        self._used_at[receiver] = now_s
        self._used_at.move_to_end(receiver)

    def forget_old(self, now_s: float) -> bool:
        """Drop routes that nobody used of late; True if there were any."""
        old = []
        for receiver, used_at in self._used_at.items():
            if now_s - used_at < KEPT_S:
                break
            old.append(receiver)
        for receiver in old:
            del self._used_at[receiver]
        if old:
            self.by_receiver = {name: self.by_receiver[name] for name in self._used_at}
            self.mean_s = self.mean_s if self._used_at else 0.0
        return bool(old)
