"""Requests that wait for permits: one queue for each tier, and one order among them.

Owns who goes next, and who must leave when there is no room. Does not know permits or clocks.

The order is that of the workers (`engine.scheduling.order`): a request is due when it came, later
by the delay of its tier. So a newcomer of a higher tier goes before all those of a lower one that
have not waited as long as their delay; who has is level with it. A tier's turn is that of the one
which has waited longest in it; who gets it is a matter of its tenants' turns.

Room is limited for each tier and for all together. What does not fit takes places of lower tiers,
the lowest first; in its own tier, that of a tenant with more waiters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from core.config import TierConfig
from router.fair_queue import FairQueue


@dataclass(eq=False, slots=True)
class Waiter:
    """A request that waits for its permits."""

    tier: str
    tenant: str
    num_permits: int
    num_tokens: int
    joined_at: float
    """When it came (monotonic seconds)."""


@dataclass(frozen=True, slots=True)
class QueuedAhead:
    """Waiters whose turn is before a newcomer's, as far as that can be foreseen."""

    num_requests: int
    num_own: int
    """Of its own tier."""
    num_tokens: int
    """Of the prompts of them all."""


AnyWaiter = TypeVar("AnyWaiter", bound=Waiter)


class TierQueue(Generic[AnyWaiter]):
    """Waiters of one tier."""

    def __init__(self, tier: TierConfig, max_queued: int, max_queued_tokens: int) -> None:
        """Start empty; the limits are those of all tiers, which the tier may lower."""
        self.delay_s = tier.delay_s
        self.max_running_share = tier.max_running_share
        self.max_queued = max_queued if tier.max_queued is None else tier.max_queued
        self.max_queued_tokens = (
            max_queued_tokens if tier.max_queued_tokens is None else tier.max_queued_tokens
        )
        self.num_tokens = 0
        self.waiters: FairQueue[AnyWaiter] = FairQueue(self.max_queued, tier.tenant_weights)

    def num_due(self, at: float) -> int:
        """Estimate how many are due by then, as if they had come evenly.

        To count them would cost time for each waiter at each newcomer.
        """
        oldest = self.waiters.oldest
        newest = self.waiters.newest
        if oldest is None or newest is None:
            return 0
        since_s = at - self.due_at
        span_s = newest.joined_at - oldest.joined_at
        if since_s >= span_s:
            return len(self.waiters)
        return 0 if since_s < 0 else max(1, round(len(self.waiters) * since_s / span_s))

    def tokens_of(self, num: float) -> float:
        """Estimate the prompt tokens of so many of its waiters."""
        return self.num_tokens * num / max(1, len(self.waiters))

    @property
    def due_at(self) -> float:
        """When its oldest waiter is due (monotonic seconds); never, if it has none."""
        oldest = self.waiters.oldest
        return float("inf") if oldest is None else oldest.joined_at + self.delay_s


class TierQueues(Generic[AnyWaiter]):
    """Waiters of all tiers."""

    def __init__(
        self, tiers: Mapping[str, TierConfig], max_queued: int, max_queued_tokens: int
    ) -> None:
        """Start empty; the limits are those of all tiers together."""
        self._max_queued = max_queued
        self._max_queued_tokens = max_queued_tokens
        self.by_tier: dict[str, TierQueue[AnyWaiter]] = {
            name: TierQueue(tier, max_queued, max_queued_tokens) for name, tier in tiers.items()
        }

    def __len__(self) -> int:
        """Waiters of all tiers."""
        return sum(len(queue.waiters) for queue in self.by_tier.values())

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of all waiters."""
        return sum(queue.num_tokens for queue in self.by_tier.values())

    def in_turn(self) -> Iterator[TierQueue[AnyWaiter]]:
        """List the tiers in which somebody waits, in the order in which they are due."""
        waiting = (queue for queue in self.by_tier.values() if queue.waiters)
        return iter(sorted(waiting, key=lambda queue: queue.due_at))

    def ahead_of(self, tier: str, tenant: str, now_s: float) -> QueuedAhead:
        """Estimate what has its turn before one that the tenant adds to a tier now."""
        queue = self.by_tier[tier]
        due_at = now_s + queue.delay_s
        others = [
            (one, one.num_due(due_at))
            for one in self.by_tier.values()
            if one is not queue and one.waiters
        ]
        num_own = queue.waiters.num_ahead(tenant)
        num_turns = _num_turns(
            num_own + 1, [(num, one.max_running_share) for one, num in others if num]
        )
        num_tokens = queue.tokens_of(num_own) + sum(
            one.tokens_of(min(num, one.max_running_share * num_turns)) for one, num in others
        )
        return QueuedAhead(round(num_turns) - 1, num_own, round(num_tokens))

    # --- room -------------------------------------------------------------------------------------

    def has_place_for(self, tier: str, tenant: str) -> bool:
        """True if a newcomer could wait now, perhaps in another's place."""
        queue = self.by_tier[tier]
        if queue.waiters.is_full or len(self) < self._max_queued:
            return queue.waiters.has_place_for(tenant)
        return any(one.waiters for one in self._below(queue)) or queue.waiters.may_replace(tenant)

    def token_limit(self, tier: str, num_tokens: int) -> tuple[int, int] | None:
        """Look for the limit that so many more prompt tokens would pass.

        Returns:
            Tokens that wait and would not leave for it, and the limit; None: there is room.
        """
        queue = self.by_tier[tier]
        kept = self.num_tokens - sum(one.num_tokens for one in self._below(queue))
        limits = (
            (queue.num_tokens, queue.max_queued_tokens),
            (kept, self._max_queued_tokens),
        )
        return next((pair for pair in limits if pair[0] + num_tokens > pair[1]), None)

    def join(self, waiter: AnyWaiter) -> list[AnyWaiter]:
        """Let a request wait, for which there are a place and room for its tokens.

        Returns:
            Those that have left their places to it.
        """
        queue = self.by_tier[waiter.tier]
        lower = self._below(queue)
        left: list[AnyWaiter] = []
        while self.num_tokens + waiter.num_tokens > self._max_queued_tokens:
            left.append(self._drop(next(one for one in lower if one.waiters)))
        if queue.waiters.is_full:
            left.append(self._drop(queue))
        elif len(self) >= self._max_queued:
            left.append(self._drop(next((one for one in lower if one.waiters), queue)))
        queue.waiters.join(waiter.tenant, waiter)
        queue.num_tokens += waiter.num_tokens
        return left

    def leave(self, waiter: AnyWaiter) -> None:
        """Take a request out, if it waits."""
        queue = self.by_tier[waiter.tier]
        if queue.waiters.leave(waiter.tenant, waiter):
            queue.num_tokens -= waiter.num_tokens

    def take(self, waiter: AnyWaiter, num_turns: float = 1.0) -> None:
        """Take out the first of its tenant, which has had so many turns by it."""
        queue = self.by_tier[waiter.tier]
        if queue.waiters.take(waiter.tenant, num_turns) is not None:
            queue.num_tokens -= waiter.num_tokens

    def _below(self, queue: TierQueue[AnyWaiter]) -> list[TierQueue[AnyWaiter]]:
        """List the tiers that make room for this one, the lowest first."""
        lower = (one for one in self.by_tier.values() if one.delay_s > queue.delay_s)
        return sorted(lower, key=lambda one: -one.delay_s)

    def _drop(self, queue: TierQueue[AnyWaiter]) -> AnyWaiter:
        dropped = queue.waiters.drop_newest()
        queue.num_tokens -= dropped.num_tokens
        return dropped


def _num_turns(num_own: int, others: list[tuple[int, float]]) -> float:
    """Count turns until the last of its own tier has had its own.

    Args:
        num_own: In the own tier, with the newcomer.
        others: Of each other tier, how many are due before it, and its share: it gets no more of
            the turns meanwhile.
    """
    num = float(num_own + sum(num for num, _ in others))
    left = 1.0
    for num_due, share in sorted(others, key=lambda one: one[1] / one[0]):
        if num_due <= share * num / left:
            break
        num -= num_due
        left -= share
    return num / left
