"""Where a model's chat template is found, and what it refuses."""

import json

import pytest

from core.errors import InvalidRequest
from router.text.chat_template import ChatTemplates

TALK = [{"role": "user", "content": " Hi "}]


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
