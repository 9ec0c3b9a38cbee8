"""Blocks of answers: found by the next turn, published, and kept for whoever asks."""

from dataclasses import replace

import pytest
from support.stepping import Engine, request

from engine.scheduling.block_changes import BlockChanges

SIZE = 4


def turn(engine, name, prompt, **fields):
    """Serve a prompt to its end; returns how many of its tokens were cached, and the answer."""
    asked = replace(request(name, prompt, max_tokens=12, ignore_eos=True), scope="acme\n", **fields)
    sequence = engine.submit(asked)
    engine.run()
    return sequence.num_prefix_hit_tokens, engine.tokens[name, 0]


def test_the_next_turn_finds_the_answer_up_to_its_last_token():
    engine = Engine()
    prompt = list(range(10))
    _, answer = turn(engine, "one", prompt)
    # Of the last token only the id is known: its KV was never computed.
    known = prompt + answer
    cached, _ = turn(engine, "two", [*known, 40, 41])
    assert cached == (len(known) - 1) // SIZE * SIZE == 20


@pytest.mark.parametrize("differs_at", range(10, 21))
def test_a_history_that_reads_otherwise_hits_up_to_the_first_other_token(differs_at):
    """A tokenizer may read an answer's text as other tokens than were drawn."""
    engine = Engine()
    prompt = list(range(10))
    _, answer = turn(engine, "one", prompt)
    history = prompt + answer
    history[differs_at] = 49 if history[differs_at] != 49 else 48
    cached, _ = turn(engine, "two", [*history, 40, 41])
    assert cached == differs_at // SIZE * SIZE


def test_an_answer_is_published_while_it_is_made():
    changes = BlockChanges()
    engine = Engine(changes=changes)
    engine.submit(request("one", list(range(10)), max_tokens=12, ignore_eos=True))
    counts = []
    while engine.scheduler.has_work:
        engine.step()
        counts.append(len(changes))
    # Two blocks of the prompt; then one with each fourth token.
    assert sorted(set(counts)) == [2, 3, 4, 5]


def test_a_kept_conversation_outlives_others_that_come_after_it():
    for keeps in (False, True):
        engine = Engine(num_blocks=48)
        prompt = list(range(8))
        _, answer = turn(engine, "one", prompt, keeps_prefix=keeps)
        for number in range(12):
            turn(engine, f"other-{number}", [20 + number] * 8)
        cached, _ = turn(engine, "two", [*prompt, *answer, 40])
        assert cached == (16 if keeps else 0)
