"""What operators see of the router's view of the prefix index.

Owns the gauges made from its report, and the report of a router that has none. Does not know where
entries come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from core import metrics

ReadReport = Callable[[], dict[str, Any]]
REASONS = ("forged", "malformed", "version")


def no_report() -> dict[str, Any]:
    """Report of a router without a store."""
    return {
        "state": "off",
        "age_s": 0.0,
        "lag_s": 0.0,
        "entries": 0,
        "leaving": 0,
        "gaps": 0,
        "refused": {},
        "workers": {},
    }


def gauges_of(read: ReadReport) -> dict[metrics.Metric, Callable[[], Mapping[str, float]]]:
    """Return how each gauge of the index is read."""
    return {
        metrics.PREFIX_ENTRIES: lambda: {"": read()["entries"]},
        metrics.PREFIX_AGE: lambda: {"": read()["age_s"]},
        metrics.PREFIX_LAG: lambda: {"": read()["lag_s"]},
        metrics.PREFIX_REFUSED: lambda: dict.fromkeys(REASONS, 0) | read()["refused"],
        metrics.PREFIX_GAPS: lambda: {"": read()["gaps"]},
    }
