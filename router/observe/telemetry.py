"""Counts and times of the router, on the OpenTelemetry SDK, shown as Prometheus text.

Owns the instruments made from `core.metrics`. Records per request, never per token. Does not know
HTTP or gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
from prometheus_client import CollectorRegistry, generate_latest

from core import metrics
from core.config import TierConfig, default_tiers
from core.config.transfer import TRANSPORTS
from core.errors import ServingError, Unauthenticated, all_errors
from core.session import FetchOutcome
from core.timeline import Timeline
from core.types import Path, RequestEnded, RequestTiming, Usage
from router.calls import ADDRESS_CLASSES, Call, outcome_of
from router.observe import attainment
from router.observe.gap_histogram import GapHistogram
from router.prefix_outcome import HIT_TIERS, STALE_CAUSES, PromptOutcome, TokenOutcome
from router.refusals import CODES, OTHER
from router.request_state import RequestState

FETCH_OUTCOMES = tuple(outcome.value for outcome in FetchOutcome)
Labelled = Callable[[], Mapping[tuple[str, ...], float]]
"""Reads a gauge: its number by the values of its labels, in their order."""
ReadGauge = Callable[[], Mapping[str, float]] | Labelled
"""Of a gauge with one label at most: by its value, or ""."""


class Telemetry:
    """The router's instruments."""

    def __init__(
        self,
        gauges: Mapping[metrics.Metric, ReadGauge],
        tiers: Mapping[str, TierConfig] | None = None,
    ) -> None:
        """Make every instrument, and show every label at zero.

        Args:
            gauges: How each gauge is read.
            tiers: Every tier by its name; None: those that every cluster has.
        """
        self._tiers = default_tiers() if tiers is None else tiers
        self._registry = CollectorRegistry()
        reader = PrometheusMetricReader(
            # Both would be series of constants, and a label on every other.
            disable_target_info=True,
            scope_info_enabled=False,
            registry=self._registry,
        )
        buckets = ExplicitBucketHistogramAggregation(metrics.LATENCY_BUCKETS_S)
        views = [
            View(instrument_name=m.name, aggregation=buckets)
            for m in metrics.ALL
            if m.kind == "histogram"
        ]
        self._provider = MeterProvider(metric_readers=[reader], views=views)
        meter = self._provider.get_meter("baton")
        # The exporter appends `_total` to counters itself.
        self._counters = {
            m: meter.create_counter(m.name.removesuffix("_total"), description=m.description)
            for m in metrics.ALL
            if m.kind == "counter"
        }
        self._histograms = {
            m: meter.create_histogram(m.name, description=m.description)
            for m in metrics.ALL
            if m.kind == "histogram" and m is not metrics.ITL
        }
        self._gaps = GapHistogram(metrics.ITL, metrics.LATENCY_BUCKETS_S)
        self._registry.register(self._gaps)
        for metric, read in gauges.items():
            meter.create_observable_gauge(
                metric.name, [_observer(metric, read)], description=metric.description
            )
        self._show_zeros()

    def _show_zeros(self) -> None:
        """Begin every label of every counter: before its first increase it would have no rate."""
        self._show_zeros_of_tiers()
        for outcome in metrics.OUTCOMES:
            self._counters[metrics.REQUESTS].add(0, {"outcome": outcome})
        for code in sorted({error.code for error in all_errors() if error.is_retryable}):
            self._counters[metrics.RETRIES].add(0, {"reason": code})
        for path in Path:
            self._counters[metrics.ATTEMPTS].add(0, {"path": path.value})
        for server in ("http", "grpc"):
            for code in sorted(CODES):
                self._counters[metrics.REFUSALS].add(0, {"server": server, "code": code})
            for code in sorted({error.code for error in all_errors()}):
                self._counters[metrics.ERRORS].add(0, {"server": server, "code": code})
        for client in ADDRESS_CLASSES:
            self._counters[metrics.BAD_KEYS].add(0, {"client": client})
        for outcome in FETCH_OUTCOMES:
            self._counters[metrics.PREFIX_FETCHES].add(0, {"outcome": outcome})
        for transport in TRANSPORTS:
            self._counters[metrics.TRANSFERS].add(0, {"transport": transport})
        for outcome in TokenOutcome:
            self._counters[metrics.PREFIX_TOKENS].add(0, {"outcome": outcome.value})
        for storage in HIT_TIERS:
            self._counters[metrics.PREFIX_STORAGE_TOKENS].add(0, {"storage": storage})
        for cause in STALE_CAUSES:
            self._counters[metrics.STALE_PLACEMENTS].add(0, {"cause": cause.value})
        for metric in (metrics.KV_BYTES, metrics.FRAGMENTS_RESENT, metrics.QUOTA_LOCAL_DECISIONS):
            self._counters[metric].add(0)

    def _show_zeros_of_tiers(self) -> None:
        for tier in self._tiers:
            for result in attainment.RESULTS:
                self._counters[metrics.SLO_REQUESTS].add(0, {"tier": tier, "result": result})
            for metric in (
                metrics.PROMPT_TOKENS,
                metrics.OUTPUT_TOKENS,
                metrics.CACHED_TOKENS,
                metrics.COST,
            ):
                self._counters[metric].add(0, {"tier": tier})

    def request_ended(self, run: RequestState, ended: RequestEnded, server: str = "") -> None:
        """Record a request that ran."""
        self._counters[metrics.REQUESTS].add(1, {"outcome": outcome_of(ended.error)})
        if ended.error is not None:
            self._counters[metrics.ERRORS].add(1, {"server": server, "code": ended.error.code})
        tier = run.request.tier
        result = attainment.result_of(self._tiers[tier], run.timeline, ended.error)
        self._count_result(tier, result)
        self._count_tokens(tier, ended.usage)
        self._count_transfers(ended.timing)
        self._note_times(tier, run.timeline, ended.timing)
        self._note_placement(ended.timing)

    def _count_tokens(self, tier: str, usage: Usage) -> None:
        labels = {"tier": tier}
        self._counters[metrics.PROMPT_TOKENS].add(usage.prompt_tokens, labels)
        self._counters[metrics.OUTPUT_TOKENS].add(usage.completion_tokens, labels)
        self._counters[metrics.CACHED_TOKENS].add(usage.cached_tokens, labels)
        if usage.cost is not None:
            self._counters[metrics.COST].add(usage.cost, labels)

    def _count_transfers(self, timing: RequestTiming) -> None:
        """Count attempts, and what they moved between workers."""
        self._counters[metrics.KV_BYTES].add(timing.kv_bytes)
        self._counters[metrics.FRAGMENTS_RESENT].add(timing.kv_fragments_resent)
        if timing.fetch_outcome:
            # Bounded here: the word comes from a worker, perhaps of another version.
            known = timing.fetch_outcome in FETCH_OUTCOMES
            outcome = timing.fetch_outcome if known else "failed"
            self._counters[metrics.PREFIX_FETCHES].add(1, {"outcome": outcome})
        if timing.kv_transport:
            transport = timing.kv_transport if timing.kv_transport in TRANSPORTS else "other"
            self._counters[metrics.TRANSFERS].add(1, {"transport": transport})
        if timing.path:
            self._counters[metrics.ATTEMPTS].add(
                max(1, len(timing.attempts)), {"path": timing.path}
            )

    def _note_times(self, tier: str, line: Timeline, timing: RequestTiming) -> None:
        labels = {"tier": tier}
        if line.ttft_s is not None:
            self._histograms[metrics.TTFT].record(line.ttft_s, labels)
        if line.e2e_s is not None:
            self._histograms[metrics.E2E].record(line.e2e_s)
            for phase, seconds in timing.phases().items():
                self._histograms[metrics.PHASE].record(seconds, {"phase": phase})
        self._gaps.record(tier, line.itl_s)

    def _note_placement(self, timing: RequestTiming) -> None:
        """Record how far a prediction was off; histograms take nothing below zero."""
        error_s = timing.placement_error_s
        if error_s is not None:
            labels = {"path": timing.path, "direction": "late" if error_s > 0 else "early"}
            self._histograms[metrics.PLACEMENT_ERROR].record(abs(error_s), labels)
        if timing.placement_regret_s is not None:
            regret_s = max(0.0, timing.placement_regret_s)
            self._histograms[metrics.PLACEMENT_REGRET].record(regret_s, {"path": timing.path})

    def prompt_computed(self, outcome: PromptOutcome) -> None:
        """Record what of a prompt was cached."""
        for name, num_tokens in outcome.tokens.items():
            self._counters[metrics.PREFIX_TOKENS].add(num_tokens, {"outcome": name.value})
        for tier, num_tokens in outcome.hit_tokens.items():
            self._counters[metrics.PREFIX_STORAGE_TOKENS].add(num_tokens, {"storage": tier})
        if outcome.cause is not None:
            self._counters[metrics.STALE_PLACEMENTS].add(1, {"cause": outcome.cause.value})

    def call_refused(self, call: Call) -> None:
        """Record a call that ended before it had a request."""
        if call.outcome:
            self._counters[metrics.REQUESTS].add(1, {"outcome": call.outcome})
        self._count_refusal(call.server, call.code)
        self._count_result(call.tier, attainment.result_of_call(call))
        if call.code == Unauthenticated.code:
            self._counters[metrics.BAD_KEYS].add(1, {"client": call.client})

    def request_refused(self, tier: str, error: ServingError, server: str = "") -> None:
        """Record a request that ended before it ran."""
        self._counters[metrics.REQUESTS].add(1, {"outcome": outcome_of(error)})
        self._count_refusal(server, error.code)
        self._count_result(tier, attainment.result_of_refusal(error))

    def _count_refusal(self, server: str, code: str) -> None:
        # Labels are a closed set: what is not in it must not become a series of its own.
        label = code if code in CODES else OTHER.code
        self._counters[metrics.REFUSALS].add(1, {"server": server, "code": label})

    def _count_result(self, tier: str, result: str) -> None:
        # A call without a key has no tier.
        if result and tier in self._tiers:
            self._counters[metrics.SLO_REQUESTS].add(1, {"tier": tier, "result": result})

    def quota_decided_locally(self) -> None:
        """Record a decision on a quota without the store."""
        self._counters[metrics.QUOTA_LOCAL_DECISIONS].add(1)

    def retried(self, error: ServingError) -> None:
        """Record an attempt caused by a fault."""
        self._counters[metrics.RETRIES].add(1, {"reason": error.code})

    def text(self) -> bytes:
        """Render the Prometheus exposition."""
        return generate_latest(self._registry)

    def close(self) -> None:
        """Stop collecting."""
        self._provider.shutdown()


def _observer(
    metric: metrics.Metric, read: ReadGauge
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(_: CallbackOptions) -> Iterable[Observation]:
        return [
            # Without labels there is none to pair the empty value with.
            Observation(value, dict(zip(metric.labels, _values(labels), strict=False)))
            for labels, value in read().items()
        ]

    return observe


def _values(labels: str | tuple[str, ...]) -> tuple[str, ...]:
    return (labels,) if isinstance(labels, str) else labels
