"""A full router refuses before it reads: at both servers, counted once, whatever the body.

Owns real servers on real sockets, and the count of what of a body reached the application.
"""

import asyncio
import contextlib
import json

import grpc
import grpc.aio
import pytest
from support.http_server import HttpFixture, read_all, status
from support.router_servers import RouterServers, answer_of, counted, log_lines, until

from core.errors import InvalidRequest
from core.types import GenerateRequest, SamplingParams
from protos.baton.v1 import generation_pb2 as pb
from router.grpc.incoming import IncomingMessages

MANY_BYTES = (4 << 20) - 1024
"""Nearly as long as a body or message may be."""
RUNNING = GenerateRequest("r", "m", (1,), SamplingParams(), 1, 0.0)
PATHS = ["/v1/completions", "/v1/chat/completions"]
METHODS = ["Generate", "GenerateStream", "Chat"]
CODE = "queue_full"


class CountingApp:
    """The HTTP application; counts the bytes of bodies that it takes."""

    def __init__(self, app):
        self.app, self.num_bytes, self.num_reads = app, 0, 0

    async def __call__(self, scope, receive, send):
        async def counting():
            self.num_reads += 1
            message = await receive()
            self.num_bytes += len(message.get("body", b""))
            return message

        await self.app(scope, counting, send)


@pytest.fixture
async def servers(tmp_path):
    """Servers with one permit, and no place in the queue."""
    async with RouterServers(tmp_path, max_running=1, max_queued=0).opened() as servers:
        async with asyncio.timeout(60):
            yield servers


def full(servers):
    """Hold the only permit."""
    return servers.service._admission.permit(RUNNING)


def head(servers, path, num_bytes, more="", name="acme"):
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{more}"
        f"authorization: Bearer {servers.keys[name]}\r\ncontent-length: {num_bytes}\r\n\r\n"
    ).encode()


def code_of(reply):
    return json.loads(reply[reply.index(b"{") :])["error"]["code"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_full_router_refuses_before_it_reads_a_long_body(servers, path):
    app = CountingApp(servers.app)
    async with HttpFixture(app=app) as server:
        with log_lines() as lines:
            async with full(servers):
                reader, writer = await server.connect()
                writer.write(head(servers, path, MANY_BYTES) + b"{")
                # The rest is not sent: who waits for it would not answer, and does not stay.
                reply = await read_all(reader)
                writer.close()
        assert (app.num_reads, app.num_bytes) == (0, 0)
        assert status(reply) == 503 and code_of(reply) == CODE
        assert b"retry-after: " in reply.lower()
        (line,) = lines
        assert (line["event"], line["outcome"], line["route"]) == ("refusal", CODE, path)
        assert counted(servers, "baton_refusals_total", server="http", code=CODE) == 1
        assert counted(servers, "baton_requests_total", outcome="rejected") == 1
        # Nobody knows its tier but by its key.
        assert counted(servers, "baton_slo_requests_total", tier="batch", result="missed") == 1
        # The same body is read where there is room for its request.
        last = head(servers, path, MANY_BYTES, "connection: close\r\n")
        await server.say(last + b" " * MANY_BYTES)
        assert app.num_bytes == MANY_BYTES


@pytest.mark.parametrize(("part", "method"), [("_builder", "make"), ("charging", "charge")])
async def test_a_burst_is_refused_while_those_before_it_are_still_tokenized_or_charged(
    servers, monkeypatch, part, method
):
    """One permit, nobody runs or waits: the second request would be one too many all the same."""
    is_over, num_begun = asyncio.Event(), 0

    async def slow(*_, **__):
        nonlocal num_begun
        num_begun += 1
        await is_over.wait()
        raise InvalidRequest("prompt", "is wrong")

    monkeypatch.setattr(getattr(servers.service, part), method, slow)
    async with HttpFixture(app=servers.app) as server, servers.web("acme") as http:
        first = asyncio.create_task(http.post(PATHS[0], json={"prompt": "a"}))
        while not num_begun:
            await asyncio.sleep(0.01)
        reader, writer = await server.connect()
        writer.write(head(servers, PATHS[0], MANY_BYTES) + b"{")
        reply = await read_all(reader)
        writer.close()
        assert status(reply) == 503 and code_of(reply) == CODE
        assert (await end_of(servers, "Generate")).code().name == "UNAVAILABLE"
        assert num_begun == 1
        is_over.set()
        assert (await first).status_code == 400
        # It has failed, and left its place.
        assert (await http.post(PATHS[0], json={"prompt": "a"})).status_code == 400


@pytest.mark.parametrize("end", ["leaves", "is wrong"])
async def test_who_fails_or_leaves_on_the_way_leaves_its_place(servers, end):
    admission = servers.service._admission
    body = b'{"prompt": 5}'
    async with HttpFixture(app=servers.app) as server, servers.web("acme") as http:
        reader, writer = await server.connect()
        writer.write(head(servers, PATHS[0], len(body)))
        while not len(admission._arriving):
            await asyncio.sleep(0.01)
        # Its head alone counts: nothing of its body is here.
        assert (await http.post(PATHS[0], json={"prompt": "a"})).json()["error"]["code"] == CODE
        assert (await end_of(servers, "Generate")).code().name == "UNAVAILABLE"
        if end == "is wrong":
            writer.write(body)
            assert status(await reader.readuntil(b"}}")) == 400
        writer.close()
        while len(admission._arriving):
            await asyncio.sleep(0.01)
        # The one place is free for the next, which needs it from its head until it is made.
        assert (await http.post(PATHS[0], json={"prompt": [1 << 40]})).status_code == 400
        assert (await end_of(servers, "Chat")).code().name != "UNAVAILABLE"
        while len(admission._arriving):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("server", ["http", "grpc"])
async def test_who_runs_has_left_its_place_though_its_answer_is_to_come(servers, server):
    servers.wait_for_workers()
    admission = servers.service._admission
    async with servers.web("acme") as http:
        body, message = {"prompt": "a"}, pb.GenerateRequest(text="a")
        running = asyncio.ensure_future(
            http.post(PATHS[0], json=body)
            if server == "http"
            else answer_of(servers.call("Generate", message, "acme"))
        )
        await until(lambda: admission.num_running)
        assert not len(admission._arriving) and not len(admission._whole)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_half_sent_bodies_refuse_none_that_is_whole(tmp_path):
    # Its prompt is wrong, which is seen only when it is made.
    body, streams = json.dumps({"prompt": [1 << 40]}).encode(), []
    made = RouterServers(tmp_path, max_running=1, max_queued=1)
    async with asyncio.timeout(60), made.opened() as servers:
        app = CountingApp(servers.app)
        async with HttpFixture(app=app) as server:
            for num, name in enumerate(("acme", "acme", "bulk"), 1):
                streams.append(await server.connect())
                streams[-1][1].write(head(servers, PATHS[0], len(body), name=name))
                while app.num_reads < num:
                    await asyncio.sleep(0.01)
            # The third has taken the place of the second, whose body comes all the same.
            reader, writer = streams[1]
            writer.write(body)
            assert status(await reader.readuntil(b"}}")) == 400
            assert len(servers.service._admission._arriving) == 2
            for _, writer in streams:
                writer.close()


async def test_a_connection_goes_on_behind_a_body_that_was_not_read(servers):
    body = b'{"prompt": "abc"}'
    async with HttpFixture(app=servers.app) as server, full(servers):
        reader, writer = await server.connect()
        for _ in range(2):
            writer.write(head(servers, PATHS[0], len(body)) + body)
            reply = await reader.readuntil(b"}}")
            assert status(reply) == 503
        writer.close()


async def test_what_needs_no_permit_is_answered_by_a_full_router(servers):
    async with full(servers), servers.web("acme") as http:
        assert (await http.get("/v1/models")).status_code == 200
        for path in ("/tokenize", "/prefix-index/explain"):
            assert (await http.post(path, json={"prompt": "abc"})).status_code == 200
        assert (await http.get(PATHS[0])).status_code == 405
        assert (await servers.call("Tokenize", pb.TokenizeRequest(text="a"), "acme")).token_ids


async def test_who_may_not_ask_gets_the_same_answer_from_a_full_router(servers):
    async with full(servers):
        for path in PATHS:
            async with servers.web("scraper") as http:
                reply = await http.post(path, json={"prompt": "abc"})
                assert reply.json()["error"]["code"] == "permission_denied"
            async with servers.web() as http:
                reply = await http.post(path, json={"prompt": "abc"})
                assert reply.json()["error"]["code"] == "invalid_api_key"
        for method in METHODS:
            assert (await end_of(servers, method, "scraper")).code().name == "PERMISSION_DENIED"


async def end_of(servers, method, name="acme"):
    """The error of a call with a long message."""
    message = pb.GenerateRequest(text="a" * MANY_BYTES)
    if method == "Chat":
        message = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="a" * MANY_BYTES)])
    call = servers.call(method, message, name)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if hasattr(call, "read") else call)
    return caught.value


@pytest.mark.parametrize("method", METHODS)
async def test_a_full_router_refuses_before_it_reads_a_long_message(servers, method, monkeypatch):
    sizes, read = [], IncomingMessages.read

    async def counting(self, context):
        message = await read(self, context)
        sizes.append(len(message))
        return message

    monkeypatch.setattr(IncomingMessages, "read", counting)
    with log_lines() as lines:
        async with full(servers):
            error = await end_of(servers, method)
        while not lines:  # the server's task may end after its client has the answer
            await asyncio.sleep(0.01)
    assert sizes == [] and error.code().name == "UNAVAILABLE"
    (line,) = lines
    assert (line["event"], line["outcome"]) == ("refusal", CODE)
    assert line["route"] == f"/baton.v1.Generation/{method}"
    assert counted(servers, "baton_refusals_total", server="grpc", code=CODE) == 1
    assert counted(servers, "baton_requests_total", outcome="rejected") == 1
    # The same message is read where there is room for its request.
    await end_of(servers, method)
    assert len(sizes) == 1 and sizes[0] > MANY_BYTES


async def test_a_router_that_shuts_down_reads_nothing_more(servers):
    servers.service._admission.is_draining = True
    app = CountingApp(servers.app)
    async with HttpFixture(app=app) as server:
        reader, writer = await server.connect()
        writer.write(head(servers, PATHS[0], MANY_BYTES) + b"{")
        reply = await read_all(reader)
        writer.close()
    assert code_of(reply) == "draining" and app.num_reads == 0
    assert counted(servers, "baton_requests_total", outcome="failed") == 1
    error = await end_of(servers, "Generate")
    assert error.code().name == "UNAVAILABLE"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(5):
            while counted(servers, "baton_requests_total", outcome="failed") < 2:
                await asyncio.sleep(0.01)
    assert counted(servers, "baton_requests_total", outcome="failed") == 2
    assert counted(servers, "baton_requests_total", outcome="rejected") == 0


async def test_what_finds_no_room_once_it_is_read_counts_for_the_tier_that_it_asks_for(tmp_path):
    tiers = {"batch": {"max_queued": 0}}
    made = RouterServers(tmp_path, max_running=1, tier="standard", tiers=tiers)
    async with asyncio.timeout(60), made.opened() as servers, full(servers):
        async with servers.web("acme") as http:
            with log_lines() as lines:
                wish = {"prompt": "abc", "service_tier": "batch"}
                reply = await http.post(PATHS[0], json=wish)
        assert reply.json()["error"]["code"] == CODE
        (line,) = lines
        assert (line["outcome"], line["tier"]) == (CODE, "batch")
        for tier, num in (("batch", 1), ("standard", 0)):
            missed = {"tier": tier, "result": "missed"}
            assert counted(servers, "baton_slo_requests_total", **missed) == num


async def test_a_caller_is_refused_early_only_where_no_tier_open_to_it_has_room(tmp_path):
    tiers = {"interactive": {"max_queued": 0}, "standard": {"max_queued": 0}}
    for tier, last in (("interactive", {"max_queued": 0}), ("standard", {})):
        made = RouterServers(tmp_path, max_running=1, tier=tier, tiers={**tiers, "batch": last})
        async with asyncio.timeout(60), made.opened() as servers, full(servers):
            # Long, so that a refusal before it is read can be seen.
            body = json.dumps({"prompt": "abc" * 100_000, "service_tier": "interactive"})
            async with servers.web("acme") as http:
                reply = await http.post(PATHS[0], content=body)
            found = reply.status_code, reply.json()["error"]["code"]
            # A standard key could wait as batch: its body is read, and asks for too much.
            assert found == ((503, CODE) if tier == "interactive" else (403, "permission_denied"))
