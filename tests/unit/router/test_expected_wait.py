"""The prediction of a newcomer's wait, over tables: measured, unknown, and without sense."""

from math import inf, isclose, nan

import pytest

from core.session import Load, Role, WorkerDescriptor
from router.candidate import Candidate
from router.expected_wait import (
    MAX_PATIENCE_S,
    MIN_INTERVALS,
    MIN_PATIENCE_S,
    NUM_INTERVALS,
    Ahead,
    PrefillWork,
    ReleaseRate,
    expected_wait,
    prefill_work,
)

STEADY = [100.0 + 0.5 * n for n in range(MIN_INTERVALS + 1)]
LAST_S = STEADY[-1]


def rate_of(instants_s, is_awaited=True):
    rate = ReleaseRate()
    for now_s in instants_s:
        rate.released(now_s, is_awaited=is_awaited)
    return rate


INTERVALS = {
    "nothing is known at first": ([], 0.0, None),
    "few releases say nothing": (STEADY[:-1], LAST_S, None),
    "enough of them do": (STEADY, LAST_S, 0.5),
    "and still do a moment later": (STEADY, LAST_S + 4.9, 0.5),
    "after a stretch without releases they do not": (STEADY, LAST_S + MIN_PATIENCE_S + 0.1, None),
    "a step that ends several requests": ([100.0 + (n // 4) for n in range(1, 65)], 116.0, 15 / 62),
    "one pause is not what is usual": ([*STEADY, LAST_S + 4.0], LAST_S + 4.0, 0.5),
    "slow releases are waited for": ([60.0 * n for n in range(10)], 540.0 + 100.0, 60.0),
    "but not for ever": ([60.0 * n for n in range(10)], 540.0 + MAX_PATIENCE_S + 1, None),
    "after a longer one all is measured anew": ([*STEADY, LAST_S + 30.0], LAST_S + 30.0, None),
    "a clock that jumps back": (STEADY, LAST_S - 1000.0, None),
    "releases on a clock that jumped back": ([*STEADY, 1.0, 1.5], 1.5, None),
    "a clock that jumps ahead": (STEADY, LAST_S + 1e6, None),
    "releases on a clock that jumped ahead": (
        [*STEADY, *(1e6 + 0.5 * n for n in range(MIN_INTERVALS + 2))],
        1e6 + 4.5,
        0.5,
    ),
    "a clock that is none": ([*STEADY, nan], LAST_S, None),
    "an instant that is none": (STEADY, nan, None),
}


@pytest.mark.parametrize("case", INTERVALS)
def test_the_time_between_releases_is_known_of_late_or_not_at_all(case):
    instants_s, now_s, expected = INTERVALS[case]
    found = rate_of(instants_s).interval_s(now_s)
    assert found == expected or (expected and found and isclose(found, expected))


def test_releases_that_nobody_waits_for_say_nothing_of_how_fast_there_could_be_some():
    assert rate_of(STEADY, is_awaited=False).interval_s(LAST_S) is None
    rate = rate_of(STEADY)
    rate.released(LAST_S + 1.0, is_awaited=False)
    for n in range(1, NUM_INTERVALS):  # so slow comes what the few that come take
        rate.released(LAST_S + 1.0 + 3.0 * n, is_awaited=False)
    rate.released(LAST_S + 200.0, is_awaited=True)
    assert rate.interval_s(LAST_S + 200.0) is None
    rate.released(LAST_S + 200.1, is_awaited=True)
    assert rate.interval_s(LAST_S + 200.1) is None, "what was measured is long past"


def test_who_may_not_wait_shows_too_that_there_were_not_enough():
    rate = ReleaseRate()
    for now_s in STEADY:
        rate.released(now_s, is_awaited=False)
        rate.wanted()
    assert rate.interval_s(LAST_S) == 0.5


IDLE = PrefillWork()
WAITS = {
    "a free permit": (Ahead(3, 0, 0, is_free=True), 0.5, IDLE, 0.0, 0.0),
    "the next permit": (Ahead(4, 0, 0, is_free=False), 0.5, IDLE, 0.5, 0.5),
    "after three others": (Ahead(4, 3, 90, is_free=False), 0.5, IDLE, 2.0, 2.0),
    "an unknown rate": (Ahead(4, 3, 90, is_free=False), None, IDLE, 0.0, 0.0),
    "their prompts take longer": (
        Ahead(4, 3, 900, is_free=False), 0.5, PrefillWork(0.0, 100.0), 2.0, 9.0,
    ),
    "their prompts are computed meanwhile": (
        Ahead(4, 3, 100, is_free=False), 0.5, PrefillWork(0.0, 100.0), 2.0, 2.0,
    ),
    "workers are busy already": (
        Ahead(4, 3, 100, is_free=False), 0.5, PrefillWork(0.25, 100.0), 2.0, 2.25,
    ),
    "workers are busy, permits are free": (
        Ahead(3, 0, 0, is_free=True), None, PrefillWork(0.25, 100.0), 0.0, 0.25,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WAITS)
def test_a_newcomer_waits_for_permits_prompts_and_workers(case):
    ahead, interval_s, work, permit_s, first_token_s = WAITS[case]
    found = expected_wait(ahead, interval_s, work)
    assert (found.permit_s, found.first_token_s) == (permit_s, first_token_s)


DESCRIPTOR = WorkerDescriptor("w", Role.PREFILL, 1, "a", "b", "m", "digest", 16, 10_000, 65_536)


def worker(queued_tokens, tokens_per_s, head_tokens=0, head_started_s=0.0):
    made = Candidate(
        DESCRIPTOR,
        Load(),
        head_tokens=head_tokens,
        head_started_s=head_started_s,
        prefill_tokens_per_s=tokens_per_s,
    )
    object.__setattr__(made, "queued_tokens", queued_tokens)
    return made


WORKERS = {
    "none": ([], 0.0, inf),
    "one": ([worker(500, 1000.0)], 0.5, 1000.0),
    "the least busy of two counts": ([worker(500, 1000.0), worker(100, 500.0)], 0.2, 1500.0),
    "its first prompt is half done": ([worker(500, 1000.0, 400, 9.8)], 0.3, 1000.0),
    "its first prompt is overdue": ([worker(500, 1000.0, 400, 1.0)], 0.1, 1000.0),
    "its first prompt began in the future": ([worker(500, 1000.0, 400, 99.0)], 0.5, 1000.0),
    "an unmeasured one": ([worker(500, 0.0), worker(500, 1000.0)], 0.0, inf),
    "a speed that is no number": ([worker(500, nan)], 0.0, inf),
    "a negative speed": ([worker(500, -5.0)], 0.0, inf),
    "an endless speed": ([worker(500, inf, 400, 10.0)], 0.0, inf),
    "a negative queue": ([worker(-500, 1000.0)], 0.0, 1000.0),
    "a queue that is no number": ([worker(nan, 1000.0)], 0.0, 1000.0),
    "an endless queue": ([worker(inf, 1000.0)], 0.0, 1000.0),
    "a start that is no instant": ([worker(500, 1000.0, 400, nan)], 0.5, 1000.0),
}


@pytest.mark.parametrize("case", WORKERS)
def test_what_workers_report_counts_where_it_is_a_number(case):
    candidates, least_s, tokens_per_s = WORKERS[case]
    found = prefill_work(candidates, now_s=10.0)
    assert isclose(found.least_s, least_s, abs_tol=1e-9)
    assert found.tokens_per_s == tokens_per_s
