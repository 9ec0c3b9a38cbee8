"""The `Tracing` port over the OpenTelemetry SDK, exporting with OTLP.

Owns the provider, the sampler and the exporter of one process. Does not know what is traced.
Attribute names follow OpenTelemetry's GenAI conventions as of semconv 1.37 (status: Development).
"""

from __future__ import annotations

import time
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)

from core.config import TracingConfig
from core.trace import Attributes, NoTracing, Span, TraceContext, Tracing

SCHEMA_URL = "https://opentelemetry.io/schemas/1.37.0"


class _OTelSpan:
    """An open span of the SDK."""

    def __init__(self, span: trace.Span, state: str, offset_ns: int) -> None:
        """Wrap a span; `offset_ns` is from the monotonic clock to Unix time."""
        self._span = span
        self._state = state
        self._offset_ns = offset_ns

    @property
    def context(self) -> TraceContext | None:
        """Parent of child spans, here and in workers."""
        c = self._span.get_span_context()
        return TraceContext(c.trace_id, c.span_id, int(c.trace_flags), self._state)

    @property
    def is_recorded(self) -> bool:
        """False for one that is not sampled."""
        return self._span.is_recording()

    def event(self, name: str, at_s: float, attributes: Attributes) -> None:
        """Add an event."""
        self._span.add_event(name, dict(attributes), int(at_s * 1e9) + self._offset_ns)

    def end(self, end_s: float, attributes: Attributes, error: str = "") -> None:
        """End the span."""
        self._span.set_attributes(dict(attributes))
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(int(end_s * 1e9) + self._offset_ns)


class OTelTracing:
    """Spans to a collector."""

    def __init__(
        self, config: TracingConfig, service: str, exporter: SpanExporter | None = None
    ) -> None:
        """Start the exporter's thread; without `exporter`, spans go to the config's collector."""
        exporter = exporter or _collector(config)
        resource = Resource.create({"service.name": service}, SCHEMA_URL)
        # The caller's decision holds: half a trace explains nothing.
        sampler = ParentBased(TraceIdRatioBased(config.sample_ratio))
        self._provider = TracerProvider(resource=resource, sampler=sampler)
        # In a thread of its own, in batches: a slow collector must cost no request anything.
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
        self._tracer = self._provider.get_tracer("baton", schema_url=SCHEMA_URL)
        # Taken once: spans of one process then keep their distances when the wall clock is set.
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def open(self, name: str, parent: TraceContext | None, start_s: float) -> Span:
        """Begin a span."""
        context: Any = None
        if parent is not None:
            flags = TraceFlags(parent.flags)
            state = TraceState.from_header([parent.state] if parent.state else [])
            remote = SpanContext(
                parent.trace_id,
                parent.span_id,
                is_remote=True,
                trace_flags=flags,
                trace_state=state,
            )
            context = trace.set_span_in_context(NonRecordingSpan(remote))
        span = self._tracer.start_span(
            name, context, start_time=int(start_s * 1e9) + self._offset_ns
        )
        return _OTelSpan(span, parent.state if parent else "", self._offset_ns)

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()


def _collector(config: TracingConfig) -> SpanExporter:
    # Here, as it is loaded only with an endpoint.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )

    is_plain = not config.otlp_endpoint.startswith("https://")
    return OTLPSpanExporter(endpoint=config.otlp_endpoint, insecure=is_plain, timeout=5)


def make_tracing(config: TracingConfig, service: str) -> Tracing:
    """Make the process's tracing: silent without an endpoint."""
    return OTelTracing(config, service) if config.otlp_endpoint else NoTracing()
