"""Whose turn it is within a tier: who has few sequences here does not wait behind another's many.

Owns how many unfinished sequences each tenant has, and the place that a newcomer moves up to. Does
not know blocks, steps or tiers, and leaves the queues to `WaitingLine`.

A sequence's round is how many of its tenant came before it and are still here, by the tenant's
weight. A newcomer goes right before the first of another tenant that is in a later round and has
not started yet, yet never before its own tenant's: so those who wait are served in rounds, one of
each tenant in every round. Who has more here already, running or waiting, is further behind, and
coming one at a time is no way to more turns. Rounds come nearer as those before them leave: whoever
keeps coming does not keep another's many from ending.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from engine.scheduling.sequence import Place, Sequence, place_before


@dataclass(slots=True)
class _Counts:
    """Of one tenant, since it had nothing here."""

    num_came: int = 0
    num_left: int = 0


class TenantTurns:
    """Counts the sequences of one engine by tenant. Without keys all are nobody's: no turns."""

    def __init__(self, waiting: Iterable[Sequence]) -> None:
        """`waiting` lists whoever waits when it is walked."""
        self._waiting = waiting
        self._counts: defaultdict[str, _Counts] = defaultdict(_Counts)
        """Of tenants that have sequences here."""

    def enter(self, newcomer: Sequence) -> None:
        """Give a newcomer its number, and a place before those that let it pass."""
        if not newcomer.tenant:
            return
        newcomer.number = self._counts[newcomer.tenant].num_came
        its_round = self._round_of(newcomer)
        behind: Place = ()
        passed: list[Place] = []
        for one in self._waiting:
            if one.tenant == newcomer.tenant and one.delay_s == newcomer.delay_s:
                behind = max(behind, one.due)
            elif self._lets_pass(one, newcomer, its_round):
                passed.append(one.due)
        first = min((due for due in passed if due > behind), default=newcomer.due)
        if first < newcomer.due:
            newcomer.due = place_before(first, newcomer.key)
        self.count(newcomer)

    def count(self, sequence: Sequence) -> None:
        """Count a sequence that was forked off another."""
        if sequence.tenant:
            self._counts[sequence.tenant].num_came += 1

    def leave(self, sequence: Sequence) -> None:
        """Count a sequence no more; tenants come and go, and leave nothing behind."""
        if sequence.tenant:
            counts = self._counts[sequence.tenant]
            counts.num_left += 1
            if counts.num_left == counts.num_came:
                del self._counts[sequence.tenant]

    def _round_of(self, sequence: Sequence) -> float:
        return (sequence.number - self._counts[sequence.tenant].num_left) / sequence.weight

    def _lets_pass(self, waiting: Sequence, newcomer: Sequence, its_round: float) -> bool:
        return (
            waiting.shares_tier_with(newcomer)
            and waiting.started_at is None
            and self._round_of(waiting) > its_round
        )
