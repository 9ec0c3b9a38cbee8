"""Which consumers are woken in which turn of the loop."""

import asyncio

from router.turns import MAX_WOKEN, Turns


def consumers(count):
    return [asyncio.Event() for _ in range(count)]


def woken(events):
    return [index for index, event in enumerate(events) if event.is_set()]


async def test_so_many_are_woken_in_a_turn_and_the_others_after_them_in_order():
    turns, events = Turns(), consumers(2 * MAX_WOKEN + 1)
    for event in events:
        turns.wake(event)
    assert woken(events) == list(range(MAX_WOKEN)) and turns.is_behind
    await asyncio.sleep(0)
    assert woken(events) == list(range(2 * MAX_WOKEN)) and turns.is_behind
    await asyncio.sleep(0)
    assert woken(events) == list(range(2 * MAX_WOKEN + 1)) and not turns.is_behind


async def test_who_waits_keeps_its_place_and_has_only_one():
    turns, events = Turns(), consumers(2 * MAX_WOKEN + 2)
    for event in events:
        turns.wake(event)
    for event in reversed(events):
        turns.wake(event)
    await asyncio.sleep(0)
    assert woken(events) == list(range(2 * MAX_WOKEN))
    await asyncio.sleep(0)
    assert woken(events) == list(range(2 * MAX_WOKEN + 2))
    for event in events:
        event.clear()
    for _ in range(3):
        await asyncio.sleep(0)
    assert woken(events) == [], "each was woken once"


async def test_who_is_awake_takes_no_place():
    turns, [awake, *others] = Turns(), consumers(MAX_WOKEN)
    for _ in range(MAX_WOKEN):
        turns.wake(awake)
    for event in others:
        turns.wake(event)
    assert len(woken(others)) == len(others) and not turns.is_behind


async def test_after_a_pause_nobody_waits_for_a_turn():
    turns, events = Turns(), consumers(MAX_WOKEN)
    for _ in range(2):
        for event in events:
            event.clear()
            turns.wake(event)
        assert len(woken(events)) == MAX_WOKEN
        await asyncio.sleep(0)
        await asyncio.sleep(0)
