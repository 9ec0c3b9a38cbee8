"""How late one sender's KV comes, as far as its last hand-overs tell."""

import pytest

from router.workers.hand_overs import KEPT_S, HandOvers


def test_times_are_smoothed_for_each_route_and_over_all():
    times = HandOvers()
    assert (times.mean_s, times.by_receiver) == (0.0, {})
    times.note("a", 1.0, 0.0)
    times.note("b", 0.0, 0.0)
    times.note("a", 2.0, 0.0)
    assert times.by_receiver == pytest.approx({"a": 1.2, "b": 0.0})
    assert times.mean_s == pytest.approx(0.8 + 0.2 * 1.2)


def test_a_snapshot_does_not_change_with_what_comes_later():
    times = HandOvers()
    times.note("a", 1.0, 0.0)
    known = times.by_receiver
    times.note("a", 2.0, 0.0)
    assert known == {"a": 1.0}


def test_a_route_that_nobody_used_counts_as_not_measured():
    times = HandOvers()
    times.note("a", 1.0, 0.0)
    times.note("b", 3.0, 10.0)
    assert not times.forget_old(KEPT_S - 1)
    assert times.forget_old(KEPT_S) and times.by_receiver == {"b": 3.0}
    assert times.mean_s > 0.0
    assert times.forget_old(KEPT_S + 10) and (times.mean_s, times.by_receiver) == (0.0, {})
