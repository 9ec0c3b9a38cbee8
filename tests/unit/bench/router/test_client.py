"""What the load's client reads from an answer, in whatever pieces it comes."""

import asyncio
import json

import pytest

from bench.report import Sample
from bench.router.client import Exchange, ask, request_of

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
USAGE = {
    "prompt_tokens": 40,
    "completion_tokens": 3,
    "total_tokens": 43,
    "prompt_tokens_details": {"cached_tokens": 16},
}


def event(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


STREAM = [
    HEAD,
    b": keep-alive\n\n",
    event(choices=[{"text": "a"}]),
    event(choices=[{"text": "b"}]),
    event(choices=[], usage=USAGE) + b"data: [DONE]\n\n",
]


async def read(pieces):
    sample = Sample(0, 0.0)
    exchange = Exchange(sample, b"")
    for piece in pieces:
        exchange.data_received(piece)
    exchange.connection_lost(None)
    assert exchange.ended.done()
    return sample


@pytest.mark.parametrize("size", [1, 7, 64, 4096])
async def test_a_whole_answer_in_pieces_of_any_size(size):
    text = b"".join(STREAM)
    sample = await read([text[at : at + size] for at in range(0, len(text), size)])
    assert sample.error == "" and len(sample.arrivals) == 1
    assert (sample.input_tokens, sample.output_tokens, sample.cached_tokens) == (40, 3, 16)


async def test_the_first_event_is_the_first_token_and_not_a_comment():
    sample = await read(STREAM[:2])
    assert sample.arrivals == [] and sample.error == "cut off"
    sample = await read(STREAM[:3])
    assert len(sample.arrivals) == 1 and sample.error == "cut off"


async def test_refusals_errors_and_silence_are_told_apart():
    body = json.dumps({"error": {"code": "queue_full", "message": "data: {no event}"}}).encode()
    refusal = await read([b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\n\r\n" + body])
    assert (refusal.error, refusal.arrivals) == ("503 queue_full", [])
    broken = event(error={"code": "worker_lost", "message": "m"}) + b"data: [DONE]\n\n"
    assert (await read([*STREAM[:3], broken])).error == "200 worker_lost"
    assert (await read([])).error == "no answer"


async def test_a_request_is_sent_whole_and_its_instants_are_in_order():
    received = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        received.append(json.loads(await reader.readexactly(length)))
        writer.write(b"".join(STREAM))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        sample = await ask(port, request_of("abc", 3, 11), 5)
    assert received[0]["prompt"] == "abc" and received[0]["seed"] == 11
    assert received[0]["max_tokens"] == 3 and received[0]["stream"] is True
    assert sample.error == "" and sample.index == 5
    assert sample.scheduled_at == sample.sent_at <= sample.arrivals[0] <= sample.ended_at
    assert (await ask(port, request_of("abc", 3, 11), 6)).error.startswith("client: ")
