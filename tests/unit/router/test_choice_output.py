"""Where a choice ends by its text: stop strings, `min_tokens`,
and special tokens that are hidden."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import TINY
from support.replies import Letters

from core.errors import (
    InvariantViolation,
    WorkerLost,
)
from core.session import TokenDelta
from core.types import (
    ChoiceFinished,
    FinishReason,
    SamplingParams,
    TextDelta,
)
from router.choice_output import ChoiceOutput
from router.text.detokenizing import TextModel


def letters(position, text, finish=None, **more):
    return TokenDelta("r", 0, 0, position, tuple(map(ord, text)), finish=finish, **more)


def run_choice(pieces, stop=(), finish=FinishReason.LENGTH):
    choice, text, events, position = (
        ChoiceOutput(0, SamplingParams(stop=tuple(stop)), Letters()),
        "",
        [],
        0,
    )
    for index, piece in enumerate(pieces):
        is_last = index == len(pieces) - 1
        events += choice.accept(letters(position, piece, finish if is_last else None))
        position += len(piece)
    text = "".join(e.text for e in events if isinstance(e, TextDelta))
    return text, choice, events


def choice(**sampling):
    return ChoiceOutput(0, SamplingParams(**sampling), TextModel(TINY).decoder((97,)))


def delta(position, text, finish=None):
    return TokenDelta("r", 0, 0, position, tuple(text.encode()), finish=finish)


END = 257
"""Id of `<|end|>`, a special token."""


def talk(output, size=1, hidden_stops=(), finish=FinishReason.LENGTH, stop_token_id=None, **given):
    """Deliver an output in deltas of some tokens; returns its text and what ended it."""
    sampling = SamplingParams(max_tokens=100, **given)
    skips = sampling.skip_special_tokens
    decoder = TextModel(TINY).decoder((97,), skips_special=skips)
    choice, text = ChoiceOutput(0, sampling, decoder, hidden_stops=hidden_stops), ""
    for at in range(0, len(output), size):
        part, is_last = tuple(output[at : at + size]), at + size >= len(output)
        delta = TokenDelta(
            "r", 0, 0, at, part, finish=finish if is_last else None,
            stop_token_id=stop_token_id if is_last else None,
        )  # fmt: skip
        text += "".join(e.text for e in choice.accept(delta) if isinstance(e, TextDelta))
    return text, choice.finished


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(("min_tokens", "text"), [
    (0, "a"), (1, "a"), (2, "a.b"), (3, "a.b"), (4, "a.b.."), (5, "a.b..c"), (9, "a.b..c.d"),
])  # fmt: skip
def test_stops_are_looked_for_after_min_tokens_only(size, min_tokens, text):
    """A stop is found where all of it comes later than the first `min_tokens` tokens."""
    found = talk(b"a.b..c.d", size, stop=(".",), min_tokens=min_tokens)
    assert found[0] == {4: "a.b."}.get(min_tokens, text)
    assert found[1].reason is (FinishReason.LENGTH if min_tokens == 9 else FinishReason.STOP)


def test_a_stop_that_begins_before_min_tokens_is_none():
    assert talk(b"aabbcc", stop=("ab",), min_tokens=2)[0] == "aabbcc"
    assert talk(b"aabbccab", stop=("ab",), min_tokens=2)[0] == "aabbcc"


@pytest.mark.parametrize("stops", [("ab", "abc"), ("abc", "ab")])
def test_of_stops_that_come_in_one_piece_at_one_place_the_longest_is_shown(stops):
    """It is seen in what an output keeps of its stop string, and in the name of what ended it."""
    decoder = SimpleNamespace(push=lambda _: "xxabcyy", flush=lambda: "")
    choice = ChoiceOutput(0, SamplingParams(stop=stops, include_stop=True), decoder)
    events = choice.accept(TokenDelta("r", 0, 0, 0, (1,)))
    assert (events[0].text, choice.finished.stop_match) == ("xxabc", "abc")


@pytest.mark.parametrize(("includes", "text"), [(False, "hi"), (True, "hi<|end|>")])
def test_a_hidden_special_token_ends_the_text_as_the_stop_string_it_is(includes, text):
    found, finished = talk(
        [*b"hi", END],
        hidden_stops=((END, "<|end|>"),),
        finish=FinishReason.STOP,
        stop_token_id=END,
        stop=("<|end|>",),
        include_stop=includes,
    )
    assert (found, finished.reason) == (text, FinishReason.STOP)
    assert finished.stop_match == "<|end|>"


@pytest.mark.parametrize(("includes", "text"), [(False, "hi"), (True, "hi<|end|>")])
def test_a_shown_special_token_is_found_in_the_text(includes, text):
    found, finished = talk(
        [*b"hi", END, *b"yo"], stop=("<|end|>",), include_stop=includes, skip_special_tokens=False
    )
    assert (found, finished.stop_match) == (text, "<|end|>")


def test_only_what_may_become_a_stop_is_kept_back():
    pieces = iter(["xy", "xya", "by"])
    decoder = SimpleNamespace(push=lambda _: next(pieces), flush=lambda: "")
    choice = ChoiceOutput(0, SamplingParams(stop=("abc",)), decoder)
    told = [choice.accept(TokenDelta("r", 0, 0, at, (1,)))[0].text for at in range(3)]
    assert told == ["xy", "xy", "aby"]


@pytest.mark.parametrize(("completes", "stop", "text"), [
    (False, "to", "go "), (False, "wor", "go to be"), (False, "\ufffd", "go to be"),
    (True, "to", "\ufffdgo "),
])  # fmt: skip
def test_a_prompt_that_ends_inside_a_character_has_no_part_in_a_stop(completes, stop, text):
    decoder = TextModel(TINY).decoder((*b"hello wor\xf0\x9f",), completes=completes)
    choice = ChoiceOutput(0, SamplingParams(max_tokens=100, stop=(stop,)), decoder)
    delta = TokenDelta("r", 0, 0, 0, tuple(b"go to be"), finish=FinishReason.LENGTH)
    events = choice.accept(delta)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == text
    assert (choice.finished.reason is FinishReason.STOP) == (stop == "to")


def test_a_choice_that_is_over_takes_nothing_and_an_end_alone_releases_what_was_held():
    held = choice(stop=("xyz",))
    assert [e.text for e in held.accept(delta(0, "axy"))] == ["a"]
    last = held.accept(TokenDelta("r", 0, 0, 3, (), finish=FinishReason.LENGTH))
    assert (
        last[0].text == "xy"
        and last[1].reason is FinishReason.LENGTH
        and held.accept(delta(3, "b")) == []
    )
    empty = choice()
    assert empty.accept(TokenDelta("r", 0, 0, 0, ())) == []
    split = choice(stop=("\ufffd",))
    split.accept(TokenDelta("r", 0, 0, 0, (0xE6,)))
    assert (
        split.accept(TokenDelta("r", 0, 0, 1, (), finish=FinishReason.LENGTH))[-1].stop_match
        == "\ufffd"
    )


@settings(max_examples=300, deadline=None)
@given(
    st.text("abc", min_size=1, max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_text_ends_before_the_first_stop_string_however_tokens_arrive(text, stop, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if text[a:b]]
    got, choice, events = run_choice(pieces, stop)
    ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    expected = text[: min(ends)[1]] if ends else text
    assert got == expected
    assert choice.finished.reason is (FinishReason.STOP if ends else FinishReason.LENGTH)
    assert len(choice.token_ids) == (min(ends)[0] if ends else len(text)), (
        "usage counts up to the match"
    )
    assert sum(isinstance(e, ChoiceFinished) for e in events) == 1


def test_equal_positions_are_dropped_unequal_ones_are_a_violation_missing_ones_redo():
    choice = ChoiceOutput(0, SamplingParams(), Letters())
    choice.accept(letters(0, "abc"))
    assert choice.accept(letters(1, "bc")) == []
    assert choice.accept(letters(2, "cd"))[0].token_ids == (ord("d"),)
    with pytest.raises(InvariantViolation, match="were delivered"):
        choice.accept(letters(0, "x"))
    with pytest.raises(WorkerLost, match="positions 4 to 5"):
        choice.accept(letters(6, "z"))
