"""How long this process has been awake: time in which it was stopped or starved does not count.

Owns the count. One that slept has not listened, so it must not take others for silent when it
wakes, whichever of its tasks runs first. Does not know who is listened to.
"""

from __future__ import annotations

from core.ports import Clock

TICK_S = 0.5
"""Longest pause between two ticks of a process that is well."""
MAX_COUNTED_S = 2 * TICK_S
"""Of a longer pause only so much was spent awake."""


class AwakeClock:
    """A `Clock` that stands still while the process does."""

    def __init__(self, clock: Clock) -> None:
        """Begin at 0; it goes on as long as somebody ticks it."""
        self._clock = clock
        self._ticked_at = clock.now_s()
        self._awake_s = 0.0

    def now_s(self) -> float:
        """Return the seconds awake so far."""
        # A longer pause was spent stopped, or in one turn of the loop that let nobody listen.
        return self._awake_s + min(self._clock.now_s() - self._ticked_at, MAX_COUNTED_S)

    def tick(self) -> None:
        """Count what has passed since the last tick; any number of tasks may do so."""
        self._awake_s = self.now_s()
        self._ticked_at = self._clock.now_s()
