"""Queues of sequences: in the order in which they are due, and apart by what they wait for.

Owns where each waiting sequence stands, so that a step looks only at those it can move: ten
thousand that wait for a partner or for credit cost it nothing. Does not know blocks or steps.

    ready      wait for blocks, budget or a place in a step; also reservations
    partners   hand-overs, by decode worker: not announced yet, or announced and not answered
    parked     out of credit, woken by more of it
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from core.errors import InvariantViolation
from core.ids import WorkerId
from engine.scheduling.sequence import Handover, Place, Sequence, Status, place_before

MAX_UNANSWERED = 8
"""Hand-overs announced to one decode worker that it has not answered yet."""
MAX_READY = 16
"""Sequences ready to start beyond which no partner is asked to hold blocks for more."""
WALK_BATCH = 64
"""Sequences that a walk looks up at a time."""


def _due(sequence: Sequence) -> Place:
    return sequence.due


class SequenceQueue:
    """Sequences in the order in which they are due; adding and removing take O(log n) compares."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __reversed__(self) -> Iterator[Sequence]:
        return reversed(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        at = bisect_left(self._sequences, sequence.due, key=_due)
        return at < len(self._sequences) and self._sequences[at] is sequence

    @property
    def first(self) -> Sequence | None:
        """Who goes first; None if nobody is here."""
        return self._sequences[0] if self._sequences else None

    def num_before(self, sequence: Sequence) -> int:
        """Count those that are due before a sequence, which may stand elsewhere."""
        return bisect_left(self._sequences, sequence.due, key=_due)

    def walk(self) -> Iterator[Sequence]:
        """Go through the queue while sequences that were come to may leave it.

        Looks at a few at a time, so that a walk that stops early costs nothing for those behind.
        """
        at = 0
        while batch := self._sequences[at : at + WALK_BATCH]:
            yield from batch
            at = bisect_right(self._sequences, batch[-1].due, key=_due)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence where it is due."""
        insort(self._sequences, sequence, key=_due)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out.

        Raises:
            InvariantViolation: It does not stand here.
        """
        if sequence not in self:
            raise InvariantViolation(f"sequence {sequence.key} does not stand in this queue")
        del self._sequences[bisect_left(self._sequences, sequence.due, key=_due)]


@dataclass(slots=True)
class _Partner:
    """The hand-overs to one decode worker that wait for its reservations."""

    unannounced: SequenceQueue = field(default_factory=SequenceQueue)
    announced: SequenceQueue = field(default_factory=SequenceQueue)

    def __len__(self) -> int:
        return len(self.announced) + len(self.unannounced)

    def queue_of(self, handover: Handover) -> SequenceQueue:
        """Where a hand-over stands."""
        return self.announced if handover.is_announced else self.unannounced

    @property
    def next_to_announce(self) -> Sequence | None:
        """None while enough announcements of those due before it are unanswered."""
        first = self.unannounced.first
        # A worker that is silent must not be promised the whole line. Those of lower tiers keep
        # nobody from being announced.
        is_busy = first is not None and self.announced.num_before(first) >= MAX_UNANSWERED
        return None if is_busy else first


class WaitingLine:
    """Every waiting sequence of one engine, apart by what it waits for."""

    def __init__(self) -> None:
        self.ready = SequenceQueue()
        self.num_reservations = 0
        self._parked: dict[int, Sequence] = {}
        self._partners: dict[WorkerId, _Partner] = {}

    def __len__(self) -> int:
        num_partnering = sum(len(partner) for partner in self._partners.values())
        return len(self.ready) + len(self._parked) + num_partnering

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.ready
        yield from self._parked.values()
        yield from self._partnering()

    @property
    def num_partners(self) -> int:
        """Decode workers that hand-overs wait for; zero at rest."""
        return len(self._partners)

    def _partnering(self) -> Iterator[Sequence]:
        for partner in self._partners.values():
            yield from partner.announced
            yield from partner.unannounced

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for what it lacks."""
        handover = sequence.handover
        self.num_reservations += sequence.status is Status.RESERVING
        # An arrival is never parked: its KV is on its way, whatever its client reads.
        if sequence.is_out_of_credit and sequence.status is Status.WAITING:
            self._parked[sequence.key] = sequence
        elif handover is not None and sequence.is_ahead:
            partner = self._partners.setdefault(handover.partner, _Partner())
            partner.queue_of(handover).add(sequence)
        else:
            self.ready.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out; it still lacks what it lacked when it was added.

        Raises:
            InvariantViolation: It does not wait here.
        """
        handover = sequence.handover
        if self._parked.pop(sequence.key, None) is not None:
            pass
        elif handover is not None and sequence.is_ahead:
            partner = self._partners[handover.partner]
            partner.queue_of(handover).remove(sequence)
            # Workers come and go, and must leave nothing behind.
            if not partner:
                del self._partners[handover.partner]
        else:
            self.ready.remove(sequence)
        self.num_reservations -= sequence.status is Status.RESERVING

    def move_before(self, place: Place, sequence: Sequence) -> None:
        """Let a waiting sequence go right before a place, unless it does already."""
        if place < sequence.due:
            self.remove(sequence)
            sequence.due = place_before(place, sequence.key)
            self.add(sequence)

    def next_to_announce(self) -> Sequence | None:
        """Find the first hand-over that may be announced now; None if there is none.

        A partner that does not answer holds up its own hand-overs, never those of another.
        """
        candidates = (partner.next_to_announce for partner in self._partners.values())
        first = min((s for s in candidates if s is not None), key=_due, default=None)
        if first is None or self.ready.num_before(first) >= MAX_READY:
            return None
        return first

    def announced(self, sequence: Sequence) -> None:
        """Count a hand-over as announced to its partner."""
        self.remove(sequence)
        if sequence.handover is not None:
            sequence.handover.is_announced = True
        self.add(sequence)

    def in_order(self) -> Iterator[Sequence]:
        """Walk over what is ready, the first first, then over what may run ahead of its partner.

        The walk may start or remove sequences that it has come to.
        """
        # Copied below, because those that the walk starts leave the queues.
        yield from self.ready.walk()
        lines = [list(partner.announced) for partner in self._partners.values()]
        yield from heapq.merge(*lines, key=_due)
