"""What cannot fit by its bytes: the bound holds for every text,
and is not claimed where it may not."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import TINY
from tokenizers import Tokenizer

from core.errors import PromptTooLong
from router.text.text_bounds import check_bytes, longest_token_bytes

TOKENIZER = Tokenizer.from_file(str(TINY / "tokenizer.json"))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=80))
def test_no_text_has_fewer_tokens_than_its_bytes_say(text):
    longest = longest_token_bytes(TINY)
    for whole in (text, text + "<|assistant|>" * 3, "<|extra_0|>" + text):
        assert len(TOKENIZER.encode(whole).ids) * longest >= len(whole.encode())


def test_the_longest_token_may_be_a_special_one():
    assert longest_token_bytes(TINY) == len("<|assistant|>")


def folder_with(tmp_path, **changes):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_composition_is_allowed_for(tmp_path):
    assert longest_token_bytes(folder_with(tmp_path, normalizer={"type": "NFC"})) == 39


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed"},
                    {"type": "ByteLevel", "add_prefix_space": False},
                ],
            }
        },
        {
            "added_tokens": [
                {"id": 256, "content": "<|x|>", "special": True, "lstrip": True, "rstrip": False}
            ]
        },
    ],
)
def test_where_text_may_be_dropped_nothing_is_claimed(tmp_path, changes):
    assert longest_token_bytes(folder_with(tmp_path, **changes)) is None


def test_bytes_count_not_characters():
    check_bytes("\u65e5" * 10, 30)
    check_bytes("\u65e5" * 10, 0)
    with pytest.raises(PromptTooLong, match="33 bytes and cannot fit.*at most 30"):
        check_bytes("\u65e5" * 11, 30)
