"""A request's tier at both servers: who gets which, who is refused, and what the answer says."""

import asyncio
import json

import grpc.aio
import pytest
from support.router_servers import RouterServers, log_lines

from core.types import ChoiceFinished, FinishReason, RequestEnded, TextDelta, Usage
from protos.baton.v1 import generation_pb2 as pb

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
BODY = {"prompt": "abc", "max_tokens": 3}


class Answers:
    """Runs requests without workers: one token, then the end."""

    def __init__(self):
        self.tiers = []

    async def run(self, request, emit, forced_path=None):
        self.tiers.append(request.tier)
        emit(TextDelta(0, 0, (97,), "a"))
        emit(ChoiceFinished(0, FinishReason.LENGTH, position=1))
        num_tokens = len(request.token_ids)
        cost = None if request.prices is None else request.prices.cost(num_tokens, 0, 1)
        emit(RequestEnded(Usage(num_tokens, 1, cost=cost)))

    def consumed(self, run_key, num_positions):
        pass

    def abort(self, run_key, error=None):
        return False

    async def drain(self, grace_s):
        pass


@pytest.fixture
async def servers(tmp_path):
    async with RouterServers(tmp_path).opened() as servers:
        servers.service._runner = servers.runner = Answers()
        yield servers


@pytest.mark.parametrize(
    ("name", "field", "header", "tier"),
    [
        ("acme", None, None, "batch"),
        ("acme", "auto", None, "batch"),
        ("acme", "flex", "batch", "batch"),
        ("operator", "priority", None, "interactive"),
        ("operator", None, "standard", "standard"),
    ],
)
async def test_the_answer_says_which_tier_served(servers, name, field, header, tier):
    headers = {"x-baton-tier": header} if header else {}
    body = BODY | ({"service_tier": field} if field else {})
    async with servers.web(name) as http:
        reply = await http.post("/v1/completions", json=body, headers=headers)
        assert reply.status_code == 200, reply.text
        assert (reply.headers["x-baton-tier"], reply.json()["service_tier"]) == (tier, tier)
        reply = await http.post("/v1/completions", json={**body, "stream": True}, headers=headers)
        chunks = [json.loads(line[6:]) for line in reply.text.split("\n\n") if "{" in line]
        assert reply.headers["x-baton-tier"] == tier
        assert {chunk["service_tier"] for chunk in chunks} == {tier}
    metadata = {"x_baton_tier": header} if header else {}
    message = pb.GenerateRequest(text="abc", service_tier=field or "")
    whole = await servers.call("Generate", message, name, **metadata)
    stream = servers.call("GenerateStream", message, name, **metadata)
    parts = [pb.GenerateStreamResponse.FromString(part) async for part in stream]
    assert whole.service_tier == parts[-1].summary.service_tier == tier
    assert servers.runner.tiers == [tier] * 4


@pytest.mark.parametrize(
    ("field", "header", "status", "grpc_status", "code", "fact"),
    [
        ("priority", "", 403, "PERMISSION_DENIED", "permission_denied", "goes before batch"),
        ("", "standard", 403, "PERMISSION_DENIED", "permission_denied", "goes before batch"),
        ("gold", "", 400, "INVALID_ARGUMENT", "invalid_value", "interactive, standard, batch"),
        ("batch", "standard", 400, "INVALID_ARGUMENT", "invalid_value", "send one"),
    ],
)
async def test_a_tier_that_a_key_may_not_have_is_refused_by_name(
    servers, field, header, status, grpc_status, code, fact
):
    with log_lines() as lines:
        async with servers.web("acme") as http:
            headers = {"x-baton-tier": header} if header else {}
            reply = await http.post(
                "/v1/completions", json=BODY | {"service_tier": field}, headers=headers
            )
            error = reply.json()["error"]
            assert (reply.status_code, error["code"]) == (status, code)
            assert fact in error["message"] and "x-baton-tier" not in reply.headers
        message = pb.GenerateRequest(text="abc", service_tier=field)
        with pytest.raises(grpc.aio.AioRpcError, match=fact) as caught:
            await servers.call("Generate", message, "acme", x_baton_tier=header)
        assert caught.value.code().name == grpc_status
        await asyncio.sleep(0.05)
    assert [(line["outcome"], line["tier"]) for line in lines] == [(code, "batch")] * 2
    assert servers.runner.tiers == []


async def test_the_answer_says_what_it_cost_where_its_tier_has_prices(tmp_path):
    prices = {"prompt_price_per_mtok": 2.0, "output_price_per_mtok": 6.0}
    async with RouterServers(tmp_path, tiers={"batch": prices}).opened() as servers:
        servers.service._runner = servers.runner = Answers()
        async with servers.web("operator") as http:
            for tier, cost in (("batch", 14e-6), ("standard", None)):
                body = BODY | {"service_tier": tier}
                reply = (await http.post("/v1/completions", json=body)).json()
                assert reply["usage"]["prompt_tokens"] == 4
                assert reply["usage"].get("cost") == cost
                streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
                text = (await http.post("/v1/completions", json=streamed)).text
                chunks = [json.loads(line[6:]) for line in text.split("\n\n") if "{" in line]
                assert chunks[-1]["usage"].get("cost") == cost
                two = (
                    await http.post("/v1/completions", json=body | {"prompt": ["a", "b"]})
                ).json()
                assert two["usage"].get("cost") == (cost and 20e-6)
        message = pb.GenerateRequest(text="abc", service_tier="batch")
        whole = await servers.call("Generate", message, "operator")
        assert whole.usage.cost == pytest.approx(14e-6)
        message = pb.GenerateRequest(text="abc", service_tier="standard")
        whole = await servers.call("Generate", message, "operator")
        assert not whole.usage.HasField("cost")


async def test_on_an_open_cluster_anybody_may_ask_for_any_tier(tmp_path):
    async with RouterServers(tmp_path, is_open=True).opened() as servers:
        servers.service._runner = runner = Answers()
        async with servers.web() as http:
            for name in ("interactive", "batch", "auto"):
                reply = await http.post("/v1/completions", json=BODY | {"service_tier": name})
                assert reply.status_code == 200
        assert runner.tiers == ["interactive", "batch", "standard"]


async def test_a_burst_of_batch_requests_leaves_permits_for_others_at_both_servers(tmp_path):
    async with RouterServers(tmp_path, max_running=8, max_queued=40).opened() as servers:
        servers.wait_for_workers()
        admission = servers.service._admission
        async with servers.web("acme") as batch, servers.web("operator") as chat:
            burst = [
                asyncio.create_task(batch.post("/v1/completions", json=BODY)) for _ in range(80)
            ]
            await until(lambda: sum(task.done() for task in burst) == 80 - 6 - 40)
            assert {task.result().status_code for task in burst if task.done()} == {503}
            assert admission.running_by_tier() == {"interactive": 0, "standard": 0, "batch": 6}
            wanted = {"service_tier": "priority"}
            chats = [asyncio.create_task(chat.post("/v1/chat/completions", json=CHAT | wanted))]
            message = pb.GenerateRequest(text="abc", **wanted)
            call = servers.call("Generate", message, "operator")
            await until(lambda: admission.running_by_tier()["interactive"] == 2)
            # A third waits, and takes the place of one that would.
            chats += [asyncio.create_task(chat.post("/v1/chat/completions", json=CHAT | wanted))]
            await until(lambda: admission.queued_by_tier()["interactive"] == 1)
            assert admission.running_by_tier()["batch"] == 6 and admission.num_queued == 40
            call.cancel()
            await until(lambda: admission.queued_by_tier()["interactive"] == 0)
            assert admission.running_by_tier()["interactive"] == 2
            for task in [*burst, *chats]:
                task.cancel()
            await asyncio.gather(*burst, *chats, return_exceptions=True)
            await until(lambda: admission.num_running == 0)


async def until(is_so):
    """Requests begin and end in tasks of the servers."""
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.01)
