"""Public prompts: their file, their tokens, and how much of a prompt is public."""

import json

import pytest

from core.config import BatonConfig, known_keys
from core.errors import ConfigError, InvalidRequest
from router.public_prompts import MAX_FILE_BYTES, MAX_PROMPTS, PublicPrompts, read_prompts


class Bytes:
    """Tokens are bytes; the template puts each message in brackets, and refuses one."""

    async def encode_chat(self, chat, *, tenant="", max_bytes=0):
        text = "".join(f"<{m['role']}:{m['content']}>" for m in chat.messages)
        if "refused" in text:
            raise InvalidRequest("messages", "has a system prompt; leave it out")
        return list(text.encode())


async def started(*texts):
    public = PublicPrompts(texts)
    await public.start(Bytes())
    return public


async def test_all_of_a_public_prompt_is_public_and_what_the_template_puts_around_it():
    public = await started("be brief", "be brief and kind")
    for text, shared in (
        ("<system:be brief><user:hello>", "<system:be brief><user:"),
        ("<system:be brief and kind><user:hello>", "<system:be brief and kind><user:"),
        ("<system:be brief and odd><user:hello>", ""),
        ("<system:be brief", ""),
        ("<system:be brief><user?", ""),
        ("<user:hello>", ""),
        ("", ""),
    ):
        assert public.num_tokens(list(text.encode())) == len(shared), text
        assert public.num_tokens(tuple(text.encode())) == len(shared)


async def test_before_the_start_and_without_prompts_nothing_is_public():
    assert PublicPrompts(["a"]).num_tokens([1, 2]) == 0
    assert (await started()).num_tokens([1, 2]) == 0


async def test_a_prompt_that_the_template_refuses_is_named_at_the_start():
    with pytest.raises(ConfigError, match="prompt 2 cannot begin a conversation: .*leave it out"):
        await started("fine", "refused")


def test_the_file_is_a_list_of_texts(tmp_path):
    path = tmp_path / "prompts.json"
    assert read_prompts("") == ()
    path.write_text(json.dumps(["one", "two"]))
    assert read_prompts(str(path)) == ("one", "two")
    for wrong in ({"a": 1}, ["one", 2], [""], "one", ["x"] * (MAX_PROMPTS + 1), ["x" * (1 << 20)]):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match="JSON list of at most 64 texts"):
            read_prompts(str(path))
    path.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="is not JSON"):
        read_prompts(str(path))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_prompts(str(tmp_path / "missing"))


def test_the_reference_has_the_limits_of_the_file():
    told = dict(known_keys(BatonConfig))["router.public_prompts"].description
    assert f"at most {MAX_PROMPTS} system prompts" in told
    assert f"in {MAX_FILE_BYTES >> 20} MiB" in told
