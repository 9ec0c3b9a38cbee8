"""A stream as server-sent events: its first line, its end, and who leaves or does not read."""

import asyncio
from types import SimpleNamespace

import pytest
from support.models import TINY

from core.errors import Cancelled, DeadlineExceeded, Overloaded
from core.types import (
    ChoiceFinished,
    FinishReason,
    GenerateRequest,
    Logprob,
    RequestEnded,
    RequestTiming,
    SamplingParams,
    TextDelta,
    Usage,
)
from router.http.formatters import (
    ChatFormatter,
    CompletionFormatter,
    ReplyOptions,
)
from router.http.replies import Reply
from router.http.sse import EventStream, StreamLimits, whole_reply
from router.text.detokenizing import TextModel

TEXT = TextModel(TINY)


# --- replies --------------------------------------------------------------------------------------

SERVICE_MODEL = SimpleNamespace(name="m", fingerprint="fp_x")


def request(n=1, prompt=b"ab"):
    return GenerateRequest("id", "m", tuple(prompt), SamplingParams(n=n), 1, 9.0)


def reply(dialect=CompletionFormatter, n=1, prompts=1, **options):
    made = ReplyOptions(is_chat=dialect is ChatFormatter, **options)
    requests = [request(n) for _ in range(prompts)]
    return Reply(dialect(TEXT, made), requests, SERVICE_MODEL, 5)


def delta(text, choice=0, position=0, logprob=None):
    logprobs = (
        tuple(Logprob(b, logprob, ((b, logprob), (99, -9.0))) for b in text.encode())
        if logprob is not None
        else ()
    )
    return TextDelta(choice, position, tuple(text.encode()), text, logprobs)


ENDED = RequestEnded(Usage(2, 2, 1), None, RequestTiming(queue_s=0.001, ttft_s=0.5))


STOP = ChoiceFinished(0, FinishReason.STOP, 257)


# --- streams and their clients --------------------------------------------------------------------


class Group:
    """Requests whose events are given."""

    def __init__(self, *batches):
        self.batches, self.is_closed = list(batches), False

    @property
    def is_over(self):
        return not self.batches

    async def batch(self, timeout_s=None):
        if self.batches and self.batches[0] is None:
            await asyncio.sleep(60)
        return [(0, event) for event in self.batches.pop(0)]

    async def close(self, error=None):
        self.is_closed = True


async def stays():
    await asyncio.sleep(60)


async def send_all(group, receive=stays, made=None):
    sent = []

    async def send(message):
        sent.append(message)

    await EventStream(
        made or reply(), group, {"x-request-id": "id"}, StreamLimits(0.01, 30.0, False)
    )({"type": "http"}, receive, send)
    assert group.is_closed
    return sent


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
