"""Rare but legal choices, forced on a worker's scheduler at random.

Owns the odds and the count of what was forced: preemption before a plan, a cache that is evicted,
free blocks that are refused. Does not know schedules.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

from core.errors import PoolExhausted
from core.plan import StepPlan
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence


class RareChoices:
    """Legal but rare choices at random: preempt before a plan, evict the cache, find no blocks."""

    def __init__(self, rng: Random) -> None:
        """Nothing is forced yet."""
        self._rng = rng
        self.num_forced: dict[str, int] = {"preempt": 0, "evict": 0, "no_blocks": 0}
        self.preempt_odds = 0.0
        self.evict_odds = 0.0
        self.failing_allocations: dict[str, int] = {}

    def take_hold(self, node: str, scheduler: Scheduler, wake: Callable[[], None]) -> None:
        """Wrap what a worker's scheduler decides."""
        plan = scheduler.plan
        allocate = scheduler.tables.allocate

        def forced_plan(now_s: float) -> StepPlan:
            victims = [*scheduler.running, *scheduler.holding.values()]
            if victims and self._rng.random() < self.preempt_odds:
                self.num_forced["preempt"] += 1
                scheduler.preempt(self._rng.choice(victims))
            if scheduler.pool.num_cached and self._rng.random() < self.evict_odds:
                self.num_forced["evict"] += 1
                scheduler.pool.drop_cache()
            return plan(now_s)

        def forced_allocate(
            sequence: Sequence, hits: list[int], num_new: int, num_spare: int
        ) -> None:
            if self.failing_allocations.get(node, 0):
                self.failing_allocations[node] -= 1
                self.num_forced["no_blocks"] += 1
                # Really short of blocks, a worker is woken by whoever gives some back. Nobody does
                # here, so a timer wakes it.
                asyncio.get_running_loop().call_later(0.05, wake)
                raise PoolExhausted("injected: no blocks")
            allocate(sequence, hits, num_new, num_spare)

        scheduler.plan = forced_plan  # type: ignore[method-assign]
        scheduler.tables.allocate = forced_allocate  # type: ignore[method-assign]
