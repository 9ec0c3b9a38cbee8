"""Tokens to text, one at a time: what the tokenizer says of the whole, and never an exception."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import TINY
from tokenizers import AddedToken, Tokenizer, decoders, models

from router.text.detokenizing import CONTEXT_TOKENS, StreamDecoder, TextModel, TextOffsets

SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = ("▁", "t", "h", "▁t", "▁th", "<|tool|>")
BYTES = [f"<0x{b:02X}>" for b in range(256)]
BYTE = len(SPECIAL)
"""Id of byte 0."""
WORD = BYTE + 256
"""Id of the first word."""


def fallback_of(folder, names):
    """A tokenizer as Llama 2's and Mistral's: words with a mark for the space, and 256 bytes."""
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextModel(folder)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    return fallback_of(tmp_path_factory.mktemp("fallback"), [*SPECIAL, *BYTES, *WORDS])


def raw(data):
    return [BYTE + b for b in data]


def told(model, prompt, output, **options):
    decoder = model.decoder(tuple(prompt), **options)
    return "".join([*(decoder.push(i) for i in output), decoder.flush()])


T, SPACE_T, SPACE_TH = WORD + 1, WORD + 3, WORD + 4


@pytest.mark.parametrize(("output", "text"), [
    ([*raw("é".encode()), SPACE_T], "é t"),
    ([*raw(b"\xc3\xa9\xe2\xff"), T, SPACE_TH], "é\ufffd\ufffdt th"),
    ([*raw(b"\xe2\x82"), SPACE_T, *raw("€".encode()), T], "\ufffd\ufffd t€t"),
    ([*raw(b"\xff"), *raw("é".encode())], "\ufffdé"),
    (raw(b"\xe2\x82"), "\ufffd\ufffd"),
    ([*raw(b"\xc3"), 1, *raw(b"\xa9"), T], "ét"),
])  # fmt: skip
def test_broken_bytes_show_as_such_and_what_follows_is_right(fallback, output, text):
    assert told(fallback, [T], output) == text


def test_a_character_is_told_with_its_last_byte_and_a_broken_one_with_the_byte_that_breaks_it(
    fallback,
):
    decoder = fallback.decoder((T,))
    steps = [decoder.push(i) for i in [*raw(b"\xc3\xa9\xe2\xff"), T]]
    assert steps == ["", "é", "", "\ufffd\ufffd", "t"]


FALLBACK_IDS = st.lists(st.integers(0, WORD + len(WORDS) - 1), max_size=24)


@settings(max_examples=300, deadline=None)
@given(FALLBACK_IDS, FALLBACK_IDS, st.booleans())
def test_no_stream_of_tokens_raises_or_is_kept_back(fallback, prompt, output, skips_special):
    """Between two bytes that cannot belong together everything has been told."""
    decoder = fallback.decoder(tuple(prompt), skips_special=skips_special)
    for token_id in output:
        decoder.push(token_id)
        decoder.push(WORD + 1)
        assert decoder.flush() == ""


PIECES = st.lists(
    st.one_of(
        st.sampled_from([[WORD + i] for i in range(len(WORDS))]),
        st.characters(blacklist_categories=("Cs",)).map(lambda c: raw(c.encode())),
        st.sampled_from([[i] for i in range(len(SPECIAL))]),
    ),
    max_size=20,
)


@settings(max_examples=300, deadline=None)
@given(PIECES, PIECES, st.booleans())
def test_pieces_equal_one_decode_of_the_whole(fallback, prompt, output, skips_special):
    before = [T, *(i for piece in prompt for i in piece)]
    after = [i for piece in output for i in piece]
    start = fallback.text(before, skips_special=skips_special)
    whole = fallback.text([*before, *after], skips_special=skips_special)
    assert start + told(fallback, before, after, skips_special=skips_special) == whole


@pytest.mark.parametrize("num_special", [0, 1, 5, 6, 40])
def test_special_tokens_at_the_end_of_a_prompt_cost_the_output_no_space(fallback, num_special):
    prompt = [T, *[2] * num_special]
    assert told(fallback, prompt, [SPACE_T, T]) == " tt"
    begun = [T, *raw(b"\xf0\x9f\x98"), *[2] * num_special]
    assert told(fallback, begun, raw(b"\x80")) == "\U0001f600"


@settings(max_examples=200, deadline=None)
@given(PIECES, st.integers(0, 60))
def test_a_decoder_that_begins_after_a_part_of_the_output_goes_on_with_it(fallback, pieces, cut):
    ids = [T, *(i for piece in pieces for i in piece)]
    cut = min(cut, len(ids) - 1) + 1
    first = told(fallback, [T], ids[1:cut])
    if not first.endswith("\ufffd") and ids[cut - 1] >= WORD:
        assert first + told(fallback, ids[:cut], ids[cut:]) == told(fallback, [T], ids[1:])


OUTPUT = st.binary(max_size=24)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs",)), max_size=8), OUTPUT)
def test_bytes_of_a_byte_level_tokenizer_are_told_as_one_decode_of_the_output(prompt, output):
    model = TextModel(TINY)
    assert told(model, prompt.encode(), output) == model.text(list(output))


@pytest.mark.parametrize(("output", "text"), [
    (b"to be", "to be"), (b"\x98\x80!", "\U0001f600!"), (b"\xff!", "\ufffd!"),
])  # fmt: skip
def test_a_prompt_that_ends_inside_a_character_is_not_told_again(fallback, output, text):
    assert told(TextModel(TINY), b"hello wor\xf0\x9f", output) == text
    assert told(fallback, raw(b"hello wor\xf0\x9f"), raw(output)) == text


@pytest.mark.parametrize(("output", "text"), [
    (b"to be", "hello wor\ufffdto be"), (b"\x98\x80!", "hello wor\U0001f600!"),
    (b"", "hello wor\ufffd"), (b"\xff!", "hello wor\ufffd\ufffd!"),
])  # fmt: skip
def test_an_echo_and_its_output_are_one_text_whatever_character_they_share(output, text):
    model, prompt = TextModel(TINY), tuple(b"hello wor\xf0\x9f")
    assert model.echo(prompt) == "hello wor"
    assert model.echo(prompt) + told(model, prompt, output, completes=True) == text


def test_an_echo_keeps_the_characters_before_the_one_that_its_end_began(fallback):
    prompt = (T, *raw("é".encode() + b"\xe2\x82"))
    assert fallback.echo(prompt) == "té"
    assert told(fallback, prompt, raw(b"\xac"), completes=True) == "€"


def test_pieces_of_text_are_named_with_their_space(fallback):
    names = [fallback.token_text(i) for i in (WORD, T, SPACE_T, SPACE_TH, raw(b" ")[0])]
    assert names == [" ", "t", " t", " th", " "]
    assert [fallback.token_bytes(i) for i in (WORD, SPACE_TH)] == [b" ", b" th"]
    assert fallback.token_text(SPACE_T, is_first=True) == "t"
    assert fallback.token_text(raw(b"\xe2")[0]) == "\ufffd"


def test_pieces_keep_their_space_where_bytes_are_first_in_the_vocabulary(tmp_path):
    model = fallback_of(tmp_path, [*BYTES, *WORDS, *SPECIAL])
    names = [model.token_text(len(BYTES) + i) for i in range(len(WORDS))]
    assert names == [word.replace("▁", " ") for word in WORDS]


@settings(max_examples=300, deadline=None)
@given(PIECES)
def test_names_of_tokens_are_the_text_and_stand_where_it_says(fallback, pieces):
    ids = [i for piece in pieces for i in piece if i >= BYTE]
    text = told(fallback, [T], ids, skips_special=False)
    offsets = TextOffsets(fallback, fallback.decoder((T,), skips_special=False), 100)
    begins = [offsets.begin(i) - 100 for i in ids]
    data = b"".join(fallback.token_bytes(i) for i in ids)
    assert data.decode() == text
    sizes = [len(fallback.token_bytes(i)) for i in ids]
    starts = [len(data[: sum(sizes[:n])].decode(errors="ignore")) for n in range(len(ids))]
    assert begins == starts


def test_what_follows_a_broken_character_stands_behind_it(fallback):
    ids = [*raw(b"\xe2"), T, SPACE_T]
    offsets = TextOffsets(fallback, fallback.decoder((T,)))
    assert told(fallback, [T], ids) == "\ufffdt t"
    assert [offsets.begin(i) for i in ids] == [0, 1, 2]


def test_a_text_that_begins_with_a_space_in_bytes_loses_it_as_the_whole_does(fallback):
    assert told(fallback, [1], [*raw(b" "), T]) == fallback.text(
        [1, *raw(b" "), T], skips_special=True
    )


def test_tokens_that_a_model_has_no_row_for_are_named_in_the_order_of_their_ids(fallback):
    ids = range(WORD, WORD + len(WORDS))
    assert list(fallback.beyond(WORD).items()) == list(zip(ids, WORDS, strict=True))
    assert fallback.beyond(WORD + len(WORDS)) == {}


def test_ids_without_a_name_have_no_text(fallback):
    assert told(fallback, [T], [99999, SPACE_T]) == " t"
    whole = [T, *raw(b"\xe2\x82"), 99999, *raw(b"\xac")]
    assert fallback.text(whole) == "t€"
    assert told(fallback, whole[:1], whole[1:]) == told(fallback, whole[:4], whole[4:]) == "€"


def test_tokens_of_other_decoders_are_told_as_one_decode_of_the_whole(tmp_path):
    tree = json.loads((TINY / "tokenizer.json").read_text())
    tree["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    model = TextModel(tmp_path)
    ids = list(b"abc")
    assert "a " + told(model, ids[:1], ids[1:]).lstrip() == model.text(ids)


def test_a_tokenizer_without_a_decoder_tells_its_tokens_as_they_are(tmp_path):
    tree = json.loads((TINY / "tokenizer.json").read_text())
    tree["decoder"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    model = TextModel(tmp_path)
    assert told(model, b"a", b"bc") == " b c"


class _Chained:
    """A tokenizer that writes each token after the one before it."""

    broken_bytes, is_byte_level, longest = "replace", False, 0

    def is_hidden(self, token_id, *, skips_special):
        return False

    def own_bytes(self, token_id):
        return None

    def text(self, token_ids):
        self.longest = max(self.longest, len(token_ids))
        pairs = zip([None, *token_ids], token_ids, strict=False)
        return "".join(f"{before}>{token_id} " for before, token_id in pairs)


def test_a_token_is_decoded_after_the_last_few_before_it_however_many_there_were():
    model = _Chained()
    decoder = StreamDecoder(model, (1, 2, 3))
    told = [decoder.push(token_id) for token_id in range(4, 40)]
    assert told == [f"{token_id - 1}>{token_id} " for token_id in range(4, 40)]
    assert model.longest == CONTEXT_TOKENS + 1
