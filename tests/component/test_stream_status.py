"""The status of a stream is not sent before the request has its permit, and no comment either.

Owns real servers on real sockets whose only permit is held, and the count of silences that would
have been filled with a comment.
"""

import asyncio
import json

import pytest
from support.http_server import HttpFixture, read_all, status
from support.router_servers import RouterServers, log_lines

from core.types import ChoiceFinished, FinishReason, GenerateRequest, SamplingParams, TextDelta
from protos.baton.v1 import generation_pb2 as pb
from router.request_stream import StreamGroup

KEEP_ALIVE_S = 0.02
RUNNING = GenerateRequest("r", "m", (1,), SamplingParams(), 1, 0.0)
COMMENT = b": keep-alive\n\n"


@pytest.fixture
def silences(monkeypatch):
    """How often a reply has waited for `keep_alive_s` in vain."""
    found, batch = [], StreamGroup.batch

    async def counting(self, timeout_s=None):
        events = await batch(self, timeout_s)
        if not events:
            found.append(self.is_admitted)
        return events

    monkeypatch.setattr(StreamGroup, "batch", counting)
    return found


def servers_with(tmp_path, queue_wait_s):
    limits = {"max_running": 1, "max_queued": 4, "queue_wait_s": queue_wait_s}
    return RouterServers(tmp_path, keep_alive_s=KEEP_ALIVE_S, **limits)


async def ask(servers, server, *, stream=True, prompt="abc"):
    body = json.dumps({"prompt": prompt, "max_tokens": 5, "stream": stream})
    reader, writer = await server.connect()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {servers.keys['acme']}\r\nconnection: close\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    writer.write(f"{head}{body}".encode())
    return reader, writer


async def until(is_so):
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.005)


async def test_a_stream_that_is_refused_after_it_has_waited_is_a_503(tmp_path, silences):
    servers = servers_with(tmp_path, queue_wait_s=10 * KEEP_ALIVE_S)
    async with servers.opened(), HttpFixture(app=servers.app) as server:
        async with servers.service._admission.permit(RUNNING):
            reader, writer = await ask(servers, server)
            reply = await read_all(reader)
            writer.close()
    assert len(silences) >= 2 and not any(silences)
    assert status(reply) == 503 and COMMENT not in reply
    assert b"retry-after: " in reply.lower() and b'"queue_timeout"' in reply


async def test_a_stream_is_kept_alive_from_when_it_has_its_permit(tmp_path, silences):
    servers = servers_with(tmp_path, queue_wait_s=60.0)
    go_on = asyncio.Event()

    async def speak(run):
        await go_on.wait()
        run.emit(TextDelta(0, 0, (7,), "x"))
        run.emit(ChoiceFinished(0, FinishReason.STOP))

    servers.attempts.run = speak
    async with servers.opened(), HttpFixture(app=servers.app) as server:
        async with servers.service._admission.permit(RUNNING):
            reader, writer = await ask(servers, server)
            await until(lambda: len(silences) >= 3)
            assert reader._buffer == b"", "something was sent to a request that waits"
        head = await reader.readuntil(COMMENT)
        assert status(head) == 200
        go_on.set()
        assert (await read_all(reader)).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        writer.close()


async def test_output_of_one_prompt_does_not_wait_for_anothers_permit(tmp_path, silences):
    servers = servers_with(tmp_path, queue_wait_s=60.0)

    async def speak(run):
        run.emit(TextDelta(0, 0, (7,), "x"))
        run.emit(ChoiceFinished(0, FinishReason.STOP))

    servers.attempts.run = speak
    async with servers.opened(), HttpFixture(app=servers.app) as server:
        reader, writer = await ask(servers, server, prompt=["abc", "abcd", "abcde"])
        reply = await read_all(reader)
        writer.close()
    assert status(reply) == 200 and reply.count(b'"finish_reason":"stop"') == 3


@pytest.mark.parametrize("kind", ["stream", "whole", "grpc"])
async def test_a_client_that_leaves_before_any_header_leaves_the_queue(tmp_path, kind):
    servers = servers_with(tmp_path, queue_wait_s=60.0)
    admission = servers.service._admission
    async with servers.opened(), HttpFixture(app=servers.app) as server:
        with log_lines() as lines:
            async with admission.permit(RUNNING):
                if kind == "grpc":
                    message = pb.GenerateRequest(model="tiny", text="abc")
                    call = servers.call("GenerateStream", message, "acme")
                    leave = call.cancel
                else:
                    _, writer = await ask(servers, server, stream=kind == "stream")
                    leave = writer.close
                await until(lambda: admission.num_queued == 1)
                await asyncio.sleep(5 * KEEP_ALIVE_S)
                leave()
                await until(lambda: admission.num_queued == 0)
                await until(lambda: lines)
    assert [line["outcome"] for line in lines] == ["cancelled"]
