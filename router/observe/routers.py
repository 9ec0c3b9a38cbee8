"""The routers of the cluster: where each listens, and where Prometheus finds its metrics.

Owns the list and its form for Prometheus' HTTP service discovery. Does not know who keeps the list.

Routers of one machine share the port of their HTTP servers, so a scrape of it reaches any of them.
Each shows its own counters on a port of its own, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from core.addresses import join_address


@dataclass(frozen=True, slots=True)
class RouterEntry:
    """Where one router listens."""

    router_id: str
    pid: int
    host: str
    """Of all its ports; empty: any address of its machine, which is that of whoever tells."""
    http_port: int
    grpc_port: int
    metrics_port: int


class RouterList:
    """The routers that one of them knows of: itself, and what it was told last."""

    def __init__(self, num_configured: int = 1) -> None:
        """Start empty; `num_configured` is how many there should be."""
        self._num_configured = num_configured
        self._own: RouterEntry | None = None
        self._told: tuple[RouterEntry, ...] = ()

    def listens(self, own: RouterEntry) -> None:
        """Note where this router listens."""
        self._own = own

    def update(self, told: Iterable[RouterEntry]) -> None:
        """Replace what is known of the others."""
        self._told = tuple(told)

    def entries(self, reached_at: str = "") -> list[RouterEntry]:
        """List every router, in the order of ids.

        Args:
            reached_at: Host by which whoever asks has reached this router.
        """
        own = () if self._own is None else (self._own,)
        # Its own entry last: what it was told may be of its life before.
        found = {entry.router_id: entry for entry in (*self._told, *own)}
        return [
            replace(entry, host=entry.host or reached_at)
            for _, entry in sorted(found.items(), key=lambda item: item[0])
        ]

    def shown(self, reached_at: str) -> list[dict[str, Any]]:
        """Describe every router, for `baton status`."""
        return [
            {**asdict(entry), "metrics_address": metrics_address(entry)}
            for entry in self.entries(reached_at)
        ]

    def targets(self, reached_at: str) -> list[dict[str, Any]]:
        """List where metrics are, as Prometheus' `http_sd_configs` reads it.

        Workers are no targets: what they report is shown by routers.
        """
        return [
            {
                "targets": [metrics_address(entry)],
                # A `__meta_` label is on no series unless it is asked for: an id is drawn anew at
                # each start, and would begin every series anew.
                "labels": {"__meta_baton_router": entry.router_id},
            }
            for entry in self.entries(reached_at)
        ]

    def num_by_state(self) -> dict[str, int]:
        """Count routers: those that should be, and those that listen as far as this one knows."""
        return {"configured": self._num_configured, "listening": len(self.entries())}


def metrics_address(entry: RouterEntry) -> str:
    """Return the address at which a router shows its own metrics."""
    return join_address(entry.host, entry.metrics_port)
