"""A line in which tenants take turns, so that nobody's many keep out anybody's one.

Owns the order of those who wait and the rule by which a full line makes room. Does not know what
they wait for. Called by `router.admission` and `router.child_pool`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Waiter = TypeVar("Waiter")


class FairLine(Generic[Waiter]):
    """Bounded over all tenants. Waiters are compared and hashed by identity or value."""

    def __init__(self, limit: int) -> None:
        """Nobody waits."""
        self._limit = limit
        self._lines: OrderedDict[str, OrderedDict[Waiter, None]] = OrderedDict()
        self._num_waiting = 0

    def __len__(self) -> int:
        """Waiters of all tenants."""
        return self._num_waiting

    def join(self, tenant: str, waiter: Waiter) -> Waiter | None:
        """Stand at the end of the tenant's line.

        Returns:
            Who has to go because the line is full: the newest of the tenant with the most waiters,
            which may be the one that came. None if there was room.
        """
        if self._num_waiting < self._limit:
            self._add(tenant, waiter)
            return None
        longest = self._longest()
        if longest is None or not self.has_room_for(tenant):
            return waiter
        newest = next(reversed(self._lines[longest]))
        self.leave(longest, newest)
        self._add(tenant, waiter)
        return newest

    def has_room_for(self, tenant: str) -> bool:
        """Could the tenant join now, in somebody's place if need be?"""
        if self._num_waiting < self._limit:
            return True
        longest = self._longest()
        most = len(self._lines[longest]) if longest is not None else 0
        return len(self._lines.get(tenant, ())) + 1 < most

    def _longest(self) -> str | None:
        return max(self._lines, key=lambda t: len(self._lines[t]), default=None)

    def _add(self, tenant: str, waiter: Waiter) -> None:
        self._lines.setdefault(tenant, OrderedDict())[waiter] = None
        self._num_waiting += 1

    def leave(self, tenant: str, waiter: Waiter) -> bool:
        """Step out; False if it does not stand here (any more)."""
        line = self._lines.get(tenant)
        if line is None or waiter not in line:
            return False
        del line[waiter]
        self._num_waiting -= 1
        if not line:
            del self._lines[tenant]
        return True

    def peek(self) -> Waiter | None:
        """Who is next; None if nobody waits."""
        return next((next(iter(line)) for line in self._lines.values()), None)

    def take(self) -> Waiter | None:
        """Let the next one go; its tenant is last in turn from now on."""
        for tenant, line in self._lines.items():
            waiter, _ = line.popitem(last=False)
            self._num_waiting -= 1
            self._lines.move_to_end(tenant)
            if not line:
                del self._lines[tenant]
            return waiter
        return None
