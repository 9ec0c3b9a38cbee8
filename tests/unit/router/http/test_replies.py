"""Rooms of the router that child processes and real sockets usually hide: templates,
replies, streams, logs."""

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import TINY

from core.errors import Cancelled, DeadlineExceeded, InvalidRequest, ModelLoadError, Overloaded
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
    server_timing,
)
from router.http.json_pieces import UTF8, dumps
from router.http.logprobs import LogprobShapes
from router.http.replies import HEAVY_TOKENS, Reply
from router.http.sse import EventStream, StreamLimits, whole_reply
from router.text.chat_template import ChatTemplates
from router.text.detokenizing import TextModel
from router.text.tokenizer_child import answer

TALK = [{"role": "user", "content": " Hi "}]
TEXT = TextModel(TINY)


# --- templates, in this process -------------------------------------------------------------------


def folder(tmp_path, template, **config):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, **config})
    )
    return ChatTemplates(tmp_path)


def render(templates, messages=TALK, **options):
    return templates.render(messages, {}, **{"max_characters": 1000, **options})


def test_templates_find_their_source_and_their_tokens(tmp_path):
    template = (
        "{{ bos_token }}{% generation %}{{ messages[0].content | trim }}{% endgeneration "
        "%}{{ messages | tojson }}{{ strftime_now('%Y') | length }}"
    )
    out = render(folder(tmp_path, template, bos_token={"content": "<s>"}))
    assert out.startswith("<s>Hi[{") and out.endswith("4")
    assert render(folder(tmp_path, [{"name": "x", "template": "first"}])) == "first"
    assert (
        render(
            folder(tmp_path, [{"name": "x", "template": "a"}, {"name": "default", "template": "b"}])
        )
        == "b"
    )
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert render(ChatTemplates(tmp_path)) == "from the file"


def test_templates_refuse_by_name(tmp_path):
    empty = ChatTemplates(tmp_path)
    cases = [
        ({}, "no chat template"),
        ({"source": "{% for %}"}, "not a valid template"),
        ({"source": "{{ messages[0].content.__class__.__mro__ }}"}, "refused|allowed"),
        ({"source": "{{ raise_exception('no') }}"}, "no"),
        ({"source": "{{ 'a' * 2000 }}"}, "more than 1000"),
        ({"source": "x" * 300_000}, "limit is 262144"),
        ({"source": "{{ nothing.at.all }}"}, "refused"),
        ({"source": "x", "continues_final": True}, "continue_final_message"),
    ]
    for options, words in cases:
        with pytest.raises(InvalidRequest, match=words):
            render(empty, **options)
    shown = "a{{ messages[0].content }}b"
    assert render(empty, source=shown, continues_final=True) == "a Hi "
    assert render(empty, source="[{{ messages[0].content | trim }}]", continues_final=True) == "[Hi"


def test_the_tokenizer_child_answers_orders():
    from tokenizers import Tokenizer

    tokenizer, templates = Tokenizer.from_file(str(TINY / "tokenizer.json")), ChatTemplates(TINY)
    assert answer({"text": "ab", "adds_special_tokens": False}, tokenizer, templates, 99)[
        "ids"
    ] == [97, 98]
    both = answer(
        {"text": "ab", "adds_special_tokens": False, "wants_tokens": True}, tokenizer, templates, 99
    )
    assert both == {"ids": [97, 98], "tokens": ["a", "b"]}
    order = {
        "messages": TALK,
        "variables": {},
        "template": "{{ messages[0].content }}",
        "adds_generation_prompt": True,
        "continues_final": False,
        "adds_special_tokens": False,
    }
    assert answer(order, tokenizer, templates, 99)["ids"] == [32, 72, 105, 32]


# --- text -----------------------------------------------------------------------------------------


def test_tokens_as_text_and_as_bytes(tmp_path):
    assert (
        TEXT.token_bytes(97) == b"a"
        and TEXT.token_bytes(0xE6) == b"\xe6"
        and TEXT.name(257) == "<|end|>"
    )
    assert (
        TEXT.text([104, 105, 257]) == "hi<|end|>"
        and TEXT.text([104, 105, 257], skips_special=True) == "hi"
    )
    decoder = TEXT.decoder((97,), skips_special=False)
    assert (
        decoder.push(257) == "<|end|>"
        and decoder.push(0xE6) == ""
        and decoder.flush() == "\ufffd"
        and decoder.flush() == ""
    )
    with pytest.raises(ModelLoadError, match="holds no tokenizer"):
        TextModel(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        TextModel(tmp_path)
    tree = json.loads((TINY / "tokenizer.json").read_text())
    tree["decoder"] = {"type": "ByteFallback"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    plain = TextModel(tmp_path)
    plain.name = lambda token_id: "<0xE6>" if token_id == 1 else "b"
    assert plain.token_bytes(1) == b"\xe6" and plain.token_bytes(98) == b"b"


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


def test_prompt_log_probabilities_in_both_dialects():
    events = (SCORED, delta("x"), STOP, ENDED)
    plain = whole(reply(has_prompt_logprobs=True, returns_token_ids=True), *events)["choices"][0]
    assert plain["prompt_logprobs"] == [None, {"98": {"logprob": -0.5, "decoded_token": "b"}}]
    assert plain["token_ids"] == [120] and plain["prompt_token_ids"] == [97, 98]
    chat = whole(reply(ChatFormatter, has_prompt_logprobs=True, returns_token_ids=True), *events)
    assert chat["prompt_logprobs"] == plain["prompt_logprobs"] and chat["prompt_token_ids"] == [
        97,
        98,
    ]
    assert chat["choices"][0]["token_ids"] == [120]
    unscored = whole(reply(has_prompt_logprobs=True), delta("x"), STOP, ENDED)["choices"][0]
    assert unscored["prompt_logprobs"] == [None]
    rival = PromptScored((Logprob(98, -2.0, ((99, -0.1),)),))
    named = whole(reply(has_prompt_logprobs=True, names_ids=True), rival, STOP, ENDED)["choices"][
        0
    ]["prompt_logprobs"][1]
    assert list(named) == ["98", "99"] and named["98"]["decoded_token"] == "token_id:98"


def test_streams_with_usage_in_every_chunk_ids_and_timing():
    made = reply(
        includes_usage=True, has_continuous_usage=True, returns_token_ids=True, wants_timing=True
    )
    parts = chunks(made, delta("ab"), delta("c", position=2), STOP, ENDED)
    assert [p["usage"]["completion_tokens"] for p in parts] == [2, 3, 3, 2]
    assert parts[0]["choices"][0]["token_ids"] == [97, 98] and parts[-1]["timing"]["ttft_ms"] == 500
    chat = chunks(
        reply(ChatFormatter, has_logprobs=True, returns_token_ids=True),
        delta("a", logprob=-0.1),
        STOP,
        ENDED,
    )
    assert chat[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""} and chat[1][
        "choices"
    ][0]["token_ids"] == [97]
    assert chat[1]["choices"][0]["logprobs"]["content"][0]["bytes"] == [97]
    quick = chunks(
        reply(ChatFormatter), TextDelta(0, 0, (0xE6,), ""), delta("a", position=1), STOP, ENDED
    )
    assert [c["choices"][0]["delta"].get("content") for c in quick] == ["", "a", None]


def test_echo_alone_streams_the_prompt_and_no_token():
    made = reply(echo=True, is_echo_only=True, has_logprobs=True)
    parts = chunks(made, SCORED, delta("x", logprob=-0.1), STOP, ENDED)
    assert [p["choices"][0]["text"] for p in parts] == ["ab", ""]
    assert parts[0]["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5]
    assert made.usage.completion_tokens == 0 and "queue;dur=1.000" in server_timing(ENDED.timing)


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


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=40,
    )
)
@settings(deadline=None)
def test_pieces_are_the_same_json(tree):
    assert dumps(tree) == json.dumps(tree, separators=(",", ":"))


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
