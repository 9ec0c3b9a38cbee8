"""What tests of replies share: made events, a group of requests, and what is sent."""

import asyncio
import json
from types import SimpleNamespace

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
from router.http.replies import Reply
from router.http.sse import EventStream, StreamLimits
from router.text.detokenizing import TextModel
from support.models import TINY

TEXT = TextModel(TINY)


SERVICE_MODEL = SimpleNamespace(name="m", fingerprint="fp_x")


class Letters:
    """A text decoder for which a token is the character of its number."""

    def push(self, token_id):
        return chr(token_id)

    def flush(self):
        return ""


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


class Group:
    """Requests whose events are given."""

    def __init__(self, *batches):
        self.batches, self.is_closed = list(batches), False
        self.is_admitted = True

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
