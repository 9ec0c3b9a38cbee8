"""What a template's syntax says it expects, and what messages become for it."""

import copy

import jinja2
import pytest

from core.errors import InvalidRequest
from core.special_tokens import special_tokens
from router.http.conversation import Message
from router.text.template_messages import seen_messages
from router.text.template_shape import TemplateShape, read_shape

TEXT = TemplateShape(walks_parts=False, takes_text=True, knows_developer=False)
PARTS = TemplateShape(walks_parts=True, takes_text=False, knows_developer=False)
EITHER = TemplateShape(walks_parts=True, takes_text=True, knows_developer=True)
LIST = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

LOOP = "{% for m in messages %}"
WALKS = {
    "an attribute": LOOP + "{% for p in m.content %}{{ p.text }}",
    "an item": LOOP + "{% for p in m['content'] %}{{ p.text }}",
    "a call": LOOP + "{% for p in m.get('content') %}{{ p.text }}",
    "a name": LOOP + "{% set c = m.content %}{% set d = c %}{% for p in d[1:] %}{{ p.text }}",
    "a choice": LOOP + "{% for p in (m.content if m.content else none) or [] %}{{ p }}",
    "an index": "{% for i in range(9) %}{% for p in messages[i].content %}{{ p.text }}",
    "a slice": "{% set rest = messages[1:] %}{% for m in rest %}{% for p in m.content %}{{ p }}",
    "the last": "{% for p in (messages | last).content %}{{ p.text }}",
    "a filter": LOOP + "{{ m.content | map(attribute='text') | join }}",
    "the first part": LOOP + "{{ m.content[0].text }}",
    "the first part's item": LOOP + "{{ m.content[0]['text'] }}",
    "a sum": "{% for m in [] + messages %}{% for p in m.content | list %}{{ p.text }}",
    "a macro": "{% macro f(x, y) %}{% for p in y %}{{ p }}{% endfor %}{% endmacro %}"
    + LOOP
    + "{{ f(1, m.content) }}",
    "a macro in a macro": "{% macro g(z) %}{% for p in z %}{{ p }}{% endfor %}{% endmacro %}"
    "{% macro f(x) %}{{ g(z=x) }}{% endmacro %}" + LOOP + "{{ f(m.content) }}",
    "a namespace": "{% set n = namespace(t=messages) %}{% for m in n.t %}"
    "{% set n.c = m.content %}{% for p in n.c %}{{ p.text }}{% endfor %}",
    "a with": LOOP + "{% with c = m.content %}{% for p in c %}{{ p }}{% endfor %}{% endwith %}",
}
SHOWS = {
    "plain": LOOP + "{{ m.content }}",
    "a list of its own": LOOP + "{% for c in m.tool_calls %}{{ c }}{% endfor %}{{ m.content }}",
    "lines": LOOP + "{% for line in m.content.split('-') %}{{ line }}",
    "another's content": "{% for d in documents %}{% for p in d.content %}{{ p }}{% endfor %}",
    "a letter": LOOP + "{{ m.content[0] }}{{ m.content[1:] }}",
    "a sum of texts": LOOP + "{% for c in 'x' + m.content %}{{ c }}",
}


def shape_of(source):
    ends = source.count("{% for") - source.count("{% endfor %}")
    return read_shape(jinja2.Environment().parse(source + "{% endfor %}" * ends))


@pytest.mark.parametrize("name", WALKS)
def test_a_template_that_walks_over_parts_is_known_however_it_reaches_them(name):
    shape = shape_of(WALKS[name])
    assert shape.walks_parts and not shape.takes_text


@pytest.mark.parametrize("name", SHOWS)
def test_a_template_that_shows_contents_as_they_are_is_not_taken_for_one_that_walks(name):
    assert not shape_of(SHOWS[name]).walks_parts


def test_a_template_that_asks_for_strings_takes_them_and_one_that_names_developers_knows_them():
    asks = LOOP + "{% if m.content is not string %}{% for p in m.content %}{{ p }}{% endfor %}"
    assert shape_of(asks + "{% endif %}").takes_text
    other = LOOP + "{% if m.name is string %}{% endif %}{% for p in m.content %}{{ p }}"
    assert not shape_of(other).takes_text
    assert shape_of("{{ messages[0].role in ['system', 'developer'] }}").knows_developer
    assert not shape_of("Tell the developer {{ messages[0].role == 'system' }}").knows_developer


def seen(message, shape=TEXT):
    before = copy.deepcopy(message)
    (made,) = seen_messages([message], shape)
    assert message == before
    return made


def test_contents_have_the_form_that_the_template_takes():
    for content, as_text, as_parts, as_either in (
        ("a", "a", LIST[:1], "a"),
        ("", "", [], ""),
        (None, "", [], ""),
        (LIST, "a\nb", LIST, LIST),
        ([], "", [], []),
    ):
        for shape, form in ((TEXT, as_text), (PARTS, as_parts), (EITHER, as_either)):
            assert seen({"role": "user", "content": content}, shape)["content"] == form


def test_developers_are_shown_as_system_where_the_template_has_not_heard_of_them():
    message = {"role": "developer", "content": "a"}
    assert seen(message, TEXT)["role"] == "system" and seen(message, EITHER)["role"] == "developer"


def test_nulls_are_left_out_and_reasoning_goes_by_both_its_names():
    message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": None}
    assert seen(message) == {"role": "assistant", "content": ""}
    for name in ("reasoning_content", "thinking", "reasoning"):
        made = seen({"role": "assistant", "content": "4", name: "2 and 2"})
        assert made["reasoning_content"] == made["thinking"] == "2 and 2"


def called(arguments):
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": function}]}  # fmt: skip


def test_arguments_of_tool_calls_are_objects():
    for arguments, found in (
        ('{"a": [1, "é"]}', {"a": [1, "é"]}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (None, {}),
    ):
        made = seen(called(arguments))
        assert made["tool_calls"][0] == {
            "id": "c1", "type": "function", "function": {"name": "f", "arguments": found},
        }  # fmt: skip
    assert "tool_calls" not in seen({"role": "assistant", "content": "a", "tool_calls": []})
    odd = {"role": "assistant", "content": "a", "tool_calls": ["what", {"function": "f"}]}
    assert seen(odd)["tool_calls"] == odd["tool_calls"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ('{"a": ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is a list, must be a JSON object"),
        ('"a"', "is a str, must be a JSON object"),
        (7, "is a int, must be a JSON object"),
    ],
)
def test_arguments_that_are_no_object_are_refused_by_their_place(arguments, words):
    with pytest.raises(InvalidRequest, match=words) as caught:
        seen_messages([{"role": "user", "content": "a"}, called(arguments)], TEXT)
    assert caught.value.field == "messages[1].tool_calls[0].function.arguments"


def test_a_body_lets_parts_and_nulls_through_as_they_are():
    parts = [{**part, "cache_control": {"type": "ephemeral"}} for part in LIST]
    message = Message.model_validate({"role": "user", "content": parts, "tool_calls": None})
    assert message.plain(0) == {"role": "user", "content": LIST, "tool_calls": None}
    assert Message.model_validate({"role": "assistant"}).plain(0)["content"] is None


def test_the_older_file_of_special_tokens_counts_unless_the_newer_describes_its_tokens():
    newer = {"bos_token": "<a>", "add_bos_token": True, "pad_token": None, "unk_token": {"x": 1}}
    older = {"bos_token": {"content": "<b>"}, "additional_special_tokens": ["<c>"]}
    assert special_tokens(newer, older) == {"bos_token": "<b>"}
    assert special_tokens({**newer, "added_tokens_decoder": {}}, older) == {"bos_token": "<a>"}
    assert special_tokens({"extra_special_tokens": {"media": "<m>"}}, {}) == {"media": "<m>"}
