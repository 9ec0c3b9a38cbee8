"""Carrying out a schedule of faults on a simulated cluster.

Owns when each fault begins. Does not know what any of them does, nor loads or invariants.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from simulation.cluster import SimCluster
from simulation.faults import nodes, prefix_index, quotas, store, streams, workers
from simulation.faults.injection import Inflict, Injection
from simulation.faults.kinds import ODDS, Fault, Kind, Where
from simulation.faults.wire import WireFaults

INFLICT: dict[Kind, Inflict] = {
    **streams.FAULTS,
    **nodes.FAULTS,
    **workers.FAULTS,
    **store.FAULTS,
    **prefix_index.FAULTS,
    **quotas.FAULTS,
}


class Injector:
    """Carries a schedule out on one cluster."""

    def __init__(self, cluster: SimCluster, faults: Sequence[Fault], rng: random.Random) -> None:
        """Hook into the wire; `run` does the rest."""
        self._faults = faults
        self.injection = Injection(cluster, rng)
        self._wire = WireFaults(self.injection)
        cluster.hub.mangle = self._wire.mangle

    async def run(self) -> None:
        """Inflict every fault at its time and undo those that last; returns when all is over."""
        loop = asyncio.get_running_loop()
        tasks: list[asyncio.Task[None]] = []
        for fault in self._faults:
            await asyncio.sleep(max(0.0, fault.at_s - loop.time()))
            match ODDS[fault.kind].where:
                case Where.WIRE:
                    self._wire.arm(fault)
                case Where.CLUSTER:
                    tasks.append(loop.create_task(_inflict(self.injection, fault)))
        # One after the other: `gather` would leave the others alone at the first bug.
        for task in tasks:
            await task
        self._wire.disarm()


async def _inflict(injection: Injection, fault: Fault) -> None:
    await INFLICT[fault.kind](injection, fault)
