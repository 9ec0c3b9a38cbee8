"""Counts and times of the router, on the OpenTelemetry SDK, shown as Prometheus text.

Owns the instruments made from `core.metrics`. Records per request, never per token. Does not know
doors. Called by `router.service`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
from prometheus_client import CollectorRegistry, generate_latest

from core import metrics
from core.errors import Cancelled, ClientError, Overloaded, RateLimited, ServingError
from core.types import RequestEnded
from router.request_run import RequestRun


class Telemetry:
    """The router's instruments."""

    def __init__(self, gauges: dict[metrics.Metric, Callable[[], dict[str, int]]]) -> None:
        """Make every instrument and show every label pair at zero.

        Args:
            gauges: For each gauge a function that reads it: label value (or "") to number.
        """
        self._registry = CollectorRegistry()
        self._reader = PrometheusMetricReader(
            disable_target_info=True, scope_info_enabled=False, registry=self._registry
        )
        buckets = ExplicitBucketHistogramAggregation(metrics.LATENCY_BUCKETS_S)
        views = [
            View(instrument_name=m.name, aggregation=buckets)
            for m in metrics.ALL
            if m.kind == "histogram"
        ]
        self._provider = MeterProvider(metric_readers=[self._reader], views=views)
        meter = self._provider.get_meter("baton")
        # The exporter appends `_total` to counters itself.
        self._counters = {
            m: meter.create_counter(m.name.removesuffix("_total"), description=m.description)
            for m in metrics.ALL if m.kind == "counter"
        }  # fmt: skip
        self._histograms = {
            m: meter.create_histogram(m.name, description=m.description)
            for m in metrics.ALL
            if m.kind == "histogram"
        }
        for metric, read in gauges.items():
            meter.create_observable_gauge(
                metric.name, [_observer(metric, read)], description=metric.description
            )
        for outcome in metrics.OUTCOMES:
            self._counters[metrics.REQUESTS].add(0, {"outcome": outcome})
        for path in ("pd", "local"):
            self._counters[metrics.ATTEMPTS].add(0, {"path": path})
        for transport in ("shm", "grpc"):
            self._counters[metrics.TRANSFERS].add(0, {"transport": transport})
        plain = (
            metrics.PROMPT_TOKENS,
            metrics.OUTPUT_TOKENS,
            metrics.CACHED_TOKENS,
            metrics.KV_BYTES,
            metrics.HEALED,
        )
        for metric in plain:
            self._counters[metric].add(0)

    def request_ended(self, run: RequestRun, ended: RequestEnded) -> None:
        """Record one request, whole."""
        line, anatomy, usage = run.timeline, ended.anatomy, ended.usage
        self._counters[metrics.REQUESTS].add(1, {"outcome": _outcome(ended.error)})
        self._counters[metrics.PROMPT_TOKENS].add(usage.prompt_tokens)
        self._counters[metrics.OUTPUT_TOKENS].add(usage.completion_tokens)
        self._counters[metrics.CACHED_TOKENS].add(usage.cached_tokens)
        self._counters[metrics.KV_BYTES].add(anatomy.kv_bytes)
        self._counters[metrics.HEALED].add(anatomy.kv_parts_healed)
        if anatomy.kv_transport:
            self._counters[metrics.TRANSFERS].add(1, {"transport": anatomy.kv_transport})
        if anatomy.path:
            self._counters[metrics.ATTEMPTS].add(
                max(1, len(anatomy.attempts)), {"path": anatomy.path}
            )
        if line.ttft_s is not None:
            self._histograms[metrics.TTFT].record(line.ttft_s)
        if line.e2e_s is not None:
            self._histograms[metrics.E2E].record(line.e2e_s)
            for phase, seconds in anatomy.phases().items():
                self._histograms[metrics.PHASE].record(seconds, {"phase": phase})
        for gap_s in line.itl_s:
            self._histograms[metrics.ITL].record(gap_s)

    def retried(self, error: ServingError) -> None:
        """Record an attempt caused by a fault."""
        self._counters[metrics.RETRIES].add(1, {"reason": error.code})

    def text(self) -> bytes:
        """Render the Prometheus exposition."""
        return generate_latest(self._registry)

    def close(self) -> None:
        """Stop collecting."""
        self._provider.shutdown()


def _outcome(error: ServingError | None) -> str:
    if error is None:
        return "finished"
    if isinstance(error, Cancelled):
        return "cancelled"
    return "rejected" if isinstance(error, (ClientError, Overloaded, RateLimited)) else "failed"


def _observer(
    metric: metrics.Metric, read: Callable[[], dict[str, int]]
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(_: CallbackOptions) -> Iterable[Observation]:
        label = metric.labels[0] if metric.labels else ""
        return [Observation(value, {label: key} if label else {}) for key, value in read().items()]

    return observe
