"""A queue in which tenants take turns: a busy tenant does not delay the others.

Owns the order of the waiters and the rule by which a full queue makes room. Does not know what they
wait for.

A tenant's turns are marks on a line that all of them share, closer together for a larger weight;
the lowest mark is served next. A newcomer's first mark lies one of its turns beyond the one that
was served last, so that leaving and coming back gains nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Waiter = TypeVar("Waiter")
TURN = 1 << 20
"""Between two marks of a tenant of weight 1."""


@dataclass(slots=True)
class _Tenant(Generic[Waiter]):
    """A tenant with at least one waiter."""

    turn: int
    """Its distance between two marks."""
    mark: int
    """Of its next waiter."""
    waiters: OrderedDict[Waiter, None] = field(default_factory=OrderedDict)

    @property
    def share(self) -> int:
        """Its waiters, by its weight: who has more of them should make room."""
        return len(self.waiters) * self.turn


class FairQueue(Generic[Waiter]):
    """Bounded over all tenants. Waiters are compared and hashed by identity or value."""

    def __init__(self, limit: int, weights: Mapping[str, float] | None = None) -> None:
        """Start empty.

        Args:
            limit: How many may wait.
            weights: By tenant: its turns for each turn of a tenant that is not named.
        """
        self._limit = limit
        self._weights = weights or {}
        self._tenants: dict[str, _Tenant[Waiter]] = {}
        self._joined: OrderedDict[Waiter, str] = OrderedDict()
        """Every waiter's tenant, the first that came first."""
        self._served_mark = 0

    def __len__(self) -> int:
        """Waiters of all tenants."""
        return len(self._joined)

    @property
    def is_full(self) -> bool:
        """True while a newcomer needs another's place."""
        return len(self._joined) >= self._limit

    @property
    def oldest(self) -> Waiter | None:
        """Who came first of all; None if the queue is empty."""
        return next(iter(self._joined), None)

    @property
    def newest(self) -> Waiter | None:
        """Who came last of all; None if the queue is empty."""
        return next(reversed(self._joined), None)

    def join(self, tenant: str, waiter: Waiter) -> Waiter | None:
        """Add a waiter at the end of the tenant's own queue.

        Returns:
            The waiter that must leave because the queue is full: the newest of the tenant with the
            most waiters, perhaps the new one itself. None if there was room.
        """
        evicted = None
        if self.is_full:
            evicted = self.make_room(tenant)
            if evicted is None:
                return waiter
        self._add(tenant, waiter)
        return evicted

    def make_room(self, tenant: str) -> Waiter | None:
        """Remove and return the newest waiter of the tenant with the most; None if it may stay."""
        return self.drop_newest() if self.may_replace(tenant) else None

    def has_room_for(self, tenant: str) -> bool:
        """True if the tenant could join now, perhaps in another's place."""
        return not self.is_full or self.may_replace(tenant)

    def may_replace(self, tenant: str) -> bool:
        """True if another tenant has so many more waiters that it must make room for this one."""
        mine = self._tenants.get(tenant)
        turn = self._turn_of(tenant)
        share = mine.share if mine is not None else 0
        most = max((one.share for one in self._tenants.values()), default=0)
        # Not if the two would then be even: they would evict one another in turn.
        return share + turn < most

    def num_ahead(self, tenant: str) -> int:
        """Count those whose turn is before that of one that the tenant adds now."""
        mine = self._tenants.get(tenant)
        mark = self._first_mark(tenant) if mine is None else mine.mark + mine.share
        num_ahead = 0
        is_behind = 0
        for one in self._tenants.values():
            if one is mine:
                num_ahead += len(one.waiters)
                # From here on tenants stand behind it in the table: equal marks are after its own.
                is_behind = 1
            else:
                num_turns = (mark - one.mark - is_behind) // one.turn + 1
                num_ahead += min(len(one.waiters), max(0, num_turns))
        return num_ahead

    def drop_newest(self) -> Waiter:
        """Remove and return the newest waiter of the tenant with the most, by its weight."""
        longest = max(self._tenants.values(), key=lambda one: one.share)
        # The newest: it has waited the least, so it loses the least.
        newest = next(reversed(longest.waiters))
        self.leave(self._joined[newest], newest)
        return newest

    def _turn_of(self, tenant: str) -> int:
        return max(1, round(TURN / self._weights.get(tenant, 1.0)))

    def _first_mark(self, tenant: str) -> int:
        return self._served_mark + self._turn_of(tenant)

    def _add(self, tenant: str, waiter: Waiter) -> None:
        found = self._tenants.get(tenant)
        if found is None:
            mark = self._first_mark(tenant)
            found = self._tenants[tenant] = _Tenant(self._turn_of(tenant), mark)
        found.waiters[waiter] = None
        self._joined[waiter] = tenant

    def leave(self, tenant: str, waiter: Waiter) -> bool:
        """Remove a waiter; False if it does not wait here (any more)."""
        found = self._tenants.get(tenant)
        if found is None or waiter not in found.waiters:
            return False
        del found.waiters[waiter]
        del self._joined[waiter]
        if not found.waiters:
            del self._tenants[tenant]
        return True

    def peek(self) -> Waiter | None:
        """The next waiter; None if the queue is empty."""
        name = self._next_tenant()
        return None if name is None else next(iter(self._tenants[name].waiters))

    def take(self) -> Waiter | None:
        """Remove and return the next waiter; its tenant's next one has its turn later."""
        name = self._next_tenant()
        if name is None:
            return None
        tenant = self._tenants[name]
        waiter = next(iter(tenant.waiters))
        self._served_mark = tenant.mark
        tenant.mark += tenant.turn
        self.leave(name, waiter)
        return waiter

    def _next_tenant(self) -> str | None:
        # Of equal marks the first in the table: it has waited longer.
        return min(self._tenants, key=lambda name: self._tenants[name].mark, default=None)
