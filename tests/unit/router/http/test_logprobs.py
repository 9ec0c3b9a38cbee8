"""Log probabilities as clients see them: every rival, the drawn token, each under its own name."""

from types import SimpleNamespace

import pytest
from support.byte_fallback import PIECE_IDS, byte_id, write_folder

from core.types import (
    ChoiceFinished,
    FinishReason,
    GenerateRequest,
    Logprob,
    PromptScored,
    RequestEnded,
    SamplingParams,
    TextDelta,
    Usage,
)
from router.grpc.server import GenerationServicer
from router.http.formatters import ChatFormatter, CompletionFormatter, ReplyOptions
from router.http.replies import Reply
from router.text.detokenizing import TextModel

T, SPACE_T, SPACE_TH = PIECE_IDS["t"], PIECE_IDS["▁t"], PIECE_IDS["▁th"]
BEGIN = 1
"""Id of `<s>`, which the tokenizer adds."""
END = RequestEnded(Usage(1, 3))
FINISHED = ChoiceFinished(0, FinishReason.LENGTH)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    text = TextModel(write_folder(tmp_path_factory.mktemp("fallback")))
    return SimpleNamespace(text=text, model=SimpleNamespace(name="m", fingerprint="fp"))


def whole(service, dialect, entries, scored=(), prompt=(T,), text="", given="", **options):
    made = ReplyOptions(is_chat=dialect is ChatFormatter, has_logprobs=True, **options)
    request = GenerateRequest(
        "id", "m", tuple(prompt), SamplingParams(), 1, 9.0, echoes=made.echo, prompt_text=given
    )
    reply = Reply(dialect(service.text, made), [request], service.model, 5)
    ids = tuple(entry.token_id for entry in entries)
    events = [PromptScored(tuple(scored)), TextDelta(0, 0, ids, text, tuple(entries))]
    for event in [*events, FINISHED, END]:
        reply.take(0, event)
    return reply.whole()["choices"][0]


def test_pieces_keep_their_space_and_stand_where_the_text_has_them(service):
    entries = [Logprob(i, -0.5) for i in (SPACE_T, T, SPACE_TH)]
    legacy = whole(service, CompletionFormatter, entries, text=" tt th")["logprobs"]
    assert legacy["tokens"] == [" t", "t", " th"] and legacy["text_offset"] == [0, 2, 3]
    chat = whole(service, ChatFormatter, entries, text=" tt th")["logprobs"]["content"]
    assert bytes(b for token in chat for b in token["bytes"]) == b" tt th"
    scored = [Logprob(SPACE_TH, -2.0)]
    both = whole(
        service, CompletionFormatter, entries, scored, (SPACE_T, SPACE_TH), " tt th", echo=True
    )
    assert both["text"] == "t th tt th"
    assert both["logprobs"]["tokens"] == ["t", " th", " t", "t", " th"]
    assert both["logprobs"]["text_offset"] == [0, 1, 4, 6, 7]


def test_an_echo_is_what_was_sent_and_what_was_added_has_no_place_in_it(service):
    entries, scored = [Logprob(T, -0.5)], [Logprob(SPACE_TH, -2.0), Logprob(SPACE_T, -1.0)]
    sent = whole(
        service,
        CompletionFormatter,
        entries,
        scored,
        (BEGIN, SPACE_TH, SPACE_T),
        "t",
        "th t",
        echo=True,
    )
    assert sent["text"] == "th tt"
    assert sent["logprobs"]["tokens"] == ["<s>", " th", " t", "t"]
    assert sent["logprobs"]["text_offset"] == [0, 0, 2, 4]
    ids = whole(
        service, CompletionFormatter, entries, scored, (BEGIN, SPACE_TH, SPACE_T), "t", echo=True
    )
    assert ids["text"] == "<s> th tt" and ids["logprobs"]["text_offset"] == [0, 3, 6, 8]


def test_rivals_of_one_text_are_all_there_and_the_likeliest_has_the_text(service):
    rivals = tuple((byte_id(0x80 + i), -0.1 * (i + 1)) for i in range(3))
    found = whole(service, CompletionFormatter, [Logprob(byte_id(0x80), -0.1, rivals)])["logprobs"]
    ids = [f"token_id:{byte_id(0x81)}", f"token_id:{byte_id(0x82)}"]
    assert found["top_logprobs"] == [{
        "\ufffd": -0.1, ids[0]: pytest.approx(-0.2), ids[1]: pytest.approx(-0.3),
    }]  # fmt: skip


def test_the_drawn_token_is_among_its_rivals_and_comes_last(service):
    drawn = Logprob(T, -7.0, ((SPACE_T, -0.1), (SPACE_TH, -2.0)))
    best = Logprob(SPACE_T, -0.1, ((SPACE_T, -0.1), (SPACE_TH, -2.0)))
    alone = Logprob(T, -7.0)
    legacy = whole(service, CompletionFormatter, [drawn, best, alone])["logprobs"]["top_logprobs"]
    assert [list(top.items()) for top in legacy] == [
        [(" t", -0.1), (" th", -2.0), ("t", -7.0)], [(" t", -0.1), (" th", -2.0)], [("t", -7.0)],
    ]  # fmt: skip
    chat = whole(service, ChatFormatter, [drawn, best, alone])["logprobs"]["content"]
    assert [[top["token"] for top in token["top_logprobs"]] for token in chat] == [
        [" t", " th", "t"], [" t", " th"], [],
    ]  # fmt: skip
    info = GenerationServicer(service)._token(T, drawn)
    assert [(top.token_id, top.text) for top in info.top] == [
        (SPACE_T, " t"), (SPACE_TH, " th"), (T, "t"),
    ]  # fmt: skip


def test_an_echoed_prompt_that_ends_inside_a_character_is_one_text_with_its_output(service):
    start, end = byte_id(0xC3), byte_id(0xA9)
    entries, scored = [Logprob(end, -0.5), Logprob(T, -0.5)], [Logprob(start, -1.0)]
    both = whole(service, CompletionFormatter, entries, scored, (T, start), "ét", echo=True)
    assert both["text"] == "tét" and both["logprobs"]["text_offset"] == [0, 1, 1, 2]
    broken = whole(
        service, CompletionFormatter, entries[1:], scored, (T, start), "\ufffdt", echo=True
    )
    assert broken["text"] == "t\ufffdt" and broken["logprobs"]["text_offset"] == [0, 1, 2]
    alone = whole(
        service, CompletionFormatter, [], scored, (T, start), echo=True, is_echo_only=True
    )
    assert alone["text"] == "t\ufffd"
