"""Bodies made to hurt: refused by their size, in a process of their own,
and held within one limit."""

import asyncio
import json
import logging
import os
import signal
from types import SimpleNamespace

import pytest
from starlette.requests import ClientDisconnect
from support.http_server import HttpFixture, status

from core.errors import (
    Cancelled,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    RequestTimeout,
    Unavailable,
)
from router.access.credentials import Identity
from router.body_limits import MAX_DEPTH, MAX_FIELDS, MAX_TOKEN_IDS, MAX_VALUES, check_size
from router.http.body_reading import NUM_LARGEST, SMALL_BYTES, BodyReader, Upload, UploadMemory

MIB = 1 << 20


class Coming:
    """A request whose body comes in pieces; what is no bytes is awaited or raised."""

    def __init__(self, *pieces, tenant="a"):
        self._pieces = pieces
        self.state = SimpleNamespace(identity=Identity(tenant=tenant, tier=""))

    async def stream(self):
        for piece in self._pieces:
            if isinstance(piece, bytes):
                yield piece
                await asyncio.sleep(0)
            elif isinstance(piece, asyncio.Event):
                await piece.wait()
            else:
                raise piece


@pytest.fixture()
async def reader():
    made = BodyReader(4 * MIB, 5.0, 30.0)
    yield made
    await made.stop()
    assert made.memory.num_bytes == 0, "an upload was not let go of"


def many(item, number):
    return b"[" + b",".join([item] * number) + b"]"


def body(**fields):
    pairs = (b'"%s":%s' % (name.encode(), value) for name, value in fields.items())
    return b"{" + b",".join(pairs) + b"}"


HOSTILE = {
    "empty lists": (body(prompt=many(b"[]", 1_390_000)), "prompt has more than"),
    "tiny messages": (body(messages=many(b'{"role":"user"}', 130_000)), "messages has more than"),
    "parts": (
        body(messages=b'[{"content":' + many(b'{"type":"text"}', 250_000) + b"}]"),
        "messages",
    ),
    "unknown fields": (
        b"{" + b",".join(b'"f%d":1' % i for i in range(350_000)) + b"}",
        "has 350000 fields",
    ),
    "biases": (
        body(logit_bias=b"{" + b",".join(b'"%d":1' % i for i in range(350_000)) + b"}"),
        "logit_bias",
    ),
    "ids": (body(prompt=many(b"1", 2_000_000)), f"more than {MAX_TOKEN_IDS} token ids"),
    "stops": (body(stop=many(b'"a"', 1_000_000)), "stop has more than"),
    "free": (
        body(metadata=b"{" + b",".join(b'"%d":{}' % i for i in range(200_000)) + b"}"),
        "metadata",
    ),
    "open brackets": (body(x=b"[" * 2_000_000), "not JSON|nested too deeply"),
    "depth": (
        body(x=b"[" * 900 + b"]" * 900, y=b'"%s"' % (b"a" * SMALL_BYTES)),
        "nested too deeply",
    ),
    "digits": (body(seed=b"9" * 4_000_000), "not JSON"),
    "a list": (many(b"1", 100_000), "is a JSON list"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_body_is_refused_elsewhere(reader, name, monkeypatch):
    """The loop's own parser never sees it."""
    data, message = HOSTILE[name]
    assert len(data) > SMALL_BYTES

    def parse(_):
        raise AssertionError("it was parsed on the loop")

    monkeypatch.setattr("router.http.body_reading.parse", parse)
    with pytest.raises(InvalidRequest, match=message):
        await reader.read(Coming(data))


async def test_large_bodies_of_real_clients_pass(reader):
    text = "word, [and] {so} \u65e5\u672c " * 100_000
    bodies = [
        {"prompt": text},
        {"prompt": [[7] * 2048] * 100},
        {"messages": [{"role": "user", "content": "hello, you"}] * 3000},
        {"prompt": "x" * SMALL_BYTES, "logit_bias": {str(i): 1 for i in range(300)}},
    ]
    for tree in bodies:
        assert await reader.read(Coming(json.dumps(tree).encode())) == tree


def test_limits_are_exact():
    check_size({"a": [1] * MAX_TOKEN_IDS, "b": ["x"] * MAX_VALUES})
    check_size({f"f{i}": 1 for i in range(MAX_FIELDS)})
    nested = []
    for _ in range(MAX_DEPTH - 1):
        nested = [nested]
    check_size({"a": nested})
    for wrong, field in (
        ({"a": [1] * MAX_TOKEN_IDS, "b": [2]}, "b"),
        ({"b": ["x"] * (MAX_VALUES + 1)}, "b"),
        ({"b": [1] * MAX_VALUES + [1.5]}, "b"),
        ({f"f{i}": 1 for i in range(MAX_FIELDS + 1)}, "body"),
        ({"a": [nested]}, "a"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            check_size(wrong)
        assert refused.value.field == field


async def test_a_parser_that_dies_takes_one_body_with_it(reader):
    data = json.dumps({"prompt": "x" * MIB}).encode()
    assert await reader.read(Coming(data))
    [child] = reader._parsers._children
    os.kill(child._process.pid, signal.SIGSTOP)  # so that the order is in it when it dies
    reading = asyncio.create_task(reader.read(Coming(data)))
    await asyncio.sleep(0.1)
    os.kill(child._process.pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match="process that parses"):
        await reading
    assert await reader.read(Coming(data))


async def test_half_sent_bodies_have_a_limit_together(reader):
    """The one that has stood still the longest makes room; who sends on is served."""
    still = asyncio.Event()
    stalled = [
        asyncio.create_task(reader.read(Coming(b" " * (4 * MIB - 10), still)))
        for _ in range(3 * NUM_LARGEST)
    ]
    while sum(task.done() for task in stalled) < 2 * NUM_LARGEST:
        await asyncio.sleep(0.01)
    assert reader.memory.num_bytes <= NUM_LARGEST * 4 * MIB
    tree = {"prompt": "y" * 2 * MIB}
    assert await reader.read(Coming(json.dumps(tree).encode())) == tree
    for task in stalled:
        task.cancel()
    ends = await asyncio.gather(*stalled, return_exceptions=True)
    gone = [isinstance(end, Overloaded) for end in ends]
    assert sum(gone) == 2 * NUM_LARGEST + 1 and all(gone[: 2 * NUM_LARGEST])


async def test_one_whose_time_ends_in_this_very_turn_makes_room_too():
    memory, loop, taken = UploadMemory(10), asyncio.get_running_loop(), []
    late, newcomer = Upload(asyncio.timeout(None)), Upload(asyncio.timeout(None))

    async def stand_still():
        async with late.deadline:
            memory.take(late, 8)
            await asyncio.Event().wait()

    task = asyncio.create_task(stand_still())
    await asyncio.sleep(0)
    late.deadline.reschedule(loop.time())
    loop.call_soon(lambda: taken.append(memory.take(newcomer, 8)))
    with pytest.raises(TimeoutError):
        await task
    assert taken == [None] and memory.num_bytes == newcomer.num_bytes == 8


async def test_a_body_has_a_deadline_and_a_size():
    reader = BodyReader(1000, 0.05, 30.0)
    with pytest.raises(RequestTimeout, match="0.05 s"):
        await reader.read(Coming(b"{", asyncio.Event()))
    with pytest.raises(PayloadTooLarge, match="1000 bytes"):
        await reader.read(Coming(b"{" * 600, b"{" * 600, AssertionError("it read on")))
    assert reader.memory.num_bytes == 0


async def test_a_client_that_leaves_in_the_middle_is_no_bug(reader, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(Cancelled, match="left before its body"):
        await reader.read(Coming(b"{", ClientDisconnect()))
    assert not caplog.records


async def test_a_body_that_comes_after_the_answer_is_read_and_the_connection_goes_on():
    """Clients send head and body apart; an answer that needs no body may be between the two."""
    async with HttpFixture() as server:
        reader, writer = await server.connect()
        for _ in range(2):
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n")
            assert status(await reader.readuntil(b"ok")) == 200
            writer.write(b"12345")
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n1")
        assert status(await reader.readuntil(b"ok")) == 200
        assert await reader.read() == b"", "who never sends the rest is not waited for"
        writer.close()
