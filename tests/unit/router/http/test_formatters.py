"""Events as the chunks and bodies of both dialects."""

import json
from types import SimpleNamespace

from support.models import TINY

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
from router.http.replies import Reply
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
