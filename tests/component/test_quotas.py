"""Quotas at the servers of two routers over a real Redis: statuses, headers, deaths, losses."""

import asyncio
import os
import signal

import grpc
import grpc.aio
import pytest
from redis import asyncio as redis_asyncio
from support.router_servers import RouterServers

from cluster.redis import client as redis_client
from cluster.redis import server as redis_server
from cluster.redis.quota_store import RedisQuotaStore
from cluster.redis.server import RedisServer
from core.errors import Overloaded
from core.types import (
    ChoiceFinished,
    FinishReason,
    RequestEnded,
    RequestTiming,
    TextDelta,
    Usage,
)
from protos.baton.v1 import generation_pb2 as pb
from router.quotas import quotas as quotas_module

TIERS = {"batch": {"tokens_per_minute": 1000, "requests_per_minute": 50}}
PROMPT = "x" * 9
"""10 tokens, with the one that begins every text."""
TIMEOUT_S = 30.0
SECRET = "a secret of sufficient length"


class Answers:
    """Runs requests without workers: as many tokens as it is told, or an error."""

    def __init__(self):
        self.num_tokens = 10**9
        self.error = None

    async def run(self, request, emit, forced_path=None):
        if self.error is not None:
            emit(RequestEnded(Usage(0), self.error))
            return
        count = min(self.num_tokens, request.sampling.max_tokens)
        emit(TextDelta(0, 0, (97,), "a"))
        emit(ChoiceFinished(0, FinishReason.LENGTH, position=count))
        emit(RequestEnded(Usage(len(request.token_ids), count), None, RequestTiming(path="pd")))

    def consumed(self, run_key, num_positions):
        pass

    def is_admitted(self, run_key):
        return True

    def abort(self, run_key, error=None):
        return False

    async def drain(self, grace_s):
        pass


class LimitedRouter(RouterServers):
    """A router with quotas over a Redis."""

    def __init__(self, folder, url, keys):
        store = RedisQuotaStore(url, "n")
        store._client = redis_client.new_client(url, TIMEOUT_S)
        parts = {"quota_store": store, "cluster_key": SECRET}
        super().__init__(folder, parts=parts, tiers=TIERS, keys=keys, replicas=2)
        self.service._runner = self.runner = Answers()
        self.service.charging.start()


class Fleet:
    """Routers over one Redis and one key file."""

    def __init__(self, folder, url):
        self.folder = folder
        self.url = url
        self.keys = None

    def router(self):
        made = LimitedRouter(self.folder, self.url, self.keys)
        self.keys = made.made
        return made


@pytest.fixture
def server(monkeypatch):
    # What is asked here is answered in time, on however busy a machine.
    monkeypatch.setattr(quotas_module, "CALL_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(redis_client, "CALL_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(redis_server, "RIGHTS", redis_server.RIGHTS + " +flushall")
    monkeypatch.setattr(redis_server, "FIRST_PAUSE_S", 3600.0)  # tests start it again themselves
    running = RedisServer()
    yield running
    running.stop()
    running._process.wait()  # one that a test has started has nobody else to reap it


@pytest.fixture
async def fleet(tmp_path, server):
    await listening(server)
    return Fleet(tmp_path, server.url)


async def listening(server):
    client = redis_asyncio.Redis.from_url(server.url)
    async with asyncio.timeout(30):
        while True:
            try:
                await client.get("baton:x")
                break
            except (redis_asyncio.ConnectionError, OSError):
                await asyncio.sleep(0.05)
    return client


async def post(router, max_tokens, key="acme", **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = {"prompt": PROMPT, "max_tokens": max_tokens}
    async with router.web(key) as http:
        return await http.post("/v1/completions", json=body, headers=named)


def left(reply):
    return int(reply.headers["x-ratelimit-remaining-tokens"])


async def test_the_token_after_the_last_is_a_429_with_headers_at_either_router(fleet):
    async with fleet.router().opened() as one, fleet.router().opened() as two:
        reply = await post(one, 590)
        assert reply.status_code == 200, reply.text
        assert reply.headers["x-ratelimit-limit-tokens"] == "1000"
        assert reply.headers["x-ratelimit-limit-requests"] == "50"
        assert reply.headers["x-ratelimit-remaining-requests"] == "49"
        assert left(reply) == 400
        reply = await post(two, 391)
        assert reply.status_code == 429
        error = reply.json()["error"]
        assert error["code"] == "rate_limit_exceeded"
        assert "used 600 tokens" in error["message"] and "the limit is 1000" in error["message"]
        assert left(reply) == 400
        assert reply.headers["x-should-retry"] == "true"
        assert 1 <= int(reply.headers["Retry-After"]) <= 62
        assert reply.headers["x-ratelimit-reset-tokens"]
        assert (await post(two, 390)).status_code == 200
        for router in (one, two):
            assert (await post(router, 1)).status_code == 429
        # Another key of the tier has a quota of its own.
        assert (await post(two, 390, "bulk")).status_code == 200


async def test_every_answer_of_a_limited_key_shows_its_quota(fleet):
    async with fleet.router().opened() as one:
        async with one.web("acme") as http:
            for call in (
                http.get("/v1/models"),
                http.get("/nowhere"),
                http.post("/v1/completions", json={"prompt": 5}),
                http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2000}),
                http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "stream": True}),
            ):
                reply = await call
                assert reply.headers["x-ratelimit-limit-tokens"] == "1000", reply.url
            reply = await http.get("/health")
            assert "x-ratelimit-limit-tokens" not in reply.headers
        async with one.web() as http:
            reply = await http.get("/v1/models")
            assert reply.status_code == 401
            assert "x-ratelimit-limit-tokens" not in reply.headers


def message(max_tokens):
    return pb.GenerateRequest(text=PROMPT, stopping=pb.StoppingOptions(max_tokens=max_tokens))


async def test_grpc_has_the_same_in_its_trailers(fleet):
    async with fleet.router().opened() as one:
        call = one.call("Generate", message(990), "acme")
        await call
        trailers = dict(await call.trailing_metadata())
        assert trailers["x-ratelimit-remaining-tokens"] == "0"
        call = one.call("Generate", message(1), "acme")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(refused.value.trailing_metadata())
        assert trailers["x-ratelimit-limit-tokens"] == "1000"
        assert trailers["x-ratelimit-remaining-tokens"] == "0"


async def test_a_routers_death_loses_nothing(fleet):
    async with fleet.router().opened() as one:
        assert (await post(one, 590)).status_code == 200
    async with fleet.router().opened() as fresh:
        assert (await post(fresh, 391)).status_code == 429
        assert (await post(fresh, 390)).status_code == 200


async def test_what_is_not_used_comes_back_and_refusals_cost_nothing(fleet):
    async with fleet.router().opened() as one, fleet.router().opened() as two:
        one.runner.num_tokens = 90
        assert (await post(one, 990)).status_code == 200
        await counted(two, 900)
        one.runner.error = Overloaded("full")
        reply = await post(one, 800)
        assert (reply.status_code, left(reply)) == (503, 900)
        await counted(two, 900)


async def counted(router, tokens):
    """Until the router has seen what the other one has written."""
    async with asyncio.timeout(60):
        while True:
            # One that does not fit makes it look, and costs nothing.
            reply = await post(router, 990)
            assert reply.status_code == 429
            if left(reply) == tokens:
                return
            await asyncio.sleep(0.02)


async def test_an_idempotency_key_is_charged_once_over_all_routers(fleet):
    async with fleet.router().opened() as one, fleet.router().opened() as two:
        for router in (one, two, two):
            reply = await post(router, 590, idempotency_key="order 17")
            assert (reply.status_code, left(reply)) == (200, 400)
        assert (await post(one, 391, idempotency_key="order 18")).status_code == 429


async def test_a_stream_with_event_ids_is_charged_once_however_often_it_is_resumed(fleet):
    """Also if its client has named no id: it has the one that its events carry."""
    body = {"prompt": PROMPT, "max_tokens": 590, "stream": True}
    async with fleet.router().opened() as one, fleet.router().opened() as two:
        async with one.web("acme") as http:
            reply = await http.post(
                "/v1/completions", json=body, headers={"x-baton-event-ids": "1"}
            )
        assert (reply.status_code, left(reply)) == (200, 400)
        ids = [line[4:] for line in reply.text.splitlines() if line.startswith("id: ")]
        request_id = ids[0].rpartition(":")[0]
        async with two.web("acme") as http:
            reply = await http.post(
                "/v1/completions", json=body, headers={"last-event-id": f"{request_id}:1"}
            )
        assert (reply.status_code, left(reply)) == (200, 400)


async def test_an_emptied_redis_forgets_nothing_that_a_router_knew(fleet):
    async with fleet.router().opened() as one, fleet.router().opened() as two:
        assert (await post(one, 590)).status_code == 200
        assert (await post(two, 290)).status_code == 200
        client = await listening(fleet)
        await client.flushall()
        assert await client.get("baton:x") is None
        await client.aclose()
        # The first router knows nothing of the other's 300.
        assert (await post(one, 190)).status_code == 429
        await counted(one, 100)
        assert (await post(two, 90)).status_code == 200
        assert (await post(one, 1)).status_code == 429


async def test_without_redis_each_router_grants_its_share_until_it_is_back(fleet, server):
    async with fleet.router().opened() as one, fleet.router().opened() as two:
        assert (await post(one, 90)).status_code == 200
        assert (await post(two, 90)).status_code == 200
        os.kill(server.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while not all(r.service.charging._quotas.is_local for r in (one, two)):
                await asyncio.sleep(0.05)
        assert (await post(one, 390)).status_code == 200
        reply = await post(one, 1)
        assert reply.status_code == 429, reply.text
        assert "its share" in reply.json()["error"]["message"]
        assert (await post(two, 290)).status_code == 200
        text = one.service.telemetry.text().decode()
        assert float(text.partition("\nbaton_quota_local_decisions_total ")[2].split()[0]) >= 2
        server._process = server._spawn()
        async with asyncio.timeout(60):
            while any(r.service.charging._quotas.is_local for r in (one, two)):
                await asyncio.sleep(0.05)
        await counted(two, 100)
        await counted(one, 100)
        assert (await post(two, 90)).status_code == 200
        assert (await post(one, 1)).status_code == 429
