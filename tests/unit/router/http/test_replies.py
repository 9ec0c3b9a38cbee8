"""Rooms of the router that child processes and real sockets usually hide: templates,
replies, streams, logs."""

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest
from support.models import TINY

from core.errors import DeadlineExceeded
from core.types import (
    ChoiceFinished,
    FinishReason,
    GenerateRequest,
    Logprob,
    PromptScored,
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
from router.http.json_pieces import UTF8, dumps
from router.http.logprobs import LogprobShapes
from router.http.replies import HEAVY_TOKENS, Reply
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


SCORED = PromptScored((Logprob(98, -0.5, ((98, -0.5),)),))


def whole(made, *events):
    for event in events:
        made.take(0, event)
    return made.whole()


def chunks(made, *events):
    text = "".join(made.chunks(0, event) for event in events) + made.last_chunk()
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]


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


def long_events():
    """More tokens with log probabilities than are made on the loop."""
    scored = PromptScored(tuple(Logprob(98, -0.5, ((98, -0.5),)) for _ in range(HEAVY_TOKENS)))
    return [scored, delta("xy\u65e5" * 200, logprob=-0.1), STOP, ENDED]


@pytest.fixture()
def made_in(monkeypatch):
    """Names of the threads in which replies name their tokens."""
    threads = set()
    name_of = LogprobShapes._name

    def name(self, token_id, **how):
        threads.add(threading.current_thread().name.partition("_")[0])
        return name_of(self, token_id, **how)

    monkeypatch.setattr(LogprobShapes, "_name", name)
    return threads


@pytest.mark.parametrize("dialect", [CompletionFormatter, ChatFormatter])
async def test_many_log_probabilities_are_made_off_the_loop(dialect, made_in):
    options = {"has_logprobs": True, "has_prompt_logprobs": True}
    expected = whole(reply(dialect, **options), *long_events())
    made_in.clear()
    body = await whole_reply(stays, reply(dialect, **options), Group(long_events()))
    assert body == expected and made_in == {"replies"}
    assert json.loads(dumps(body, UTF8)) == expected

    events = long_events()
    parts = chunks(reply(dialect, echo=dialect is CompletionFormatter, **options), *events)
    made_in.clear()
    made = reply(dialect, echo=dialect is CompletionFormatter, **options)
    sent = await send_all(Group(events[:1], events[1:]), made=made)
    text = b"".join(m.get("body", b"") for m in sent).decode().removesuffix("data: [DONE]\n\n")
    lines = [line for line in text.split("\n\n") if line]
    assert [json.loads(line.removeprefix("data: ")) for line in lines] == parts
    assert made_in == {"replies"}


async def test_few_log_probabilities_are_made_on_the_loop(made_in):
    events = [SCORED, delta("x", logprob=-0.1), STOP, ENDED]
    await whole_reply(stays, reply(has_logprobs=True), Group(events))
    await send_all(Group(events), made=reply(has_logprobs=True))
    assert made_in == {"MainThread"}


async def test_a_whole_reply_is_made_of_all_events_or_is_the_error():
    body = await whole_reply(
        stays,
        reply(n=2),
        Group(
            [delta("a"), delta("b", choice=1)],
            [STOP, ChoiceFinished(1, FinishReason.LENGTH), ENDED],
        ),
    )
    assert [c["text"] for c in body["choices"]] == ["a", "b"]
    with pytest.raises(DeadlineExceeded):
        await whole_reply(stays, reply(), Group([RequestEnded(Usage(2), DeadlineExceeded("late"))]))
