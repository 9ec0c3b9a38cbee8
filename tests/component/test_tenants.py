"""Tenants with equal request ids never meet."""

import asyncio
from types import SimpleNamespace

import grpc
import grpc.aio
import pytest
from support.router_servers import RouterServers, answer_of, log_lines, refusal_of, until

from protos.baton.v1 import generation_pb2 as pb
from router.access.identities import Identity
from router.request_params import RequestParams


@pytest.fixture
async def servers(tmp_path):
    async with RouterServers(tmp_path, max_body_bytes=4096).opened() as servers:
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


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_equal_ids_of_two_tenants_run_beside_each_other_and_end_alone(servers, door):
    servers.wait_for_workers()
    names = ("acme", "bulk")
    if door == "http":
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
        made = [await servers.service.make_request(wish) for _ in range(2)]
        assert made[0].seed == made[1].seed
        seeds[tenant] = made[0].seed
    assert len(set(seeds.values())) == 3
