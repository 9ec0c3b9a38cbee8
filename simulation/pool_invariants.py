"""Whose pools serve whom.

Owns one promise, checked at every ending of an attempt at a worker:

    P1 nobody's request runs on a worker of a pool that its tier may not use

It reads the tiers' settings itself, so that it does not believe what placement makes of them. Does
not know which of several allowed pools is the right one.
"""

from __future__ import annotations

from collections.abc import Mapping

from core.config import TierConfig
from core.session import WorkerDescriptor
from router.placement import Placement
from router.prompt_prefixes import PromptNames
from router.request_state import RequestState
from simulation.cluster import SimCluster
from simulation.observers import ClusterObserver
from simulation.report import Report
from worker.attempt import Attempt


def may_use(tiers: Mapping[str, TierConfig], tier: str, worker: WorkerDescriptor) -> bool:
    """Return True if requests of a tier may run on a worker."""
    for name in (tier, *tiers[tier].spill_to):
        pools = tiers[name].pools if name in tiers else None
        own = getattr(pools, worker.role.value, None)
        if worker.tier == ("" if own is None else name):
            return True
    return False


class PoolWatch(ClusterObserver):
    """Sees who runs where, and counts who has spilled over."""

    def __init__(self, cluster: SimCluster, report: Report) -> None:
        """Look on from now."""
        cluster.observers.join(self)
        self._cluster = cluster
        self._report = report

    def placed(
        self, router: str, run: RequestState, names: PromptNames, placement: Placement
    ) -> None:
        """Count who left its first pools."""
        self._report.spills += placement.reason.startswith("spilled")

    def attempt_ended(self, node: str, attempt: Attempt) -> None:
        """P1, whether anything was computed or not."""
        worker = self._cluster.descriptor_of(node)
        tier = attempt.submit.request.tier
        if not may_use(self._cluster.shape.tiers, tier, worker):
            name = attempt.submit.request.request_id
            self._report.violated(f"P1 {node}: {name} of tier {tier} ran in a pool of others")
