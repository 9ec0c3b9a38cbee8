"""How those who wait learn of changes."""

import asyncio

from core.change_event import ChangeEvent


async def test_many_changes_in_one_turn_wake_those_who_wait_once():
    changes = ChangeEvent()
    woken = 0

    async def waiter():
        nonlocal woken
        while True:
            await changes.next.wait()
            woken += 1

    task = asyncio.create_task(waiter())
    await asyncio.sleep(0)
    for _ in range(1000):
        changes.note()
    for _ in range(5):
        await asyncio.sleep(0)
    assert woken == 1
    changes.note()
    for _ in range(5):
        await asyncio.sleep(0)
    assert woken == 2
    task.cancel()


async def test_what_is_waited_for_behind_a_burst_is_a_change_after_it():
    """One wake-up for the burst, not one for each change: a second would be no change."""
    changes = ChangeEvent()
    changes.note()
    seen = []
    asyncio.get_running_loop().call_soon(lambda: seen.append(changes.next))
    changes.note()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not seen[0].is_set()


async def test_a_change_between_the_look_and_the_wait_is_not_missed():
    changes = ChangeEvent()
    seen = changes.next
    changes.note()
    async with asyncio.timeout(5):
        await seen.wait()
