"""Events as the chunks and bodies of both dialects."""

from support.replies import ENDED, SCORED, STOP, chunks, delta, reply, whole

from core.types import (
    Logprob,
    PromptScored,
    TextDelta,
)
from router.http.formatters import (
    ChatFormatter,
    server_timing,
)


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
