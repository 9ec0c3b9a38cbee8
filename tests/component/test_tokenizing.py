"""Texts and templates against transformers, and what hostile ones can do:
nothing to anybody else."""

import asyncio
import json
import shutil

import pytest
from support.models import TINY
from transformers import AutoTokenizer

from core.errors import InvalidRequest, Unavailable
from core.types import ChatPrompt
from router.text.tokenizing import TokenizerPool

CHAT = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "Naïve 日本 {{ 7*7 }} 👩‍👩‍👧 <|end|>?"},
    {"role": "assistant", "content": " Yes \n"},
    {"role": "user", "content": "And {% raw %} now?"},
]
TEMPLATES = {
    "tiny": None,
    "trim": (
        "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'system' %}\n[{{ "
        "m.content | trim }}]\n    {% endif %}\n{{ m.role }}: {{ m.content | trim }}{{ eos_token "
        "}}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif "
        "%}{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + "
        "m.content|length %}{% endfor %}{{ ns.n }}"
    ),
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "slices": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] "
        "%}{% set messages = messages[1:] %}{% endif %}{{ system }}{% for m in messages %}{{ "
        "m['content'].split('?')[0].strip() }}|{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ "
        "m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "variable": "{{ 'deep' if enable_thinking else 'quick' }} {{ messages[-1].content }}",
}


@pytest.fixture()
async def pool():
    made = TokenizerPool(TINY, timeout_s=5.0, num_processes=2)
    yield made
    await made.stop()


def folder_with(tmp_path, template, **config):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    path = folder / "tokenizer_config.json"
    tree = json.loads(path.read_text())
    if template is not None:
        tree["chat_template"] = template
    path.write_text(json.dumps({**tree, **config}))
    return folder


@pytest.mark.parametrize("name", TEMPLATES)
async def test_chats_become_the_same_tokens_as_in_transformers(tmp_path, name):
    folder = folder_with(tmp_path, TEMPLATES[name])
    theirs, ours = AutoTokenizer.from_pretrained(folder), TokenizerPool(folder, 5.0)
    try:
        for adds in (True, False):
            for variables in ({}, {"enable_thinking": True}):
                expected = theirs.apply_chat_template(
                    CHAT, add_generation_prompt=adds, tokenize=True, return_dict=False, **variables
                )
                assert (
                    await ours.encode_chat(ChatPrompt(CHAT, variables, adds_generation_prompt=adds))
                    == expected
                )
        if name in ("tiny", "trim"):
            chat = [*CHAT, {"role": "assistant", "content": "The answer is "}]
            expected = theirs.apply_chat_template(
                chat, continue_final_message=True, tokenize=True, return_dict=False
            )
            wish = ChatPrompt(chat, adds_generation_prompt=False, continues_final=True)
            assert await ours.encode_chat(wish) == expected
    finally:
        await ours.stop()


async def test_texts_become_the_same_tokens_as_in_transformers(pool):
    theirs = AutoTokenizer.from_pretrained(TINY)
    for text in ("", "def main():", "日本 👩‍👩‍👧 \x00\u202e", "a" * 50_000, "<|begin|> <|end|>"):
        assert await pool.encode(text) == theirs.encode(text)
        ids, tokens = await pool.encode_with_tokens(text, adds_special_tokens=False)
        assert ids == theirs.encode(
            text, add_special_tokens=False
        ) and tokens == theirs.convert_ids_to_tokens(ids)


HOSTILE = {
    "other's attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "not allowed|refused"),
    "globals": ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "not allowed|refused"),
    "mutation": ("{{ messages.append(1) }}", "not allowed|refused"),
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "took longer than 0.6 s",
    ),
    "huge": ("{{ 'a' * 10000000000 }}", "memory|refused"),
    "huge in pieces": (
        "{% for a in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
        "render to more than",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "memory|refused"),
    "its own error": ("{{ raise_exception('only one turn') }}", "only one turn"),
    "syntax": ("{% for %}", "not a valid template"),
    "nothing": ("{{ messages[99].content.x }}", "refused"),
    "zero": ("{{ 1 // 0 }}", "refused"),
    "endless power": ("{{ 9**(9**9) }}", "took longer|refused|memory"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_template_harms_nobody(name):
    template, message = HOSTILE[name]
    pool = TokenizerPool(TINY, timeout_s=0.6, num_processes=2)
    try:
        await pool.start()
        await asyncio.gather(pool.encode("warm"), pool.encode("warm"))
        attack = asyncio.ensure_future(pool.encode_chat(ChatPrompt(CHAT, template=template)))
        await asyncio.sleep(0.01)
        assert await pool.encode("ab") == [97, 98]
        with pytest.raises((InvalidRequest, Unavailable), match=message):
            await attack
        assert await pool.encode("ab") == [97, 98]
        assert await asyncio.gather(*(pool.encode("ab") for _ in range(9))) == [[97, 98]] * 9
    finally:
        await pool.stop()


async def test_limits_and_missing_templates_are_named(tmp_path, pool):
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        await pool.encode("\ud800")
    with pytest.raises(InvalidRequest, match="limit is 4194304"):
        await pool.encode("a" * (5 << 20))
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        await pool.encode_chat(
            ChatPrompt(CHAT, template="{{ messages[0].content }}", continues_final=True)
        )
    bare = TokenizerPool(folder_with(tmp_path, ""), 5.0)
    with pytest.raises(InvalidRequest, match="no chat template"):
        await bare.encode_chat(ChatPrompt(CHAT))
    await bare.stop()
    listed = folder_with(
        tmp_path / "b", [{"name": "tool", "template": "x"}, {"name": "default", "template": "dd"}]
    )
    pool2 = TokenizerPool(listed, 5.0)
    assert await pool2.encode_chat(ChatPrompt(CHAT)) == list(b"dd")
    await pool2.stop()
    (listed / "chat_template.jinja").write_text("file")
    pool3 = TokenizerPool(listed, 5.0)
    assert await pool3.encode_chat(ChatPrompt(CHAT)) == list(b"file")
    await pool3.stop()


async def test_truncation_and_padding_that_were_saved_with_the_tokenizer_are_off(tmp_path):
    folder = folder_with(tmp_path, None)
    path = folder / "tokenizer.json"
    saved = {
        "truncation": {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": {
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 261,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        },
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **saved}))
    theirs, ours = AutoTokenizer.from_pretrained(folder), TokenizerPool(folder, 5.0)
    try:
        for text in ("abc", "a long text"):
            assert await ours.encode(text) == list(text.encode()) == theirs.encode(text)
    finally:
        await ours.stop()


NAMED = "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ media }}|{{ pad_token is defined }}"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bos_token": None},
        {"bos_token": None, "added_tokens_decoder": {}},
        {"image_token": "<|user|>", "bos_token": {"content": "<|pad|>", "__type": "AddedToken"}},
        {"extra_special_tokens": {"media": "<|system|>"}},
        {"pad_token": None},
    ],
)
@pytest.mark.parametrize(
    "older", [{}, {"bos_token": "<|begin|>"}, {"eos_token": {"content": "<|user|>"}}]
)
async def test_templates_know_the_special_tokens_that_they_know_in_transformers(
    tmp_path, changes, older
):
    folder = folder_with(tmp_path, NAMED, **changes)
    if older:
        (folder / "special_tokens_map.json").write_text(json.dumps(older))
    theirs, ours = AutoTokenizer.from_pretrained(folder), TokenizerPool(folder, 5.0)
    try:
        expected = theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False)
        assert await ours.encode_chat(ChatPrompt(CHAT)) == expected
    finally:
        await ours.stop()


async def test_a_cancelled_order_does_not_put_the_pipe_out_of_step(pool):
    task = asyncio.create_task(pool.encode("x" * 1_000_000))
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await pool.encode("ab") == [97, 98]
