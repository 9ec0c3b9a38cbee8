"""The `Tokenizer` port: the same ids by every way, bounded, and refusals that name their field."""

import asyncio
import contextlib

import pytest
from support.byte_tokenizer import ByteTokenizer
from support.models import TINY

from core.errors import InvalidRequest, PromptTooLong
from core.types import ChatPrompt
from router.text.tokenizing import TokenizerPool

TEXTS = ["", "def main():", "日本 👩‍👩‍👧 \x00\u202e", "a" * 5_000]
TALK = ChatPrompt([{"role": "user", "content": "hello 日本"}])


@contextlib.asynccontextmanager
async def child_processes():
    pool = TokenizerPool(TINY, timeout_s=30.0)
    try:
        yield pool
    finally:
        await pool.stop()


@contextlib.asynccontextmanager
async def in_process():
    yield ByteTokenizer()


@pytest.fixture(params=[child_processes, in_process])
async def tokenizer(request):
    async with request.param() as tokenizer:
        yield tokenizer


async def test_a_text_has_the_same_ids_with_names_and_without(tokenizer):
    for text in TEXTS:
        for adds in (True, False):
            ids = await tokenizer.encode(text, adds_special_tokens=adds, tenant="acme")
            again, names = await tokenizer.encode_with_tokens(text, adds_special_tokens=adds)
            assert again == ids and len(names) == len(ids)
            assert all(isinstance(i, int) and i >= 0 for i in ids)


async def test_special_tokens_are_added_to_a_text_unless_they_are_not_wanted(tokenizer):
    whole = await tokenizer.encode("abc")
    plain = await tokenizer.encode("abc", adds_special_tokens=False)
    assert whole == await tokenizer.encode("abc", adds_special_tokens=True)
    assert plain and whole[len(whole) - len(plain) :] == plain


async def test_a_chat_has_ids_and_a_longer_one_has_more(tokenizer):
    one = await tokenizer.encode_chat(TALK, tenant="acme")
    two = await tokenizer.encode_chat(ChatPrompt(TALK.messages * 2))
    assert 0 < len(one) < len(two)


@pytest.mark.parametrize("text", ["hello 日本", "aaaa", "é"])
async def test_what_may_fit_is_counted_in_bytes_to_the_last_one(tokenizer, text):
    num_bytes = len(text.encode())
    assert await tokenizer.encode(text, max_bytes=num_bytes)
    with pytest.raises(PromptTooLong, match=f"{num_bytes} bytes"):
        await tokenizer.encode(text, max_bytes=num_bytes - 1)


async def test_a_chat_that_cannot_fit_is_refused_by_its_length(tokenizer):
    assert await tokenizer.encode_chat(TALK, max_bytes=1_000)
    with pytest.raises(PromptTooLong):
        await tokenizer.encode_chat(TALK, max_bytes=3)


async def test_refusals_name_the_field_and_end_nothing(tokenizer):
    with pytest.raises(InvalidRequest) as refused:
        await tokenizer.encode("\ud800")
    assert refused.value.field == "prompt"
    with pytest.raises(InvalidRequest) as refused:
        await tokenizer.encode_chat(ChatPrompt([{"role": "user", "content": 5}]))
    assert refused.value.field == "messages"
    assert await tokenizer.encode("abc")


async def test_many_at_once_are_not_mixed_up(tokenizer):
    texts = [chr(ord("a") + n) * (n + 1) for n in range(20)]
    alone = [await tokenizer.encode(text) for text in texts]
    assert await asyncio.gather(*map(tokenizer.encode, texts)) == alone
