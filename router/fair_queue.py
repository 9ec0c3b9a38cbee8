"""A queue in which tenants take turns: a busy tenant does not delay the others.

Owns the order of the waiters and the rule by which a full queue makes room. Does not know what they
wait for.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Waiter = TypeVar("Waiter")


class FairQueue(Generic[Waiter]):
    """Bounded over all tenants. Waiters are compared and hashed by identity or value."""

    def __init__(self, limit: int) -> None:
        """Start empty; at most `limit` may wait."""
        self._limit = limit
        self._queues: OrderedDict[str, OrderedDict[Waiter, None]] = OrderedDict()
        self._num_waiting = 0

    def __len__(self) -> int:
        """Waiters of all tenants."""
        return self._num_waiting

    def join(self, tenant: str, waiter: Waiter) -> Waiter | None:
        """Add a waiter at the end of the tenant's own queue.

        Returns:
            The waiter that must leave because the queue is full: the newest of the tenant with the
            most waiters, perhaps the new one itself. None if there was room.
        """
        if self._num_waiting < self._limit:
            self._add(tenant, waiter)
            return None
        longest = self._longest()
        if longest is None or not self.has_room_for(tenant):
            return waiter
        # The newest: it has waited the least, so it loses the least.
        newest = next(reversed(self._queues[longest]))
        self.leave(longest, newest)
        self._add(tenant, waiter)
        return newest

    def has_room_for(self, tenant: str) -> bool:
        """True if the tenant could join now, perhaps in another's place."""
        if self._num_waiting < self._limit:
            return True
        longest = self._longest()
        most = len(self._queues[longest]) if longest is not None else 0
        # Not if the two would then be even: they would evict one another in turn.
        return len(self._queues.get(tenant, ())) + 1 < most

    def num_ahead(self, tenant: str) -> int:
        """Count those whose turn is before that of one that the tenant adds now."""
        num_ahead = num_own = len(self._queues.get(tenant, ()))
        # Tenants who stand before it take one turn more than it does until then.
        num_turns = num_own + 1
        for name, queue in self._queues.items():
            if name == tenant:
                num_turns = num_own
            else:
                num_ahead += min(len(queue), num_turns)
        return num_ahead

    def _longest(self) -> str | None:
        return max(self._queues, key=lambda t: len(self._queues[t]), default=None)

    def _add(self, tenant: str, waiter: Waiter) -> None:
        self._queues.setdefault(tenant, OrderedDict())[waiter] = None
        self._num_waiting += 1

    def leave(self, tenant: str, waiter: Waiter) -> bool:
        """Remove a waiter; False if it does not wait here (any more)."""
        queue = self._queues.get(tenant)
        if queue is None or waiter not in queue:
            return False
        del queue[waiter]
        self._num_waiting -= 1
        if not queue:
            del self._queues[tenant]
        return True

    def peek(self) -> Waiter | None:
        """The next waiter; None if the queue is empty."""
        return next((next(iter(queue)) for queue in self._queues.values()), None)

    def take(self) -> Waiter | None:
        """Remove and return the next waiter; its tenant goes to the end of the line."""
        for tenant, queue in self._queues.items():
            waiter, _ = queue.popitem(last=False)
            self._num_waiting -= 1
            # Its turn is over: tenants take turns, however much each has waiting.
            self._queues.move_to_end(tenant)
            if not queue:
                del self._queues[tenant]
            return waiter
        return None
