"""What OpenTelemetry's SDK exports of a request: by both servers, traced or not."""

import contextlib

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.router_servers import RouterServers, refusal_of

from cluster.tracing import OTelTracing
from core.config import TracingConfig
from core.trace import NoTracing, TraceContext
from protos.baton.v1 import generation_pb2 as pb
from router.access.credentials import new_key
from router.observe import spans

CALLER = TraceContext(0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7)
UNSAMPLED = TraceContext(0xC, 0xD, flags=0)
TIERS = {
    "interactive": {"tokens_per_minute": 1000},
    "batch": {"max_ttft_s": 30.0, "prompt_price_per_mtok": 1e6},
}
BODY = {"prompt": "abc", "max_tokens": 5, "service_tier": "flex", "temperature": 0.5}


@contextlib.asynccontextmanager
async def traced(folder):
    """Servers of one key, and what they have exported once the block ends; no worker is there."""
    found = []
    exporter = InMemorySpanExporter()
    keys = {"acme": new_key("acme", "interactive", tenant_class="gold")}
    async with RouterServers(folder, keys=keys, tiers=TIERS, classes=("gold",)).opened() as servers:
        config = TracingConfig(otlp_endpoint="http://nowhere")
        tracing = OTelTracing(config, "baton-router", exporter)
        servers.orchestrator.tracing = tracing
        yield servers, found
        tracing.close()
        found.extend(exporter.get_finished_spans())


async def ask(servers, server, caller):
    """Send a request that finds no worker, as a part of the caller's trace."""
    if server == "http":
        headers = {"traceparent": caller.traceparent, "tracestate": "vendor=1"}
        async with servers.web("acme") as http:
            assert (await http.post("/v1/completions", json=BODY, headers=headers)).is_server_error
        return
    message = pb.GenerateRequest(text="abc", service_tier="flex")
    message.stopping.max_tokens = 5
    message.sampling.temperature = 0.5
    call = servers.call(
        "Generate", message, "acme", traceparent=caller.traceparent, tracestate="vendor=1"
    )
    assert await refusal_of(call) == "UNAVAILABLE"


@pytest.mark.parametrize("server", ["http", "grpc"])
async def test_a_trace_tells_whose_a_request_was_what_it_was_charged_and_how_it_ended(
    tmp_path, server
):
    async with traced(tmp_path) as (servers, found):
        await ask(servers, server, CALLER)
    [span] = found
    assert span.name == "gateway.request"
    assert span.context.trace_id == CALLER.trace_id and span.parent.span_id == CALLER.span_id
    assert span.resource.attributes["service.name"] == "baton-router"
    told = dict(span.attributes)
    assert told["baton.tier"] == "batch" and told["baton.tier.asked"] == "flex"
    assert told["baton.tenant_class"] == "gold"
    # The prompt with its first special token, and `max_tokens`.
    assert told["baton.quota.charged_tokens"] == 4 + 5
    assert told["baton.cost"] == 4.0
    assert told["baton.admission.wait_ms"] >= 0
    assert told["baton.outcome"] == "failed" and told["error.type"] == "no_worker"
    assert told["gen_ai.request.temperature"] == 0.5 and told["gen_ai.request.max_tokens"] == 5
    assert told["gen_ai.usage.input_tokens"] == 4
    assert told["gen_ai.response.finish_reasons"] == ()
    assert "acme" not in str(told), "a tenant's name is the log's"
    [attempt] = span.events
    assert attempt.name == "baton.attempt"
    assert attempt.attributes["baton.epoch"] == 0
    assert attempt.attributes["baton.outcome"] == "no_worker"
    assert attempt.attributes["baton.workers"] == ()
    assert span.start_time <= attempt.timestamp <= span.end_time


@pytest.mark.parametrize("is_on", [False, True])
async def test_nothing_is_made_for_a_span_that_nobody_records(tmp_path, monkeypatch, is_on):
    """Tracing is off, or the caller is not sampled."""
    made = []
    for name in ("_gen_ai", "_caller", "_admission", "_placement", "_ending"):
        monkeypatch.setattr(spans, name, lambda *_, name=name: made.append(name) or {})
    async with traced(tmp_path) as (servers, found):
        traces = servers.service._runner.tracing
        if not is_on:
            servers.orchestrator.tracing = NoTracing()
        await ask(servers, "http", UNSAMPLED if is_on else CALLER)
        assert made == []
        servers.orchestrator.tracing = traces
        await ask(servers, "http", CALLER)
    assert len(made) == 5 and len(found) == 1, "the test would see it"
