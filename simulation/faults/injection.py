"""What a fault works with while it is carried out.

Owns the choice of victims, the seed's randomness for faults, and the count of those that bit. Does
not know any one fault.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from simulation.cluster import SimCluster
from simulation.faults.kinds import Fault

T = TypeVar("T")


class Injection:
    """One cluster under faults."""

    def __init__(self, cluster: SimCluster, rng: random.Random) -> None:
        """Nothing has been injected yet."""
        self.cluster = cluster
        self.rng = rng
        self.bitten: Counter[str] = Counter()
        self.store_back_at: float | None = None
        """When the store last became whole again; None: it always was."""

    def bite(self, fault: Fault, *, has_bitten: bool = True) -> None:
        """Count a fault that changed something; one that was drawn and touched nothing is none."""
        self.bitten[fault.kind] += has_bitten

    def pick(self, fault: Fault, things: Sequence[T]) -> T | None:
        """Choose a fault's victim; None: there is none."""
        return things[int(fault.pick * len(things))] if things else None

    def mark_ill(self, *nodes: str) -> None:
        """Allow that these nodes are taken for dead from now on, for a while."""
        now_s = asyncio.get_running_loop().time()
        self.cluster.ill_at.update(dict.fromkeys(nodes, now_s))

    def workers(self) -> list[str]:
        """Name the workers in service, which no other fault holds."""
        cluster = self.cluster
        return [
            node
            for node in sorted(cluster.units)
            if node not in cluster.draining and node not in cluster.paused
        ]

    def routers(self) -> list[str]:
        """Name the routers in service, if one of them can be spared; else none."""
        cluster = self.cluster
        alive = [r.name for r in cluster.routers if r.is_alive and r.name not in cluster.paused]
        return alive if len(alive) > 1 else []


Inflict = Callable[[Injection, Fault], Awaitable[None]]
"""Does one fault and undoes it, if it lasts; returns when it is over."""
