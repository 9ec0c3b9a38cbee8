"""Who meets an SLO, who misses it, and whose end says nothing about the cluster."""

import pytest

from core.config import TierConfig
from core.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    QueueTimeout,
    RateLimited,
    TooLate,
    WorkerLost,
)
from core.timeline import Timeline
from router.calls import Call
from router.observe.attainment import MET, MISSED, result_of, result_of_call

SLO = TierConfig(slo_ttft_s=0.5, slo_tpot_s=0.1)
NO_LIMITS = TierConfig()


def line(ttft_s, *gaps_s):
    """A request that came at 10.0; one token a delivery."""
    made = Timeline(10.0)
    now_s = 10.0
    for step_s in (ttft_s, *gaps_s):
        now_s += step_s
        made.delivered(now_s, 1)
    return made


@pytest.mark.parametrize(
    ("tier", "timeline", "result"),
    [
        (SLO, line(0.5, 0.0625, 0.125), MET),
        (SLO, line(0.75, 0.0625), MISSED),
        (SLO, line(0.25, 0.0625, 0.25), MISSED),
        (TierConfig(slo_ttft_s=0.5), line(0.25, 9.0), MET),
        (TierConfig(slo_tpot_s=0.1), line(9.0, 0.0625), MET),
        (NO_LIMITS, line(9.0, 9.0), MET),
    ],
)
def test_both_limits_count_and_none_is_no_limit(tier, timeline, result):
    assert result_of(tier, timeline, None) == result


def test_one_token_needs_no_further_ones_and_an_echo_none():
    assert result_of(SLO, line(0.25), None) == MET
    assert result_of(SLO, Timeline(10.0), None) == MET


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (QueueTimeout("full"), MISSED),
        (WorkerLost("gone"), MISSED),
        (DeadlineExceeded("late"), MISSED),
        (Cancelled("left"), ""),
        (InvalidRequest("n", "is wrong"), ""),
        (RateLimited("over"), ""),
    ],
)
def test_what_the_cluster_did_misses_and_what_the_caller_did_counts_not(error, result):
    """Also if all its tokens came in time."""
    assert result_of(SLO, line(0.25), error) == result


@pytest.mark.parametrize(
    ("code", "outcome", "result"),
    [
        (TooLate.code, "rejected", MISSED),
        ("internal_error", "failed", MISSED),
        (RateLimited.code, "rejected", ""),
        ("cancelled", "cancelled", ""),
    ],
)
def test_a_call_without_a_request_is_judged_alike(code, outcome, result):
    assert result_of_call(Call("http", code=code, outcome=outcome)) == result
