"""Where faults stop, when a process counts as awake, and how changes are told."""

import asyncio
import logging

import pytest

from core.awake import AwakeClock
from core.changes import Changes
from core.containment import contained, fault_of
from core.errors import InternalError, PoolExhausted


def test_a_bug_is_told_as_an_internal_error_and_logged_once_with_its_traceback(caplog):
    told = []
    with contained("the delivery of tokens", told.append):
        raise ValueError("secret of a user")
    [fault] = told
    assert type(fault) is InternalError and "secret" not in fault.message
    assert fault.message.startswith("the delivery of tokens failed with ValueError")
    [record] = caplog.records
    assert record.levelno == logging.ERROR and "secret" in str(record.exc_info[1])


def test_an_error_of_the_tree_is_told_as_it_is_and_not_logged(caplog):
    error = PoolExhausted("no room")
    assert fault_of("a Submit", error) is error and caplog.records == []


def test_without_anybody_to_tell_every_fault_is_logged(caplog):
    with contained("meeting peers"):
        raise PoolExhausted("no room")
    assert [r.getMessage() for r in caplog.records] == ["meeting peers failed"]


def test_a_cancellation_passes():
    with pytest.raises(asyncio.CancelledError), contained("anything"):
        raise asyncio.CancelledError


class Hand:
    """A clock that is moved by hand."""

    def __init__(self):
        self.s = 100.0

    def now_s(self):
        return self.s


def test_time_asleep_does_not_count_whichever_task_runs_first_afterwards():
    hand = Hand()
    awake = AwakeClock(hand)
    for _ in range(4):
        hand.s += 0.5
        awake.tick()
    assert awake.now_s() == pytest.approx(2.0)
    hand.s += 60.0
    assert awake.now_s() == pytest.approx(3.0), "read before the tick"
    awake.tick()
    assert awake.now_s() == pytest.approx(3.0), "and after it"
    hand.s += 0.5
    assert awake.now_s() == pytest.approx(3.5)


async def test_many_changes_in_one_turn_wake_those_who_wait_once():
    changes = Changes()
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


async def test_a_change_between_the_look_and_the_wait_is_not_missed():
    changes = Changes()
    seen = changes.next
    changes.note()
    async with asyncio.timeout(5):
        await seen.wait()
