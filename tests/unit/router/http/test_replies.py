"""Whole replies, and the thread in which many log probabilities are made."""

import json
import threading

import pytest
from support.replies import (
    ENDED,
    SCORED,
    STOP,
    Group,
    chunks,
    delta,
    reply,
    send_all,
    stays,
    whole,
)

from core.errors import DeadlineExceeded
from core.types import (
    ChoiceFinished,
    FinishReason,
    Logprob,
    PromptScored,
    RequestEnded,
    Usage,
)
from router.http.formatters import (
    ChatFormatter,
    CompletionFormatter,
)
from router.http.json_pieces import UTF8, dumps
from router.http.logprobs import LogprobShapes
from router.http.replies import HEAVY_TOKENS
from router.http.sse import whole_reply


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
