"""Gaps between tokens, counted as a Prometheus histogram.

Owns the counts, by one label. Does not know requests. OpenTelemetry's histogram takes one number at
a time and looks up its labels for each: a request has a gap for every token, and all of them come
at its end, while other streams wait for the loop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from core.metrics import Metric


class GapHistogram(Collector):
    """One histogram; nothing is shown of a label before its first gap."""

    def __init__(self, metric: Metric, bounds_s: Sequence[float]) -> None:
        """Start empty.

        Args:
            metric: Its name, and its one label.
            bounds_s: Upper bounds of the buckets, rising; what is above them all counts, too.
        """
        self._metric = metric
        self._bounds_s = bounds_s
        self._edges = [*map(str, bounds_s), "+Inf"]
        self._counts: dict[str, list[int]] = {}
        self._sums_s: dict[str, float] = {}

    def record(self, label: str, gaps_s: Sequence[float]) -> None:
        """Count the gaps of one request."""
        if not gaps_s:
            return
        counts = self._counts.setdefault(label, [0] * len(self._edges))
        for gap_s in gaps_s:
            counts[bisect_left(self._bounds_s, gap_s)] += 1
        self._sums_s[label] = self._sums_s.get(label, 0.0) + sum(gaps_s)

    def collect(self) -> Iterator[Family]:
        """Yield the histogram, as it is scraped."""
        metric = self._metric
        family = HistogramMetricFamily(metric.name, metric.description, labels=metric.labels)
        for label, counts in self._counts.items():
            buckets = list(zip(self._edges, accumulate(counts), strict=True))
            family.add_metric((label,), buckets, self._sums_s[label])
        if family.samples:
            yield family
