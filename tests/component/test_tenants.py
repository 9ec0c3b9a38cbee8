"""Tenants with equal request ids never meet."""

import asyncio
from types import SimpleNamespace

import grpc
import grpc.aio
import pytest
from support.router_servers import (
    RouterServers,
    answer_of,
    counted,
    log_lines,
    refusal_of,
    until,
)

from core.types import ChoiceFinished, FinishReason, RequestEnded, TextDelta, Usage
from protos.baton.v1 import generation_pb2 as pb
from router.access.identities import Identity
from router.request_params import RequestParams


@pytest.fixture
async def servers(tmp_path):
    tiers = {"batch": {"tokens_per_minute": 100_000}}
    async with RouterServers(tmp_path, max_body_bytes=4096, tiers=tiers).opened() as servers:
        yield servers


POST = "/v1/completions"


BODY = {"prompt": "abc", "max_tokens": 3}


EXPLAIN = "/prefix-index/explain"


@pytest.mark.parametrize(
    ("name", "tenant", "status", "scope"),
    [
        ("acme", None, 200, "acme"),
        ("acme", "acme", 200, "acme"),
        ("acme", "bulk", 403, None),
        ("acme", "", 403, None),
        ("operator", "bulk", 200, "bulk"),
        ("scraper", None, 403, None),
    ],
)
async def test_a_tenant_sees_who_holds_its_own_prompts_and_an_admin_sees_anybodys(
    servers, name, tenant, status, scope
):
    asked = []
    report = servers.service._prompt_report

    async def of(request):
        asked.append(request.scope.split("\n")[0])
        return await type(report).of(report, request)

    servers.service._prompt_report = SimpleNamespace(of=of)
    body = {"prompt": "abc"} | ({} if tenant is None else {"tenant": tenant})
    async with servers.web(name) as http:
        reply = await http.post(EXPLAIN, json=body)
        assert reply.status_code == status
        assert asked == ([] if scope is None else [scope])
        if scope is not None:
            assert reply.json()["tenant"] == scope
            chat = {"messages": [{"role": "user", "content": "abc"}], **body}
            del chat["prompt"]
            assert (await http.post(EXPLAIN, json=chat)).json()["prompt_tokens"] == 3
            several = await http.post(EXPLAIN, json={"prompt": ["a", "b"]})
            assert several.status_code == 400 and "send one" in several.text


@pytest.mark.parametrize("server", ["http", "grpc"])
async def test_equal_ids_of_two_tenants_run_beside_each_other_and_end_alone(servers, server):
    servers.wait_for_workers()
    names = ("acme", "bulk")
    if server == "http":
        webs = {name: servers.web(name) for name in names}
        headers = {"idempotency-key": "same"}
        calls = {
            n: asyncio.ensure_future(webs[n].post(POST, json=BODY, headers=headers)) for n in names
        }
    else:
        message = pb.GenerateRequest(text="abc", request_id="same")
        calls = {
            n: asyncio.ensure_future(answer_of(servers.call("Generate", message, n))) for n in names
        }
    await until(lambda: servers.orchestrator.num_running == 2)
    aborted = await servers.call("Abort", pb.AbortRequest(request_id="same"), "operator")
    assert aborted.outcome == pb.ABORT_OUTCOME_NOT_RUNNING, "an id names nothing of another tenant"
    # A double of one tenant is refused and harms neither.
    with log_lines() as lines:
        message = pb.GenerateRequest(text="abc", request_id="same")
        assert await refusal_of(servers.call("Generate", message, "bulk")) == "ALREADY_EXISTS"
    assert [(x["outcome"], x["tenant"]) for x in lines] == [("duplicate_request", "bulk")]
    assert servers.orchestrator.num_running == 2
    # A client that comes back takes over its own tenant's run, and no other.
    back = servers.call("GenerateStream", _resumed(), "bulk")
    first = asyncio.ensure_future(back.read())
    await asyncio.wait_for(asyncio.gather(calls["bulk"], return_exceptions=True), 5)
    await until(lambda: servers.orchestrator.num_running == 2)
    assert not calls["acme"].done()
    aborted = await servers.call("Abort", pb.AbortRequest(request_id="same"), "bulk")
    assert aborted.outcome == pb.ABORT_OUTCOME_ABORTED
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        await first
    assert servers.orchestrator.num_running == 1 and not calls["acme"].done()
    aborted = await servers.call("Abort", pb.AbortRequest(request_id="same"), "acme")
    assert aborted.outcome == pb.ABORT_OUTCOME_ABORTED
    await asyncio.gather(calls["acme"], return_exceptions=True)


def _resumed():
    message = pb.GenerateRequest(text="abc", request_id="same")
    message.resume_from.positions.append(1)
    return message


async def test_equal_ids_and_prompts_of_two_tenants_draw_unequal_answers(servers):
    seeds = {}
    for tenant in ("", "acme", "bulk"):
        wish = RequestParams(
            [1, 2], {"max_tokens": 1}, request_id="same", identity=Identity(tenant)
        )
        made = [(await servers.service.prepare([wish]))[0][0] for _ in range(2)]
        assert made[0].seed == made[1].seed
        seeds[tenant] = made[0].seed
    assert len(set(seeds.values())) == 3


@pytest.mark.parametrize("server", ["http", "grpc"])
async def test_a_tenant_is_told_of_its_own_requests_and_observers_of_all(servers, server):
    """No worker is there, which ends a request that ran."""
    headers = {"idempotency-key": "mine"}
    if server == "http":
        async with servers.web("acme") as http:
            reply = await http.post(POST, json={**BODY, "max_tokens": 5}, headers=headers)
            assert reply.json()["error"]["code"] == "no_worker"
    else:
        message = pb.GenerateRequest(text="abc", request_id="mine")
        message.stopping.max_tokens = 5
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await servers.call("Generate", message, "acme")
        trailers = dict(caught.value.trailing_metadata())
        assert trailers["x-baton-router"] == servers.sessions.router_id
    told = {}
    for name in ("acme", "bulk", "scraper", "operator"):
        async with servers.web(name) as http:
            for asked in ("/explain/mine", "/explain/cmpl-mine"):
                reply = await http.get(asked)
                told[name] = reply.json()
                assert reply.status_code == (404 if name == "bulk" else 200), (name, asked)
                assert reply.headers["x-baton-router"] == servers.sessions.router_id
                assert reply.headers["x-baton-num-routers"] == "1"
    assert told["bulk"]["error"]["code"] == "request_not_found"
    assert "since" not in told["bulk"]["error"]["message"]
    for name in ("acme", "scraper", "operator"):
        found = told[name]
        assert (found["tenant"], found["outcome"]) == ("acme", "no_worker")
        assert [a["workers"] for a in found["attempts"]] == [[]]
        # 4 tokens of prompt and 5 of output were charged, and nothing was used.
        assert found["charge"]["charged"] == {"requests": 1, "tokens": 9}
        assert found["charge"]["used"] == {"requests": 0, "tokens": 0}
    async with servers.web() as http:
        assert (await http.get("/explain/mine")).status_code == 401


async def test_an_answer_names_the_router_that_can_explain_it(servers):
    servers.orchestrator.run = _answer
    async with servers.web("acme") as http:
        for more in ({}, {"stream": True}):
            reply = await http.post(POST, json=BODY | more)
            assert reply.status_code == 200, reply.text
            assert reply.headers["x-baton-router"] == servers.sessions.router_id


async def test_what_only_this_router_has_counted_names_it(servers):
    async with servers.web("scraper") as http:
        for path in ("/load", "/metrics"):
            reply = await http.get(path)
            assert reply.headers["x-baton-router"] == servers.sessions.router_id
            assert reply.headers["x-baton-num-routers"] == "1"


async def _answer(request, emit, forced_path=None):
    emit(TextDelta(0, 0, (97,), "a"))
    emit(ChoiceFinished(0, FinishReason.LENGTH, position=1))
    emit(RequestEnded(Usage(len(request.token_ids), 1)))


@pytest.mark.parametrize("server", ["http", "grpc"])
async def test_what_a_key_asks_for_counts_for_its_class_from_the_first_byte_to_the_end(
    tmp_path, server
):
    """No worker is there, so what ran has failed; an unknown model is refused before."""
    async with RouterServers(tmp_path, classes=("acme",)).opened() as servers:
        for model in ("tiny", "none such"):
            for name in ("acme", "bulk"):
                if server == "http":
                    async with servers.web(name) as http:
                        await http.post(POST, json={**BODY, "model": model})
                else:
                    message = pb.GenerateRequest(text="abc", model=model)
                    await refusal_of(servers.call("Generate", message, name))
        if server == "http":
            async with servers.web() as http:
                await http.post(POST, json=BODY)
        else:
            await refusal_of(servers.call("Generate", pb.GenerateRequest(text="abc")))

        def found(family, **labels):
            names = ("acme", "bulk", "default", "none")
            return [counted(servers, family, tenant_class=name, **labels) for name in names]

        assert found("baton_requests_total", outcome="failed") == [1, 0, 1, 0]
        assert found("baton_slo_requests_total", result="missed", tier="batch") == [1, 0, 1, 0]
        refused = {"server": server, "code": "model_not_found"}
        assert found("baton_refusals_total", **refused) == [1, 0, 1, 0]
        refused["code"] = "invalid_api_key"
        assert found("baton_refusals_total", **refused) == [0, 0, 0, 1]
        assert found("baton_prompt_tokens_total", tier="batch") == [4, 0, 4, 0]
