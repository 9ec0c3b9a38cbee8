"""The figures of `baton top`: what a router says now, and rates from what it has counted.

Owns the window over which rates are taken and the form of the figures. Does not know how they are
asked for or drawn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from core import metrics

WINDOW_S = 60.0
"""Tokens are counted when their request ends: over seconds alone rates would be all or nothing."""
COUNTED = (
    metrics.REQUESTS,
    metrics.PROMPT_TOKENS,
    metrics.OUTPUT_TOKENS,
    metrics.KV_BYTES,
    metrics.SLO_REQUESTS,
    metrics.WORKER_PREEMPTIONS,
)
_LABELS = {metric.name: metric.labels for metric in COUNTED}
Totals = Mapping[tuple[str, ...], float]
"""By name and the values of the labels, in the order of `core.metrics`."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a router said at one instant (monotonic seconds)."""

    at_s: float
    router: str
    """Its name; empty if it does not say."""
    readiness: dict[str, Any]
    replicas: list[dict[str, Any]]
    tiers: dict[str, dict[str, int]]
    routes: list[dict[str, Any]]
    totals: Totals
    routers: list[dict[str, Any]] = field(default_factory=list)


def totals_of(exposition: str) -> Totals:
    """Read what is counted from Prometheus text.

    Raises:
        ValueError: It is none.
    """
    return {
        (sample.name, *(sample.labels.get(label, "") for label in _LABELS[sample.name])): (
            sample.value
        )
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if sample.name in _LABELS
    }


class Window:
    """The snapshots of the last minute."""

    def __init__(self) -> None:
        """Start without any."""
        self._snapshots: deque[Snapshot] = deque()

    def add(self, snapshot: Snapshot) -> None:
        """Take the next snapshot, and let go of those that are too old."""
        if self._snapshots and _has_restarted(self._snapshots[-1], snapshot):
            self._snapshots.clear()
        self._snapshots.append(snapshot)
        # The oldest one that is kept begins the window: it may be a little longer than the limit.
        while len(self._snapshots) > 1 and self._snapshots[1].at_s <= snapshot.at_s - WINDOW_S:
            self._snapshots.popleft()

    @property
    def router(self) -> str:
        """Name of the router that is watched; empty before the first snapshot."""
        return self._snapshots[-1].router if self._snapshots else ""

    def figures(self) -> dict[str, Any]:
        """Return everything that is shown; what cannot be told yet is None.

        Raises:
            IndexError: There is no snapshot.
        """
        last = self._snapshots[-1]
        growth = Growth(self._snapshots[0], last)
        return {
            "router": last.router,
            "state": last.readiness["state"],
            "models": list(last.readiness["models"]),
            "store": last.readiness["store"],
            "problems": last.readiness["problems"],
            "window_s": round(growth.took_s, 3),
            "requests_per_s": growth.per_s(metrics.REQUESTS),
            "prompt_tokens_per_s": growth.per_s(metrics.PROMPT_TOKENS),
            "output_tokens_per_s": growth.per_s(metrics.OUTPUT_TOKENS),
            "kv_bytes_per_s": growth.per_s(metrics.KV_BYTES),
            "tiers": {name: _tier(name, counts, growth) for name, counts in last.tiers.items()},
            "workers": [_worker(replica, growth) for replica in last.replicas],
            "routers": last.routers,
            "links": last.routes,
        }


class Growth:
    """What was counted between two snapshots of one router."""

    def __init__(self, first: Snapshot, last: Snapshot) -> None:
        """Compare; of one snapshot with itself nothing can be told."""
        self._first = first.totals
        self._last = last.totals
        self.took_s = last.at_s - first.at_s

    def of(self, metric: metrics.Metric, *labels: str) -> float | None:
        """Return by how much a metric grew, over all series that begin with these labels."""
        if self.took_s <= 0:
            return None
        begin = (metric.name, *labels)
        return sum(
            value - self._first.get(key, 0.0)
            for key, value in self._last.items()
            if key[: len(begin)] == begin
        )

    def per_s(self, metric: metrics.Metric, *labels: str) -> float | None:
        """Return the same as a rate."""
        grown = self.of(metric, *labels)
        return None if grown is None else round(grown / self.took_s, 3)


def _has_restarted(before: Snapshot, after: Snapshot) -> bool:
    """True if it is another router, or a counter fell: it has started again."""
    return before.router != after.router or any(
        after.totals.get(key, value) < value for key, value in before.totals.items()
    )


def _tier(name: str, counts: dict[str, int], growth: Growth) -> dict[str, Any]:
    offered = growth.of(metrics.SLO_REQUESTS, name)
    met = growth.of(metrics.SLO_REQUESTS, name, "met")
    return {
        **counts,
        "attainment": round(met / offered, 4) if offered and met is not None else None,
        "requests_per_s": growth.per_s(metrics.SLO_REQUESTS, name),
        "output_tokens_per_s": growth.per_s(metrics.OUTPUT_TOKENS, name),
    }


def _worker(replica: dict[str, Any], growth: Growth) -> dict[str, Any]:
    load = replica["load"]
    num_unused = load["free_blocks"] + load["cached_blocks"]
    return {
        "worker_id": replica["worker_id"],
        "role": replica["role"],
        "tier": replica["tier"],
        "node": replica["node"],
        "state": replica["state"],
        "running": load["running"],
        "waiting": load["waiting"],
        "waiting_tokens": load["waiting_tokens"],
        # Before its first report all of a worker's blocks would seem to be in use.
        "used_blocks": load["total_blocks"] - num_unused if num_unused else 0,
        "cached_blocks": load["cached_blocks"],
        "total_blocks": load["total_blocks"],
        "preemptions_per_s": growth.per_s(metrics.WORKER_PREEMPTIONS, replica["worker_id"]),
    }
