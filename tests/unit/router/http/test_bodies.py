"""Bodies of both dialects: what is checked, named, ignored and refused."""

import pytest

from core.errors import (
    InvalidRequest,
)
from core.types import ChatPrompt
from router.http.bodies import ChatBody, CompletionBody
from router.http.body_model import parse_body
from router.http.other_fields import ignored_fields

TALK = ChatPrompt([{"role": "user", "content": "hello"}])


def test_bodies_name_the_field_that_is_wrong():
    cases = {
        "messages[1].role": {"messages": [{"role": "user"}, {"role": 3}]},
        "messages": {"messages": "hello"},
        "temperature": {"messages": [], "temperature": "hot"},
        "stream_options.include_usage": {"messages": [], "stream_options": {"include_usage": 3}},
        "body": 3,
    }
    for field, body in cases.items():
        with pytest.raises(InvalidRequest) as caught:
            parse_body(ChatBody, body)
        assert caught.value.field == field, (field, caught.value)


def test_no_words_of_the_validator_reach_a_client():
    """Each field with each kind of wrong value."""
    found = []
    for kind in (ChatBody, CompletionBody):
        for name in kind.model_fields:
            for value in ("x", "", -1, 10**30, 0.5, True, [], ["x"], [1], {}, {"x": 1}):
                body = {"messages": [], "prompt": "x", name: value}
                try:
                    parse_body(kind, body)
                except InvalidRequest as error:
                    found.append(error.message)
    assert len(found) > 100
    for foreign in ("Input", "input_", "pydantic", "type=", "Field required", "valid "):
        assert not [text for text in found if foreign in text]
    assert "temperature must be a number" in found and "n must be a whole number" in found


def test_conversations_are_checked():
    def chat(**fields):
        body = parse_body(ChatBody, {"messages": [{"role": "user", "content": "x"}], **fields})
        return body.chat(
            ("enable_thinking", "reasoning_effort"),
            trusts_template=False,
            adds_special_tokens=False,
        )

    assert chat(
        reasoning_effort="low", chat_template_kwargs={"enable_thinking": False}
    ).variables == {"enable_thinking": False, "reasoning_effort": "low"}
    assert (
        chat(continue_final_message=True).adds_generation_prompt is False
        and chat().adds_generation_prompt is True
    )
    for fields, name in (
        ({"messages": []}, "messages"),
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": {"os": 1}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"messages": [{"role": ""}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
    ):
        with pytest.raises(InvalidRequest) as caught:
            chat(**fields)
        assert caught.value.field == name
    body = parse_body(ChatBody, {"messages": [], "top_logprobs": 3})
    with pytest.raises(InvalidRequest, match="needs logprobs"):
        body.all_params(TALK, "", None)


def test_sampling_fields_that_need_words_of_their_own():
    def given(**fields):
        return (
            parse_body(CompletionBody, {"prompt": "x", **fields}).all_params("", None)[0].sampling
        )

    assert given(top_k=-1)["top_k"] == 0 and given(logit_bias={"7": 3})["logit_bias"] == ((7, 3.0),)
    assert given(echo=True, max_tokens=0, logprobs=1)["prompt_logprobs"] == 1
    assert (
        given(stop="x")["stop"] == ("x",)
        and given(include_stop_str_in_output=True)["include_stop"] is True
    )
    for fields in (
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"9" * 30: 1}},
        {"allowed_token_ids": []},
        {"truncation_side": "middle"},
        {"stream_options": {}},
    ):
        with pytest.raises(InvalidRequest, match=next(iter(fields))):
            given(**fields)
    assert parse_body(CompletionBody, {"prompt": ["a", "b"]}).prompts() == ["a", "b"]
    for prompt in ([], ["a"] * 129):
        with pytest.raises(InvalidRequest, match="prompt"):
            parse_body(CompletionBody, {"prompt": prompt}).prompts()


def test_tools_that_may_not_be_called_are_ignored_and_told_of():
    def sort(**fields):
        return ignored_fields(parse_body(ChatBody, {"messages": [], **fields}))

    assert sort(tools=[{"type": "function"}], tool_choice="none") == ["tools"]
    assert sort(functions=[{"name": "f"}], function_call="none") == ["functions"]
    for choice in ("auto", "required", None):
        with pytest.raises(InvalidRequest, match="tools"):
            sort(tools=[{"type": "function"}], tool_choice=choice)


def test_as_many_as_n_are_the_best_and_no_others():
    def wishes(**fields):
        return parse_body(CompletionBody, {"prompt": "x", **fields}).all_params("", None)

    assert wishes(n=2, best_of=2)[0].sampling["n"] == 2 and wishes(best_of=1) and wishes(n=3)
    for fields in ({"best_of": 2}, {"n": 2, "best_of": 3}, {"n": 2, "best_of": 1}):
        with pytest.raises(InvalidRequest, match="best_of is"):
            wishes(**fields)


def test_whole_numbers_may_come_as_floats_and_options_as_null():
    fields = ("max_tokens", "n", "top_k", "seed", "min_tokens", "logprobs")
    body = parse_body(CompletionBody, {"prompt": "x", **dict.fromkeys(fields, 5.0)})
    values = [getattr(body, name) for name in fields]
    assert values == [5] * 6 and {type(value) for value in values} == {int}
    nulls = {"include_usage": None, "continuous_usage_stats": None}
    assert parse_body(ChatBody, {"messages": [], "stream": True, "stream_options": nulls})
    for value in (5.5, "5", True, float("inf")):
        with pytest.raises(InvalidRequest, match="max_tokens"):
            parse_body(CompletionBody, {"prompt": "x", "max_tokens": value})


def test_parts_of_a_message_are_text_by_any_of_its_names():
    parts = [
        {"type": "text", "text": "a"},
        {"type": "input_text", "text": "b"},
        {"type": "output_text", "text": "c", "annotations": []},
        {"type": "refusal", "refusal": "d"},
    ]
    body = parse_body(ChatBody, {"messages": [{"role": "user", "content": parts}]})
    chat = body.chat((), trusts_template=False, adds_special_tokens=False)
    assert chat.messages[0]["content"] == [{"type": "text", "text": letter} for letter in "abcd"]
    for odd in ({"type": "refusal", "text": "x"}, {"type": "text"}, {"type": "input_image"}):
        body = parse_body(ChatBody, {"messages": [{"role": "user", "content": [odd]}]})
        with pytest.raises(InvalidRequest, match="only text"):
            body.chat((), trusts_template=False, adds_special_tokens=False)


@pytest.mark.parametrize(
    ("kind", "content"),
    [(CompletionBody, {"prompt": "x"}), (ChatBody, {"messages": []})],
)
def test_hints_of_the_cache_are_read_from_both_bodies(kind, content):
    hints = {"prompt_cache_key": "k", "session_id": "s", "prompt_cache_retention": "24h"}
    for given, expected in ((hints, hints), ({}, dict.fromkeys(hints, ""))):
        body = parse_body(kind, {**content, **given})
        params = body.params("x", {}, "r", None, adds_special_tokens=True)
        assert {name: getattr(params, name) for name in hints} == expected
        assert ignored_fields(body) == []
