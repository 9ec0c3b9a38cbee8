"""When a process counts as awake."""

import pytest

from core.awake_clock import AwakeClock


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
