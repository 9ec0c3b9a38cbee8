"""Exceptions put where the product's own code might raise one.

Owns which trap is armed, for whom, and who stepped into one: only that request may suffer. Does not
know schedules, and leaves it to each node to lay the traps (`router_node`, `worker_node`).
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum

from core.ids import TransferId


class Injected(Exception):
    """Not of our error tree: what a library or a mistake raises."""


class Place(StrEnum):
    """Where a trap can lie."""

    DECODER = "decoder"
    EMIT = "emit"
    SUBMIT = "submit"
    CALLBACK = "callback"


class Traps:
    """Armed traps by place and by whom they wait for: a request, or a node."""

    def __init__(self) -> None:
        """Nothing is armed."""
        self._armed: dict[tuple[Place, str], int] = {}
        self.sprung: Counter[Place] = Counter()
        self.asking: dict[str, dict[TransferId, None]] = {}
        """By decode worker: hand-overs for which a reservation was asked."""
        self.victims: set[str] = set()
        """Requests, by the client's name."""

    def arm(self, place: Place, whom: str, after: int = 0) -> None:
        """Raise once at a place, after it was passed `after` times."""
        self._armed[place, whom] = after

    def disarm(self, place: Place, whom: str) -> bool:
        """Take an armed trap away; False: it has sprung."""
        return self._armed.pop((place, whom), None) is not None

    def step(self, place: Place, whom: str, request_id: str) -> None:
        """Pass a place.

        Raises:
            Injected: A trap was armed here.
        """
        left = self._armed.get((place, whom))
        if left is None:
            return
        if left:
            self._armed[place, whom] = left - 1
            return
        # Once: the attempt that follows must succeed.
        del self._armed[place, whom]
        self.sprung[place] += 1
        # A run id is the client's request id and a number of the run.
        self.victims.add(request_id.partition("~")[0])
        raise Injected(f"injected: {place}")
