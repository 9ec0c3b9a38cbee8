"""A client that comes back gets exactly what it has not: nothing twice, nothing missing."""

import random

import pytest

from core.errors import InvalidRequest
from core.session import TokenDelta
from core.types import ChoiceFinished, FinishReason, SamplingParams, TextDelta
from router.choice_output import ChoiceOutput
from router.resuming import ReplyPositions, parse_event_id, split_positions


class Letters:
    """Every third token's text waits for the next one."""

    def __init__(self):
        self.held = ""

    def push(self, token_id):
        letter, held = chr(97 + token_id % 26), self.held
        self.held = held + letter if token_id % 3 == 0 else ""
        return "" if token_id % 3 == 0 else held + letter

    def flush(self):
        held, self.held = self.held, ""
        return held


def events_of(tokens, finish, sizes, stop, skip):
    """Run a choice over deltas of the given sizes."""
    output = ChoiceOutput(0, SamplingParams(stop=stop), Letters(), skip)
    events, at = [], 0
    while at < len(tokens) and output.finished is None:
        size = sizes.randint(1, 3)
        is_last = at + size >= len(tokens)
        delta = TokenDelta(
            "r", 0, 0, at, tuple(tokens[at : at + size]), finish=finish if is_last else None
        )
        events += output.accept(delta)
        at += size
    return [e for e in events if not isinstance(e, ChoiceFinished) or e.is_new]


def have_after(events):
    progress = ReplyPositions("r", 1, [0])
    for event in events:
        progress.note(0, event)
    return parse_event_id(progress.event_id)[1][0]


def told(events):
    tokens = [t for e in events if isinstance(e, TextDelta) for t in e.token_ids]
    text = "".join(e.text for e in events if isinstance(e, TextDelta))
    return tokens, text, [e.reason for e in events if isinstance(e, ChoiceFinished)]


@pytest.mark.parametrize("stop", [(), ("de",), ("b",)])
@pytest.mark.parametrize("finish", [FinishReason.LENGTH, FinishReason.STOP])
def test_a_stream_cut_anywhere_and_resumed_is_the_whole_stream(stop, finish):
    rng = random.Random(3)
    for _ in range(60):
        tokens = [rng.randrange(26) for _ in range(rng.randint(1, 12))]
        whole = events_of(tokens, finish, rng, stop, 0)
        for cut in range(len(whole) + 1):
            rest = events_of(tokens, finish, rng, stop, have_after(whole[:cut]))
            first, second = told(whole[:cut]), told(rest)
            assert tuple(a + b for a, b in zip(first, second, strict=True)) == told(whole), (
                tokens,
                cut,
            )


def test_positions_of_a_resumed_stream_begin_where_the_client_is():
    events = events_of(list(range(1, 9)), FinishReason.LENGTH, random.Random(1), (), 4)
    assert events[0].position == 4


@pytest.mark.parametrize(
    "text", ["", "r", "r:", ":1", "r:-1", "r:1,x", "r:99999999999", "r:" + "1," * 5000 + "1"]
)
def test_a_foreign_event_id_is_refused_by_name(text):
    with pytest.raises(InvalidRequest, match="Last-Event-ID"):
        parse_event_id(text)


def test_event_ids_survive_colons_in_the_request_id_and_are_shared_out_by_prompt():
    assert parse_event_id("a:b:3,4,5,6") == ("a:b", [3, 4, 5, 6])
    assert split_positions([3, 4, 5, 6], 2) == [(3, 4), (5, 6)]
    with pytest.raises(InvalidRequest, match="3 positions, the body has 2 prompts"):
        split_positions([1, 2, 3], 2)


def test_claimed_tokens_that_go_on_after_a_stop_string_are_refused_before_anything_is_submitted():
    output = ChoiceOutput(0, SamplingParams(stop=("b",)), Letters(), 4)
    with pytest.raises(InvalidRequest, match="stop string"):
        output.restore((2, 1, 4, 5))


def test_the_last_claimed_token_is_compared_with_the_one_that_is_computed():
    for computed in (4, 5):
        output = ChoiceOutput(0, SamplingParams(), Letters(), 3)
        output.restore((2, 1, 4))
        if computed == 4:
            output.accept(TokenDelta("r", 0, 0, 2, (4,)))
            output.accept(TokenDelta("r", 0, 0, 3, (9,)))
        else:
            with pytest.raises(InvalidRequest, match="says token 4 at position 2 of choice 0"):
                output.accept(TokenDelta("r", 0, 0, 2, (5,)))
