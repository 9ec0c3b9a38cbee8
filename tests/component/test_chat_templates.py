"""Published chat templates over a grid of conversations, side by side with transformers.

The templates are data: `tests/data/chat_templates/README.md` names their source. More of them can
be tried: `BATON_CHAT_TEMPLATES=FOLDER` names a folder of `*.jinja` files.
"""

import functools
import json
import os
import re
from pathlib import Path

import jinja2
import pytest
from support.models import TINY
from transformers import AutoTokenizer

from core.errors import InvalidRequest
from router.text.chat_template import ChatTemplates

DATA = Path(__file__).parent.parent / "data" / "chat_templates"
MORE = os.environ.get("BATON_CHAT_TEMPLATES")
FOLDERS = [DATA, *([Path(MORE)] if MORE else [])]
FILES = [path for folder in FOLDERS for path in sorted(folder.glob("*.jinja"))]
ROOM = 1 << 20
NOT_PLAIN = re.compile("'type'|\"type\"")
PRINTED_NULL = re.compile("None|null<")


def text(role, content, **more):
    return {"role": role, "content": content, **more}


def parts(role, *texts):
    return text(role, [{"type": "text", "text": one} for one in texts])


def call(name, arguments, number=0):
    function = {"name": name, "arguments": arguments}
    return {"id": f"call00{number}", "type": "function", "function": function}


SYSTEM, USER = text("system", " Be brief. "), text("user", "What is 2 + 2?\n")
ANSWER, AGAIN = text("assistant", "4"), text("user", "And {{ 3 }} + 3?")
CALL = call("add", {"a": 1, "b": {"of": ["é", None]}})
CALLS = text("assistant", None, tool_calls=[CALL])
RESULT = text("tool", "42", tool_call_id="call000", name="add")
CONVERSATIONS = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, AGAIN],
    "system and turns": [SYSTEM, USER, ANSWER, AGAIN],
    "ends with the assistant": [USER, ANSWER],
    "empty contents": [text("system", ""), text("user", ""), text("assistant", ""), AGAIN],
    "no content": [USER, text("assistant", None), AGAIN],
    "nulls": [USER, text("assistant", "4", tool_calls=None, refusal=None, name=None), AGAIN],
    "a tool call": [USER, CALLS],
    "a tool call and its result": [USER, CALLS, RESULT],
    "a tool call with text": [USER, text("assistant", "Well.", tool_calls=[CALL]), RESULT, ANSWER],
    "a call without arguments": [USER, text("assistant", "", tool_calls=[call("now", {})]), RESULT],
    "two calls": [
        SYSTEM,
        USER,
        text("assistant", None, tool_calls=[CALL, call("now", {}, 1)]),
        RESULT,
        text("tool", "noon", tool_call_id="call001"),
        ANSWER,
        AGAIN,
    ],
    "parts": [USER, ANSWER, parts("user", "Look:", "here")],
    "one part": [parts("user", "Look")],
    "parts of all": [parts("user", "Look"), parts("assistant", "Yes", "."), parts("user", "And?")],
    "developer": [text("developer", "Be brief."), USER],
    "reasoning": [USER, text("assistant", "4", reasoning_content="2 and 2"), AGAIN],
    "thinking": [USER, text("assistant", "4", thinking="2 and 2"), AGAIN],
    "inline reasoning": [USER, text("assistant", "<think>\n2 and 2\n</think>\n\n4"), AGAIN],
    "two users": [USER, AGAIN],
    "an unknown role": [USER, text("critic", "Wrong."), AGAIN],
}


@pytest.fixture(scope="session")
def theirs():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="session")
def ours():
    return ChatTemplates(TINY)


def render_theirs(tokenizer, source, messages, **options):
    """What transformers makes of messages, or None where it, or the template, refuses them."""
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, **options
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError):
        return None


@functools.cache
def takes(tokenizer, source):
    """Tried out: whether a template shows a text, and whether it shows a list of parts."""
    shown = []
    for message in (text("user", "probe"), parts("user", "probe")):
        found = render_theirs(tokenizer, source, [message]) or ""
        is_dumped = "'type'" in found or '"type"' in found
        shown.append("probe" in found and not is_dumped)
    return shown


def as_for_transformers(tokenizer, source, messages, null=""):
    """By hand, what one would give to transformers for such a template."""
    takes_text, takes_parts = takes(tokenizer, source)
    made = []
    for message in messages:
        content, role = message["content"], message["role"]
        content = null if content is None else content
        if isinstance(content, list) and not takes_parts:
            content = "\n".join(part["text"] for part in content)
        if isinstance(content, str) and not takes_text:
            content = [{"type": "text", "text": content}] if content else []
        if role == "developer" and "'developer'" not in source and '"developer"' not in source:
            role = "system"
        made.append({**message, "content": content, "role": role})
    return made


def as_from_clients(messages):
    """As it comes over HTTP: arguments are JSON text."""
    made = json.loads(json.dumps(messages))
    for message in made:
        for one in message.get("tool_calls") or ():
            one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
    return made


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_template_sees_what_transformers_shows_it(path, theirs, ours):
    source, num_shown = path.read_text(encoding="utf-8"), 0
    for name, messages in CONVERSATIONS.items():
        for adds in (True, False):
            expected, as_null = (
                render_theirs(
                    theirs,
                    source,
                    as_for_transformers(theirs, source, messages, null),
                    add_generation_prompt=adds,
                )
                for null in ("", None)
            )
            try:
                found = ours.render(
                    as_from_clients(messages), {}, source,
                    adds_generation_prompt=adds, max_characters=ROOM,
                )  # fmt: skip
            except InvalidRequest:
                found = None
            assert found == expected, name
            if path.parent == DATA and as_null is not None and not PRINTED_NULL.search(as_null):
                assert found == as_null, name
            num_shown += found is not None
    assert num_shown >= 8


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_message_is_gone_on_with_where_transformers_goes_on(path, theirs, ours):
    source, num_shown = path.read_text(encoding="utf-8"), 0
    for content in ("The answer is ", "four", "s", "\n\n4 \n", "i", "</s>", " "):
        for final in (text("assistant", content), parts("assistant", "So", content)):
            messages = [USER, final]
            expected = render_theirs(
                theirs, source, as_for_transformers(theirs, source, messages),
                continue_final_message=True,
            )  # fmt: skip
            if expected is None or NOT_PLAIN.search(expected):
                continue
            found = ours.render(
                messages, {}, source,
                adds_generation_prompt=False, continues_final=True, max_characters=ROOM,
            )  # fmt: skip
            assert found == expected, (content, final)
            num_shown += 1
    assert num_shown >= 3
