"""Whose turn it is within a tier: who has few sequences here does not wait behind another's many.

Owns how many unfinished sequences each tenant has, and the place that a newcomer moves up to. Does
not know blocks, steps or tiers, and leaves the queues to `WaitingLine`.

A tenant's sequences are numbered as they come, by its weight. A newcomer goes right before the
first of another tenant that has a higher number and has not started yet: so those who wait are
served in rounds, one of each tenant in every round. Who has more here already, running or waiting,
is further behind, and coming one at a time is no way to more turns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from engine.scheduling.sequence import Sequence, place_before


class TenantTurns:
    """Counts the sequences of one engine by tenant. Without keys all are nobody's: no turns."""

    def __init__(self, waiting: Iterable[Sequence]) -> None:
        """`waiting` lists whoever waits when it is walked."""
        self._waiting = waiting
        self._num_of: Counter[str] = Counter()

    def enter(self, newcomer: Sequence) -> None:
        """Give a newcomer its number, and a place before those that let it pass."""
        if not newcomer.tenant:
            return
        newcomer.number = self._num_of[newcomer.tenant] / newcomer.weight
        passed = (s.due for s in self._waiting if _lets_pass(s, newcomer))
        first = min(passed, default=newcomer.due)
        if first < newcomer.due:
            newcomer.due = place_before(first, newcomer.key)
        self.count(newcomer)

    def count(self, sequence: Sequence) -> None:
        """Count a sequence that was forked off another."""
        if sequence.tenant:
            self._num_of[sequence.tenant] += 1

    def leave(self, sequence: Sequence) -> None:
        """Count a sequence no more; tenants come and go, and leave nothing behind."""
        if sequence.tenant:
            self._num_of[sequence.tenant] -= 1
            if not self._num_of[sequence.tenant]:
                del self._num_of[sequence.tenant]


def _lets_pass(waiting: Sequence, newcomer: Sequence) -> bool:
    return (
        waiting.shares_tier_with(newcomer)
        and waiting.number > newcomer.number
        and waiting.started_at is None
    )
