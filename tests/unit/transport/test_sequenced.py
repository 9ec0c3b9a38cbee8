"""Numbers of a stream: repeats are dropped, gaps end it, concurrent senders leave in order."""

import asyncio

import pytest

from core.ports import StreamClosed
from transport.sequenced import Arrivals, Numbered, NumberedStream


def test_repeats_are_dropped_and_counted_and_a_gap_ends_the_stream():
    arrivals = Arrivals()
    assert [arrivals.is_new(n) for n in (0, 1, 1, 0, 2)] == [True, True, False, False, True]
    assert arrivals.num_repeats == 2
    with pytest.raises(StreamClosed, match="message 3 of the stream is missing, 5 came"):
        arrivals.is_new(5)


class Pipe:
    """Lets later messages overtake, unless the sender waits its turn."""

    transport = "pipe"

    def __init__(self):
        self.sent, self.inbox = [], []

    async def send(self, message):
        await asyncio.sleep(0.01 if not self.sent else 0)
        self.sent.append(message)

    async def recv(self):
        if not self.inbox:
            raise StreamClosed("over")
        return self.inbox.pop(0)


async def test_concurrent_senders_leave_in_the_order_of_their_numbers():
    pipe = Pipe()
    stream = NumberedStream(pipe)
    assert stream.transport == "pipe"
    await asyncio.gather(*(stream.send(text) for text in "abc"))
    assert [(m.number, m.message) for m in pipe.sent] == [(0, "a"), (1, "b"), (2, "c")]
    pipe.inbox = [Numbered(0, "x"), Numbered(0, "x"), Numbered(1, "y"), Numbered(3, "z")]
    assert [await stream.recv(), await stream.recv()] == ["x", "y"]
    with pytest.raises(StreamClosed, match="message 2"):
        await stream.recv()
