"""A queue in which tenants take turns: a busy tenant does not delay the others.

Owns the order of the waiters and the rule by which a full queue makes room. Does not know what they
wait for.

The order is that of stride scheduling: a tenant's next waiter has a pass, its further ones follow
at its stride, which is shorter for a larger weight, and the lowest pass is served first. Who comes
begins one stride beyond the pass that was served last. Who has left and comes back goes on where it
was, so that one request at a time is no way to more turns, until nobody waits any more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Waiter = TypeVar("Waiter")
STRIDE = 1 << 20
"""Of a tenant of weight 1."""
MAX_LEFT = 4_096
"""Tenants without a waiter whose passes are known: those that left last."""


@dataclass(slots=True)
class _Tenant(Generic[Waiter]):
    """A tenant with at least one waiter."""

    stride: int
    """Between the passes of two of its waiters."""
    next_pass: int
    """Of its first waiter."""
    waiters: OrderedDict[Waiter, None] = field(default_factory=OrderedDict)

    @property
    def length(self) -> int:
        """Its waiters, by its weight: who has more of them should make room."""
        return len(self.waiters) * self.stride


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
        self._served_pass = 0
        self._left: OrderedDict[str, int] = OrderedDict()
        """The next pass of tenants that wait no more."""

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
            if not self.may_replace(tenant):
                return waiter
            evicted = self.drop_newest()
        self._add(tenant, waiter)
        return evicted

    def has_place_for(self, tenant: str) -> bool:
        """True if the tenant could join now, perhaps in another's place."""
        return not self.is_full or self.may_replace(tenant)

    def may_replace(self, tenant: str) -> bool:
        """True if another tenant has so many more waiters that it must make room for this one."""
        mine = self._tenants.get(tenant)
        length = mine.length if mine is not None else 0
        longest = max((one.length for one in self._tenants.values()), default=0)
        # Not if the two would then be even: they would evict one another in turn.
        return length + self._stride_of(tenant) < longest

    def num_ahead(self, tenant: str) -> int:
        """Count those whose turn is before that of one that the tenant adds now."""
        mine = self._tenants.get(tenant)
        its_pass = self._first_pass(tenant) if mine is None else mine.next_pass + mine.length
        num_ahead = 0
        tie = 0
        for one in self._tenants.values():
            if one is mine:
                num_ahead += len(one.waiters)
                # From here on tenants stand behind it in the table: equal passes are after its own.
                tie = 1
            else:
                num_passes = (its_pass - one.next_pass - tie) // one.stride + 1
                num_ahead += min(len(one.waiters), max(0, num_passes))
        return num_ahead

    def drop_newest(self) -> Waiter:
        """Remove and return the newest waiter of the tenant with the most, by its weight."""
        longest = max(self._tenants.values(), key=lambda one: one.length)
        # The newest: it has waited the least, so it loses the least.
        newest = next(reversed(longest.waiters))
        self.leave(self._joined[newest], newest)
        return newest

    def leave(self, tenant: str, waiter: Waiter) -> bool:
        """Remove a waiter; False if it does not wait here (any more)."""
        found = self._tenants.get(tenant)
        if found is None or waiter not in found.waiters:
            return False
        del found.waiters[waiter]
        del self._joined[waiter]
        if not found.waiters:
            del self._tenants[tenant]
            self._note_left(tenant, found.next_pass)
        return True

    def _note_left(self, tenant: str, next_pass: int) -> None:
        self._left[tenant] = next_pass
        self._left.move_to_end(tenant)
        if len(self._left) > MAX_LEFT:
            self._left.popitem(last=False)
        if not self._tenants:  # nobody has gone without for them
            self._left.clear()

    def peek(self, may_go: Callable[[Waiter], bool] | None = None) -> Waiter | None:
        """The next waiter whose tenant's first may go; None if there is none."""
        in_turn = self._in_turn() if may_go is None else filter(may_go, self._in_turn())
        return next(in_turn, None)

    def take(self, tenant: str | None = None, num_turns: float = 1.0) -> Waiter | None:
        """Remove and return the next waiter, of that tenant if one is given.

        The tenant's next one has its turn as many turns later as this one counts for. A tenant that
        was passed makes up for no turn: it could not use them.
        """
        name = min(self._tenants, key=self._pass_of, default=None) if tenant is None else tenant
        if name is None or name not in self._tenants:
            return None
        found = self._tenants[name]
        waiter = next(iter(found.waiters))
        self._served_pass = max(self._served_pass, found.next_pass)
        found.next_pass = self._served_pass + max(1, round(found.stride * num_turns))
        self.leave(name, waiter)
        return waiter

    def _stride_of(self, tenant: str) -> int:
        return max(1, round(STRIDE / self._weights.get(tenant, 1.0)))

    def _first_pass(self, tenant: str) -> int:
        if tenant in self._left:
            return max(self._served_pass, self._left[tenant])
        return self._served_pass + self._stride_of(tenant)

    def _add(self, tenant: str, waiter: Waiter) -> None:
        found = self._tenants.get(tenant)
        if found is None:
            found = _Tenant(self._stride_of(tenant), self._first_pass(tenant))
            self._tenants[tenant] = found
            self._left.pop(tenant, None)
        found.waiters[waiter] = None
        self._joined[waiter] = tenant

    def _in_turn(self) -> Iterator[Waiter]:
        """List the first of each tenant, in the order of their turns."""
        # Of equal passes the first in the table: it has waited longer.
        for name in sorted(self._tenants, key=self._pass_of):
            yield next(iter(self._tenants[name].waiters))

    def _pass_of(self, tenant: str) -> int:
        return self._tenants[tenant].next_pass
