"""A stream as server-sent events: its first line, its end, and who leaves or does not read."""

import asyncio

import pytest
from support.replies import (
    ENDED,
    STOP,
    Group,
    delta,
    reply,
    send_all,
    stays,
)

from core.errors import Cancelled, DeadlineExceeded, Overloaded
from core.types import (
    ChoiceFinished,
    FinishReason,
    RequestEnded,
    Usage,
)
from router.http.sse import EventStream, StreamLimits, whole_reply
from simulation.loop import run_virtual


async def test_a_stream_says_that_it_lives_and_ends_once():
    sent = await send_all(Group([], [delta("a"), delta("b", position=1)], [STOP, ENDED]))
    bodies = [m["body"] for m in sent[1:]]
    assert (
        sent[0]["status"] == 200
        and bodies[0] == b": keep-alive\n\n"
        and bodies[1].count(b"data: ") == 2
    )
    assert bodies[-1].endswith(b"data: [DONE]\n\n") and [m["more_body"] for m in sent[1:]] == [
        True,
        True,
        True,
        False,
    ]


async def test_an_error_before_the_first_event_keeps_its_status_and_later_it_is_an_event():
    refused = await send_all(Group([RequestEnded(Usage(2), Overloaded("full"))]))
    assert refused[0]["status"] == 503 and (b"x-should-retry", b"true") in refused[0]["headers"]
    late = await send_all(
        Group([delta("a")], [RequestEnded(Usage(2, 1), DeadlineExceeded("late"))])
    )
    assert (
        late[0]["status"] == 200
        and b'"deadline_exceeded"' in late[-1]["body"]
        and late[-1]["body"].endswith(b"[DONE]\n\n")
    )


async def test_a_request_that_waits_for_its_permit_gets_no_comment_and_its_refusal_a_status():
    group = Group([], [], [RequestEnded(Usage(2), Overloaded("full"))])
    group.is_admitted = False
    sent = await send_all(group)
    assert [m["type"] for m in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 503 and b"full" in sent[1]["body"]


async def test_a_client_that_leaves_ends_both_kinds_of_reply():
    async def leaves():
        return {"type": "http.disconnect"}

    sent = await send_all(Group([delta("a")], None), leaves)
    assert all(m.get("more_body", True) for m in sent)
    group = Group(None)
    with pytest.raises(Cancelled):
        await whole_reply(leaves, reply(), group)
    assert group.is_closed
    group = Group(None)
    task = asyncio.create_task(whole_reply(stays, reply(), group))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert group.is_closed


async def test_a_client_that_does_not_read_is_cut_and_its_request_ends():
    group, sent = Group([delta("a")], [delta("b", position=1)], [STOP, ENDED]), []

    async def send(message):
        sent.append(message)
        if len(sent) == 2:
            await asyncio.sleep(60)  # its window is full

    stream = EventStream(reply(), group, {"x-request-id": "id"}, StreamLimits(10.0, 0.02, False))
    async with asyncio.timeout(5):
        await stream({"type": "http"}, stays, send)
    assert group.is_closed and len(sent) == 2 and len(group.batches) == 2


def test_a_reader_is_not_cut_between_two_writes():
    """Nor while each write takes less than the limit, however long all of them take."""

    async def send(message):
        sent.append(message)
        await asyncio.sleep(9.0)

    class Slow(Group):
        async def batch(self, timeout_s=None):
            await asyncio.sleep(15.0)
            return await super().batch(timeout_s)

    async def serve(group):
        limits = StreamLimits(60.0, 10.0, has_ids=False)
        stream = EventStream(reply(), group, {"x-request-id": "id"}, limits)
        await stream({"type": "http"}, forever, send)

    async def forever():
        await asyncio.get_running_loop().create_future()

    sent = []
    run_virtual(serve(Slow([delta("a")], [delta("b", position=1)], [STOP, ENDED])))
    assert [m.get("more_body") for m in sent] == [None, True, True, True, False]


async def test_event_ids_say_where_the_client_is_and_come_with_the_last_line_of_an_event():
    finish = ChoiceFinished(0, FinishReason.STOP, position=2)
    sent = []

    async def send(message):
        sent.append(message)

    events = Group([delta("a")], [delta("b", position=1)], [finish, ENDED])
    await EventStream(reply(), events, {"x-request-id": "r"}, StreamLimits(10.0, 30.0, True))(
        {"type": "http"}, stays, send
    )
    text = b"".join(m.get("body", b"") for m in sent).decode()
    frames = [frame.splitlines() for frame in text.split("\n\n") if frame]
    ids = [line.rpartition(":")[2] for frame in frames for line in frame if line.startswith("id: ")]
    assert ids == ["1", "2", "4"] and all(frame[0].startswith("data: ") for frame in frames)
