"""Every unfinished sequence of one engine, by what it is doing.

Owns the four sets a sequence can be in and its way out of them, and which of them a running step
and the ranks still know. Does not know budgets, what blocks mean, or transfers.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.scheduling.block_tables import BlockTables
from engine.scheduling.queues import SequenceQueue, WaitingLine
from engine.scheduling.sequence import Sequence, Status
from engine.scheduling.tenant_turns import TenantTurns


class Sequences:
    """The unfinished sequences, and those whose blocks a running step still uses."""

    def __init__(self, tables: BlockTables) -> None:
        self.running = SequenceQueue()
        self.waiting = WaitingLine()
        self.turns = TenantTurns(self.waiting)
        self.holding: dict[int, Sequence] = {}
        self.arriving: dict[int, Sequence] = {}
        self.executing: frozenset[int] = frozenset()
        """Keys in the step that runs; empty between steps."""
        self.copies_from_free = False
        """True while a step runs that reads from a free block: nobody may be given one."""
        self._tables = tables
        self._cancelled_in_step: list[Sequence] = []
        self._known_to_ranks: set[int] = set()
        self._released: list[int] = []

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting
        yield from self.holding.values()
        yield from self.arriving.values()

    @property
    def active(self) -> list[Sequence]:
        """Running sequences that take a place in a step; parked ones do not."""
        return [s for s in self.running if not s.is_out_of_credit]

    @property
    def num_places_taken(self) -> int:
        """Places of those that run, and of those that will as soon as their KV is here."""
        return sum(not s.is_out_of_credit for s in self.running) + len(self.arriving)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the set that it is in; the caller puts it elsewhere."""
        match sequence.status:
            case Status.RUNNING:
                self.running.remove(sequence)
            case Status.WAITING | Status.RESERVING:
                self.waiting.remove(sequence)
            case Status.HOLDING:
                del self.holding[sequence.key]
            case Status.ARRIVING:
                del self.arriving[sequence.key]

    def release(self, sequence: Sequence) -> None:
        """Drop a sequence's own references; the ranks forget its table with the next plan."""
        self._tables.free(sequence)
        if sequence.key in self._known_to_ranks:
            self._known_to_ranks.remove(sequence.key)
            self._released.append(sequence.key)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence; while a step runs its blocks wait for the end of it. Idempotent."""
        if sequence.is_finished:
            return
        self.remove(sequence)
        self._finish(sequence)
        # The step that runs may be writing to its blocks.
        if self.executing:
            self._cancelled_in_step.append(sequence)
        else:
            self.release(sequence)

    def forked(self, sequence: Sequence) -> None:
        """End a sequence, in no set any more, whose forks have taken its place."""
        self.release(sequence)
        self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        if sequence.status is not Status.NEW:
            self.turns.leave(sequence)
        sequence.status = Status.FINISHED

    def step_begins(self, planned: set[int], *, copies_from_free: bool) -> tuple[int, ...]:
        """Note what is executed from now on.

        Args:
            planned: Keys of the sequences in the step.
            copies_from_free: The step copies from a block that nobody holds any more.

        Returns:
            Keys of those that gave up their blocks since the last step: ranks forget them.
        """
        released = tuple(self._released)
        self._released.clear()
        self.executing = frozenset(planned)
        self.copies_from_free = copies_from_free
        self._known_to_ranks |= planned
        return released

    def step_ended(self) -> None:
        """Nothing is executing any more: free what was cancelled meanwhile."""
        self.executing = frozenset()
        self.copies_from_free = False
        for sequence in self._cancelled_in_step:
            self.release(sequence)
        self._cancelled_in_step.clear()

    def ranks_are_gone(self) -> None:
        """The ranks died, and what they knew with them."""
        self._known_to_ranks.clear()
        self._released.clear()
