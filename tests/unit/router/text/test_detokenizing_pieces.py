"""Pieces of text from tokens are those of the whole."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import TINY

from core.errors import ModelLoadError
from router.text.detokenizing import TextModel

TEXT = TextModel(TINY)


ANY_WORD = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


@settings(max_examples=200, deadline=None)
@given(ANY_WORD, ANY_WORD)
def test_detokenized_pieces_equal_one_decode_of_the_whole(prompt, text):
    model = TextModel(TINY)
    ids = list(text.encode())
    decoder = model.decoder(tuple(prompt.encode()))
    pieces = "".join([decoder.push(i) for i in ids] + [decoder.flush()])
    assert pieces == text


def test_an_incomplete_character_shows_at_the_end():
    decoder = TextModel(TINY).decoder(())
    assert decoder.push(0xE2) == "" and decoder.push(0x82) == ""
    assert "\ufffd" in decoder.flush()


# --- text -----------------------------------------------------------------------------------------


def test_tokens_as_text_and_as_bytes(tmp_path):
    assert (
        TEXT.token_bytes(97) == b"a"
        and TEXT.token_bytes(0xE6) == b"\xe6"
        and TEXT.name(257) == "<|end|>"
    )
    assert (
        TEXT.text([104, 105, 257]) == "hi<|end|>"
        and TEXT.text([104, 105, 257], skips_special=True) == "hi"
    )
    decoder = TEXT.decoder((97,), skips_special=False)
    assert (
        decoder.push(257) == "<|end|>"
        and decoder.push(0xE6) == ""
        and decoder.flush() == "\ufffd"
        and decoder.flush() == ""
    )
    with pytest.raises(ModelLoadError, match="holds no tokenizer"):
        TextModel(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        TextModel(tmp_path)
    tree = json.loads((TINY / "tokenizer.json").read_text())
    tree["decoder"] = {"type": "ByteFallback"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    plain = TextModel(tmp_path)
    plain.name = lambda token_id: "<0xE6>" if token_id == 1 else "b"
    assert plain.token_bytes(1) == b"\xe6" and plain.token_bytes(98) == b"b"
