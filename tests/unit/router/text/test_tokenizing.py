"""The tokenizer's processes: what is refused, and one that died."""

from types import SimpleNamespace

import pytest
from support.models import TINY

from core.errors import (
    InvalidRequest,
    Unavailable,
)
from router.service import MAX_DETOKENIZE_TOKENS, GenerationService
from router.text.tokenizing import TokenizerPool


async def test_too_many_tokens_to_turn_into_text():
    service = GenerationService.__new__(GenerationService)
    service._builder = SimpleNamespace(check_model=lambda name: None)
    with pytest.raises(InvalidRequest, match=f"limit is {MAX_DETOKENIZE_TOKENS}"):
        await service.detokenize("", [0] * (MAX_DETOKENIZE_TOKENS + 1))


async def test_a_tokenizer_process_that_died_is_replaced():
    pool = TokenizerPool(TINY, 5.0)
    try:
        assert await pool.encode("a") == [97]
        process = pool._children._children[0]._process
        process.kill()
        await process.wait()
        assert await pool.encode("a") == [97]
    finally:
        await pool.stop()
    broken = TokenizerPool(TINY.parent / "nowhere", 5.0)
    with pytest.raises(Unavailable, match="ended before it was ready"):
        await broken.encode("a")
