"""A change that many wait for; they wake once a turn of the loop, however often it happens in it.

Owns the event. Does not know what changes.
"""

from __future__ import annotations

import asyncio


class ChangeEvent:
    """Take `next` first, then look at what may change, then wait: so no change is missed."""

    def __init__(self) -> None:
        self._next = asyncio.Event()
        self._is_due = False

    @property
    def next(self) -> asyncio.Event:
        """Set when something changes after now; another one stands here afterwards."""
        return self._next

    def note(self) -> None:
        """Something has changed: who waits is woken when this turn of the loop is over."""
        if not self._is_due:
            self._is_due = True
            # After this turn, so that a burst of changes wakes everybody once.
            asyncio.get_running_loop().call_soon(self._wake)

    def _wake(self) -> None:
        self._is_due = False
        self._next.set()
        self._next = asyncio.Event()
