"""Permits that are taken, by tier and tenant, and who may take more.

Owns the counts and two shares: a tier's of all permits, and a tenant's of its tier's. Does not know
who waits, nor for how long.

A tier takes no more than its share, whatever it asks for. Within it, a tenant takes what it likes
while an eighth of what the tier can have stays free. Of this last eighth it takes no more than
makes up its fair part: by its weight, among those that hold permits and one that may come. So
whoever comes finds a permit, however many another has, and one alone leaves only an eighth unused.
(Dynamic thresholds keep a shared buffer open in this way: Choudhury and Hahne, 1998.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import ceil

from core.config import TierConfig

KEPT_SHARE = 8
"""One permit in so many is kept for tenants that have less than their fair part."""


class Permits:
    """The permits of one router."""

    def __init__(self, num_permits: int, tiers: Mapping[str, TierConfig]) -> None:
        """Start with all permits free."""
        self.num_permits = num_permits
        self._tiers = tiers
        self._taken = dict.fromkeys(tiers, 0)
        self._held: dict[str, Counter[str]] = {name: Counter() for name in tiers}
        """By tier and tenant; who holds none is not in it."""

    @property
    def num_taken(self) -> int:
        """Permits that are taken."""
        return sum(self._taken.values())

    @property
    def num_free(self) -> int:
        """Permits that are not."""
        return self.num_permits - self.num_taken

    def taken_by_tier(self) -> dict[str, int]:
        """Count the permits that are taken."""
        return dict(self._taken)

    def share_of(self, tier: str) -> int:
        """Return the most that a tier may take; one at least."""
        return max(1, int(self.num_permits * self._tiers[tier].max_running_share))

    def num_for(self, tier: str, num_choices: int) -> int:
        """Return how many a request takes: one for each choice."""
        # One with more choices than its tier has permits runs alone; it would never run otherwise.
        return max(1, min(num_choices, self.share_of(tier)))

    def take(self, tier: str, tenant: str, num: int) -> None:
        """Count so many as taken; whether they are free is the caller's to ask."""
        self._taken[tier] += num
        self._held[tier][tenant] += num

    def give_back(self, tier: str, tenant: str, num: int) -> None:
        """Count so many as free again."""
        self._taken[tier] -= num
        self._held[tier][tenant] -= num
        if not self._held[tier][tenant]:
            del self._held[tier][tenant]

    def is_within_share(self, tier: str, num: int) -> bool:
        """True if a tier may take so many more; whether they are free is another matter."""
        share = self.share_of(tier)
        # One that may take all permits lacks no share, but permits: they are kept for it.
        return share == self.num_permits or self._taken[tier] + num <= share

    def is_within_part(self, tier: str, tenant: str, num: int) -> bool:
        """True if a tenant may take so many more of what its tier can have."""
        held = self._held[tier][tenant]
        # Without keys nobody else comes, and who has nothing is never held back.
        if not tenant or not held:
            return True
        num_reach = min(self.share_of(tier), self._taken[tier] + self.num_free)
        num_left = num_reach - self._taken[tier]
        if num_left - num >= num_reach // KEPT_SHARE:
            return True
        weights = self._tiers[tier].tenant_weights
        others = sum(weights.get(one, 1.0) for one in self._held[tier])
        # Rounded up: of few permits most parts are less than one.
        return held + num <= ceil(num_reach * weights.get(tenant, 1.0) / (others + 1.0))
