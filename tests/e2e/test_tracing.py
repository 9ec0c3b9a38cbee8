"""Spans reach a real OTLP collector, in one trace from the caller
through the router into both workers."""

import time
from concurrent import futures

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from support.up import Up

from core.trace import parse_trace
from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span with the name of the service it came from."""

    def __init__(self):
        self.spans = []

    def Export(self, request, context):
        for part in request.resource_spans:
            service = next(
                a.value.string_value for a in part.resource.attributes if a.key == "service.name"
            )
            self.spans += [(service, span) for scope in part.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of_trace(self, trace_id, count, timeout_s=15):
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            found = [(s, span) for s, span in self.spans if span.trace_id.hex() == trace_id]
            if len(found) >= count:
                return found
            time.sleep(0.1)
        raise AssertionError([(s, span.name, span.trace_id.hex()) for s, span in self.spans])

    def root(self, trace_id, timeout_s=15):
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            for _, span in self.spans:
                if span.trace_id.hex() == trace_id and span.name == "gateway.request":
                    return span
            time.sleep(0.1)
        raise AssertionError(f"no root span of {trace_id}")


@pytest.fixture(scope="module")
def traced():
    collector, server = Collector(), grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    up = Up(
        "--local",
        BATON_PLACEMENT__PATH="pd",
        BATON_TRACING__OTLP_ENDPOINT=f"http://127.0.0.1:{port}",
    )
    yield up, collector
    code, left = up.end()
    server.stop(0)
    assert code == 0 and not left


def check(found):
    by_name = {span.name: (service, span) for service, span in found}
    assert set(by_name) == {
        "gateway.request",
        "worker.prefill",
        "prefill.queue",
        "prefill.compute",
        "kv.send",
        "worker.decode",
        "kv.wait",
        "kv.receive",
        "decode.generate",
    }
    service, root = by_name["gateway.request"]
    assert service == "baton-router" and root.parent_span_id.hex() == PARENT
    for name, service in (("worker.prefill", "baton-prefill"), ("worker.decode", "baton-decode")):
        assert by_name[name][0] == service and by_name[name][1].parent_span_id == root.span_id
    for parent, names in (
        ("worker.prefill", ("prefill.queue", "prefill.compute", "kv.send")),
        ("worker.decode", ("kv.wait", "kv.receive", "decode.generate")),
    ):
        spans = [by_name[name][1] for name in names]
        assert all(s.parent_span_id == by_name[parent][1].span_id for s in spans)
        assert [s.start_time_unix_nano for s in spans] == sorted(
            s.start_time_unix_nano for s in spans
        )
    for (
        _,
        span,
    ) in found:  # clocks of one machine: everything lies within the request, give or take a message
        assert (
            root.start_time_unix_nano - 5e7 <= span.start_time_unix_nano <= span.end_time_unix_nano
        )
        assert span.end_time_unix_nano <= root.end_time_unix_nano + 5e8
    return {a.key: a.value for a in root.attributes}


def test_a_request_over_http_is_one_trace(traced):
    up, collector = traced
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 0}
    httpx.post(f"{up.url}/v1/chat/completions", json=body, headers=HEADERS).raise_for_status()
    attributes = check(collector.of_trace(TRACE, 9))
    assert attributes["gen_ai.operation.name"].string_value == "chat"
    assert (
        attributes["gen_ai.usage.output_tokens"].int_value == 6
        and attributes["baton.path"].string_value == "pd"
    )
    assert attributes["baton.tier"].string_value == "standard"
    assert attributes["baton.tenant_class"].string_value == "default"
    assert attributes["baton.outcome"].string_value == "finished"
    reasons = attributes["gen_ai.response.finish_reasons"].array_value.values
    assert [reason.string_value for reason in reasons] == ["length"]
    root = collector.root(TRACE)
    assert root.trace_state == "vendor=1"
    [attempt] = root.events
    told = {a.key: a.value for a in attempt.attributes}
    assert attempt.name == "baton.attempt" and told["baton.outcome"].string_value == "ok"
    assert len(told["baton.workers"].array_value.values) == 2
    assert root.start_time_unix_nano <= attempt.time_unix_nano <= root.end_time_unix_nano


def test_a_request_over_grpc_is_one_trace_and_a_failed_one_says_why(traced):
    up, collector = traced
    other, third = "a" * 32, "b" * 32
    with grpc.insecure_channel(up.grpc) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        request = pb.GenerateRequest(
            text="import os", stopping=pb.StoppingOptions(max_tokens=5, ignore_eos=True)
        )
        stub.Generate(request, metadata=(("traceparent", f"00-{other}-{PARENT}-01"),))
        check(collector.of_trace(other, 9))
        request.stopping.max_tokens, request.request_id = 1500, "to-cut"
        call = stub.GenerateStream(request, metadata=(("traceparent", f"00-{third}-{PARENT}-01"),))
        next(call)
        stub.Abort(pb.AbortRequest(request_id="to-cut"))
        with pytest.raises(grpc.RpcError):
            list(call)
    root = collector.root(third)
    assert {a.key: a.value.string_value for a in root.attributes}[
        "error.type"
    ] == "cancelled" and root.status.code == 2


def test_an_unsampled_caller_is_not_traced(traced):
    up, collector = traced
    unsampled = "c" * 32
    headers = {"traceparent": f"00-{unsampled}-{PARENT}-00"}
    httpx.post(
        f"{up.url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, headers=headers
    ).raise_for_status()
    headers = {"traceparent": "00-" + "d" * 32 + f"-{PARENT}-01"}
    httpx.post(
        f"{up.url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, headers=headers
    ).raise_for_status()
    collector.of_trace("d" * 32, 5)
    assert not [s for _, s in collector.spans if s.trace_id.hex() == unsampled]


def test_malformed_trace_headers_are_ignored(traced):
    up, _ = traced
    for value in (
        "",
        "x",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-x",
        "\x80" * 55,
    ):
        assert parse_trace(value) is None
        headers = {"traceparent": value.encode("latin1")}
        assert (
            httpx.post(
                f"{up.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=headers
            ).status_code
            == 200
        )
    assert parse_trace(f"00-{TRACE}-{PARENT}-01").traceparent == f"00-{TRACE}-{PARENT}-01"
    assert parse_trace(f"01-{TRACE}-{PARENT}-01-future").trace_id == int(TRACE, 16)
