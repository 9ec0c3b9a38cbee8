"""Blocks of answers: found by the next turn, published, and kept for whoever asks."""

from dataclasses import replace

import pytest
from support.stepping import Engine, request

from core import block_hash as block_hash_module
from core.scopes import with_public
from engine.scheduling.block_changes import BlockChanges

SIZE = 4


def turn(engine, name, prompt, **fields):
    """Serve a prompt to its end; returns how many of its tokens were cached, and the answer."""
    asked = request(name, prompt, max_tokens=12, ignore_eos=True)
    asked = replace(asked, **{"scope": "acme\n", **fields})
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


PUBLIC = list(range(14))
"""Three full blocks of four tokens, and half of one."""


def test_tenants_share_exactly_the_blocks_that_are_public():
    engine = Engine()
    prompt = [*PUBLIC, 30, 31, 32, 33, 34, 35, 36]
    cached = {}
    for name, tenant in (("a", "acme"), ("b", "bulk"), ("c", "acme"), ("d", "bulk")):
        cached[name], _ = turn(engine, name, prompt, scope=with_public(f"{tenant}\n", 14))
    assert cached == {"a": 0, "b": 12, "c": 20, "d": 20}
    assert turn(engine, "e", prompt, scope="acme\n")[0] == 0, "the same text, not made public"
    assert turn(engine, "f", prompt, scope="bulk\n")[0] == 0


def test_an_answer_after_a_public_beginning_is_the_tenants_own():
    engine = Engine()
    mine = with_public("acme\n", 14)
    _, answer = turn(engine, "one", PUBLIC, scope=mine)
    history = [*PUBLIC, *answer, 40]
    assert turn(engine, "two", history, scope=with_public("bulk\n", 14))[0] == 12
    assert turn(engine, "three", history, scope=mine)[0] == 24


def test_what_follows_two_public_beginnings_of_one_name_is_not_mixed_up(monkeypatch):
    """Names lead only: the number of the last public block stands for all of them."""
    monkeypatch.setattr(block_hash_module, "DIGEST_BYTES", 1)
    engine = Engine(num_blocks=1024)
    scope = with_public("acme\n", 14)
    prompts = [[first, *PUBLIC[1:], 30, 31, 32, 33, 34, 35, 36] for first in range(50)]
    # Of the names after the branch some are equal, by chance.
    for number, prompt in enumerate(prompts):
        turn(engine, f"first-{number}", prompt, scope=scope)
    for number, prompt in enumerate(prompts):
        cached, answer = turn(engine, f"again-{number}", prompt, scope=scope)
        assert cached >= 12
        assert answer == turn(Engine(), "fresh", prompt, scope=scope)[1]


def test_public_blocks_that_were_evicted_leave_nothing_behind_that_is_found():
    engine = Engine(num_blocks=24)
    mine = with_public("acme\n", 14)
    prompt = [*PUBLIC, 30, 31, 32, 33, 34, 35, 36]
    turn(engine, "one", prompt, scope=mine)
    for number in range(6):
        turn(engine, f"other-{number}", [20 + number] * 20)
    cached, _ = turn(engine, "two", prompt, scope=mine)
    assert cached == 0
    assert turn(engine, "three", prompt, scope=mine)[0] == 20
