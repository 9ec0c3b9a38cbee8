"""Every call that a server refuses is told once: a line with who, from where and why, and a count.

Here too: what each kind of key may do, and that tenants with equal request ids never meet.
"""

import asyncio
import json
from dataclasses import replace

import pytest
from support.byte_tokenizer import REFUSED_TEXT
from support.router_servers import RouterServers, answer_of, counted, log_lines, refusal_of, until

from protos.baton.v1 import generation_pb2 as pb
from router import calls
from router.access.identities import Identity, Right
from router.observe import request_log


@pytest.fixture
async def servers(tmp_path):
    async with RouterServers(tmp_path, max_body_bytes=4096).opened() as servers:
        yield servers


def refusals(servers):
    """Every series of refused calls."""
    lines = servers.service.telemetry.text().decode().splitlines()
    found = [line.rpartition(" ") for line in lines if line.startswith("baton_refusals_total{")]
    return {series: float(value) for series, _, value in found}


POST = "/v1/completions"


BODY = {"prompt": "abc", "max_tokens": 3}


HTTP_REFUSALS = {
    "no key": (None, "GET", "/v1/models", None, 401, "invalid_api_key", "/v1/models"),
    "a wrong role": ("acme", "GET", "/replicas", None, 403, "permission_denied", "/replicas"),
    "no such path": ("acme", "GET", "/v2/x", None, 404, "unsupported_endpoint", ""),
    "no such method": ("acme", "DELETE", "/v1/models", None, 405, "method_not_allowed", None),
    "another model": ("acme", "POST", POST, {**BODY, "model": "x"}, 404, "model_not_found", POST),
    "no such model": ("acme", "GET", "/v1/models/x", None, 404, "model_not_found", None),
    "no such request": ("acme", "GET", "/explain/x", None, 404, "request_not_found", None),
    "a bad value": ("acme", "POST", POST, {**BODY, "n": -1}, 400, "invalid_value", POST),
    "no json": ("acme", "POST", POST, b"{", 400, "invalid_value", POST),
    "too long": ("acme", "POST", POST, b" " * 5000, 413, "payload_too_large", POST),
    "the tokenizer": (
        "acme",
        "POST",
        POST,
        {**BODY, "prompt": REFUSED_TEXT},
        400,
        "invalid_value",
        POST,
    ),
    "tokenize": (
        "acme",
        "POST",
        "/tokenize",
        {"prompt": REFUSED_TEXT},
        400,
        "invalid_value",
        "/tokenize",
    ),
    "no worker": ("acme", "POST", POST, BODY, 503, "no_worker", None),
    "a stream without a worker": (
        "acme",
        "POST",
        POST,
        {**BODY, "stream": True},
        503,
        "no_worker",
        None,
    ),
}


@pytest.mark.parametrize("case", HTTP_REFUSALS)
async def test_every_refusal_over_http_is_one_line_and_one_count(servers, case):
    name, method, path, body, status, code, route = HTTP_REFUSALS[case]
    content = body if isinstance(body, bytes) or body is None else json.dumps(body)
    with log_lines() as lines:
        async with servers.web(name, "10.1.2.3") as http:
            reply = await http.request(method, path, content=content)
    assert reply.status_code == status and reply.json()["error"]["code"] == code
    assert len(lines) == 1, lines
    line = lines[0]
    tenant, tier = (name, "batch") if name else ("", "")
    assert (line["outcome"], line["tenant"], line["tier"]) == (code, tenant, tier)
    assert (line["server"], line["client"]) == ("http", "private") and "10.1.2.3" not in str(line)
    assert line["time"].endswith("+00:00")
    ran = code == "no_worker"
    assert line["event"] == ("request" if ran else "refusal")
    assert route is None or line["route"] == route
    assert counted(servers, "baton_refusals_total", server="http", code=code) == (not ran)
    outcome = "failed" if ran else "rejected"
    assert counted(servers, "baton_requests_total", outcome=outcome) == 1


GENERATE = pb.GenerateRequest(text="abc", stopping=pb.StoppingOptions(max_tokens=3))


GRPC_REFUSALS = {
    "no key": (None, "Generate", GENERATE, "UNAUTHENTICATED", "invalid_api_key"),
    "no key to a stream": (None, "Chat", pb.ChatRequest(), "UNAUTHENTICATED", "invalid_api_key"),
    "a wrong role": ("scraper", "Generate", GENERATE, "PERMISSION_DENIED", "permission_denied"),
    "a wrong role to a stream": (
        "scraper",
        "GenerateStream",
        GENERATE,
        "PERMISSION_DENIED",
        "permission_denied",
    ),
    "another model": (
        "acme",
        "Generate",
        pb.GenerateRequest(text="a", model="x"),
        "NOT_FOUND",
        "model_not_found",
    ),
    "no input": (
        "acme",
        "GenerateStream",
        pb.GenerateRequest(),
        "INVALID_ARGUMENT",
        "invalid_value",
    ),
    "the tokenizer": (
        "acme",
        "Generate",
        pb.GenerateRequest(text=REFUSED_TEXT),
        "INVALID_ARGUMENT",
        "invalid_value",
    ),
    "tokenize": (
        "acme",
        "Tokenize",
        pb.TokenizeRequest(text=REFUSED_TEXT),
        "INVALID_ARGUMENT",
        "invalid_value",
    ),
    "detokenize": (
        "acme",
        "Detokenize",
        pb.DetokenizeRequest(token_ids=[9999]),
        "INVALID_ARGUMENT",
        "invalid_value",
    ),
    "too long": (
        "acme",
        "Generate",
        pb.GenerateRequest(text="a" * 5000),
        "RESOURCE_EXHAUSTED",
        "unread",
    ),
    "no worker": ("acme", "Generate", GENERATE, "UNAVAILABLE", "no_worker"),
}


@pytest.mark.parametrize("case", GRPC_REFUSALS)
async def test_every_refusal_over_grpc_is_one_line_and_one_count(servers, case):
    name, method, message, status, code = GRPC_REFUSALS[case]
    with log_lines() as lines:
        assert await refusal_of(servers.call(method, message, name)) == status
        await until(lambda: lines)
        await asyncio.sleep(0.05)
    assert len(lines) == 1, lines
    line = lines[0]
    tenant, tier = (name, "batch") if name else ("", "")
    assert (line["outcome"], line["tenant"], line["tier"]) == (code, tenant, tier)
    assert line["server"] == "grpc"
    assert line["client"] == ("unknown" if code == "unread" else "loopback")
    ran = code == "no_worker"
    assert ran or line["route"] == f"/baton.v1.Generation/{method}"
    assert counted(servers, "baton_refusals_total", server="grpc", code=code) == (not ran)


async def test_a_method_that_is_not_there_is_a_refusal_and_says_so_only_with_a_key(servers):
    call = servers.channel.unary_unary("/baton.v1.Generation/Steal\n{}")
    key = (("authorization", f"Bearer {servers.keys['acme']}"),)
    with log_lines() as lines:
        assert await refusal_of(call(b"")) == "UNAUTHENTICATED"
        assert await refusal_of(call(b"", metadata=key)) == "UNIMPLEMENTED"
        await until(lambda: len(lines) == 2)
    assert [line["outcome"] for line in lines] == ["invalid_api_key", "unsupported_endpoint"]
    assert [line["route"] for line in lines] == ["", ""]


async def test_a_call_that_is_cancelled_before_it_runs_is_told(servers):
    began = asyncio.Event()

    async def encode(text, **options):
        began.set()
        await asyncio.Event().wait()

    servers.service._builder._tokenizer.encode = encode
    with log_lines() as lines:
        call = servers.call("Generate", GENERATE, "acme")
        waiting = asyncio.ensure_future(answer_of(call))
        await began.wait()
        call.cancel()
        await until(lambda: lines)
        await asyncio.gather(waiting, return_exceptions=True)
    assert [line["outcome"] for line in lines] == ["cancelled"]
    assert counted(servers, "baton_requests_total", outcome="cancelled") == 1


async def test_what_is_answered_leaves_no_refusal_and_probes_are_no_requests(servers):
    with log_lines() as lines:
        async with servers.web("acme") as http:
            assert (await http.get("/v1/models")).status_code == 200
            assert (await http.get("/ready")).status_code == 503
            assert (await http.get("/health")).status_code == 200
            assert (await http.post("/tokenize", json={"prompt": "a"})).status_code == 200
        assert (await servers.call("ListModels", pb.ListModelsRequest(), "acme")).models
        assert (await servers.call("Tokenize", pb.TokenizeRequest(text="a"), "acme")).token_ids
        await asyncio.sleep(0.05)
    assert lines == []
    assert set(refusals(servers).values()) == {0.0}


async def test_a_bug_is_a_line_too(servers):
    async def fail(*_):
        raise RuntimeError("boom")

    servers.service._builder.make = fail
    with log_lines() as lines:
        async with servers.web("acme") as http:
            assert (await http.post(POST, json=BODY)).status_code == 500
        assert await refusal_of(servers.call("Generate", GENERATE, "acme")) == "UNKNOWN"
        await until(lambda: len(lines) == 2)
    assert [line["outcome"] for line in lines] == ["internal_error"] * 2
    assert counted(servers, "baton_requests_total", outcome="failed") == 2


async def test_nothing_that_a_client_writes_breaks_a_line_or_adds_a_label(servers):
    servers.service.recorder.call_ended(calls.Call("http", code="never heard of"))
    before = refusals(servers)
    evil = 'x"}\n{"event":"request","tenant":"acme'
    with log_lines() as lines:
        async with servers.web("acme") as http:
            for n in range(40):
                await http.get(f"/{n}/%0a%7b{n}", headers={"x-request-id": f"id{n}"})
                await http.post(POST, json={**BODY, "model": f"{evil}{n}"})
        assert len(lines) == 80 and all("\n" not in json.dumps(line) for line in lines)
        assert not any("event" in str(line["route"]) or evil in str(line) for line in lines)
        text = servers.service.telemetry.text().decode()
        servers.service.recorder.call_ended(calls.Call("http", code="a code of tomorrow"))
    assert refusals(servers).keys() == before.keys(), text


RIGHTS = {
    "/v1/chat/completions": Right.GENERATE,
    "/v1/completions": Right.GENERATE,
    "/tokenize": Right.GENERATE,
    "/prefix-index/explain": Right.GENERATE,
    "/detokenize": Right.GENERATE,
    "/v1/models": Right.ANY_KEY,
    "/v1/models/{model_id:path}": Right.ANY_KEY,
    "/ready": Right.ANY_KEY,
    "/version": Right.ANY_KEY,
    "/openapi.json": Right.ANY_KEY,
    "/docs": Right.ANY_KEY,
    "/docs/oauth2-redirect": Right.ANY_KEY,
    "/load": Right.OBSERVE,
    "/metrics": Right.OBSERVE,
    "/replicas": Right.OBSERVE,
    "/explain/{request_id:path}": Right.ANY_KEY,
}


ALLOWED = {
    Right.ANY_KEY: {"acme", "scraper", "operator"},
    Right.GENERATE: {"acme", "operator"},
    Right.OBSERVE: {"scraper", "operator"},
    Right.OPERATE: {"operator"},
}


async def test_each_key_reaches_the_routes_of_its_role_and_no_other(servers):
    servers.service.status.measure_routes = lambda mib: asyncio.sleep(0, [])
    routes = {
        (method, route.path)
        for route in servers.app.routes
        for method in getattr(route, "methods", None) or ()
        if route.path not in ("/health", "/ping")
    }
    assert len(routes) > 12
    for method, path in sorted(routes):
        right = RIGHTS.get(path) or (Right.OPERATE if method == "POST" else Right.OBSERVE)
        for name in ("acme", "scraper", "operator"):
            async with servers.web(name) as http:
                reply = await http.request(method, path, content=b"{")
            is_refused = reply.status_code == 403
            assert is_refused == (name not in ALLOWED[right]), (method, path, name)


async def test_an_open_cluster_needs_no_role(tmp_path):
    servers = RouterServers(tmp_path, is_open=True)
    async with servers.opened(), servers.web() as http:
        for path in ("/replicas", "/load", "/metrics", "/links", "/v1/models"):
            assert (await http.get(path)).status_code == 200, path
        assert (await http.post("/links", json={"mib": 1})).status_code == 200
        assert (await servers.call("ListModels", pb.ListModelsRequest())).models


async def test_strangers_cannot_fill_the_log_and_hide_no_tenants_line(servers, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(servers.service.recorder._log, "_now_s", lambda: now[0])
    monkeypatch.setattr(servers.service.recorder._log, "_allowed_at", 0.0)
    stranger = calls.Call("http", "192.0.2.7")
    tenant = calls.Call("http", "192.0.2.7", identity=Identity("acme"))
    with log_lines() as lines:
        for _ in range(request_log.ANONYMOUS_BURST + 500):
            servers.service.recorder.call_ended(replace(stranger, code="invalid_api_key"))
        assert len(lines) == request_log.ANONYMOUS_BURST
        servers.service.recorder.call_ended(replace(tenant, code="invalid_value"))
        now[0] += 10.0
        servers.service.recorder.call_ended(replace(stranger, code="invalid_api_key"))
        servers.service.recorder.call_ended(replace(stranger, code="invalid_api_key"))
    assert [line.get("unlogged") for line in lines[-3:]] == [None, 500, None]
    assert [line["tenant"] for line in lines[-3:]] == ["acme", "", ""]
    total = request_log.ANONYMOUS_BURST + 502
    assert counted(servers, "baton_bad_keys_total", client="public") == 0, (
        "192.0.2.0/24 is no place"
    )
    assert counted(servers, "baton_bad_keys_total", client="private") == total
