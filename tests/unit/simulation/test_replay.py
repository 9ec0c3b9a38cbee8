"""The replay of a trace: queues, hits, policies, sessions."""

import pytest

from simulation.replay import Policy, Replay, ReplayPlan
from simulation.traces import Trace, TraceRequest


def replay(
    requests, policy=Policy.COST, workers=2, cache_tokens=100_000, block=100, rate=1_000.0, **more
):
    plan = ReplayPlan(workers, cache_tokens, rate, policy, **more)
    return Replay(Trace(tuple(requests), block), plan).run()


def test_a_worker_computes_one_prompt_after_another_and_only_what_it_lacks():
    ids = tuple(range(11))
    found = replay([TraceRequest(0.0, 1_050, 1, ids), TraceRequest(0.5, 1_050, 1, ids)], workers=1)
    # The second waits 0.55 s for the first; then 50 tokens are left: the last block is not full.
    assert found["ttft_p99_s"] == pytest.approx(1.05)
    assert found["ttft_mean_s"] == pytest.approx((1.05 + 0.6) / 2)
    assert found["token_hit_rate"] == pytest.approx(1_000 / 2_100)
    assert found["ideal_token_hit_rate"] == pytest.approx(0.5)


def test_prompts_of_the_warm_up_fill_the_caches_and_are_in_no_figure_of_ttft():
    ids = tuple(range(11))
    requests = [TraceRequest(at_s, 1_050, 1, ids) for at_s in (0.0, 5.0, 9.0)]
    answered = []
    found = replay(requests, workers=1, warm_up_s=5.0)
    assert found["ttft_mean_s"] == pytest.approx(0.05)
    assert found["token_hit_rate"] == pytest.approx(2_000 / 3_150), "of the whole trace"
    plan = ReplayPlan(1, 100_000, 1_000.0, warm_up_s=5.0)
    Replay(Trace(tuple(requests), 100), plan, answered.append).run()
    assert answered == [1, 2, 3]


def conversations(number, turns):
    """Every prompt begins with the same block; each conversation grows by five blocks a turn."""
    return [
        TraceRequest(
            turn * 0.5 * number + 0.4 * chat,
            100 + 500 * (turn + 1) + 1,
            1,
            (0, *(1_000 * (chat + 1) + block for block in range(5 * (turn + 1)))),
        )
        for turn in range(turns)
        for chat in range(number)
    ]


def test_conversations_stay_where_they_are_cached_and_the_shared_block_gathers_nobody():
    requests = conversations(60, 4)
    by_cost = replay(requests, workers=4)
    turns = replay(requests, Policy.ROUND_ROBIN, workers=7)
    assert by_cost["token_hit_rate"] > 0.98 * by_cost["ideal_token_hit_rate"]
    assert by_cost["load_imbalance"] < 1.3
    assert turns["token_hit_rate"] < 0.7 * by_cost["token_hit_rate"]
    assert by_cost["ttft_mean_s"] < turns["ttft_mean_s"]


def test_a_burst_of_one_new_prefix_is_computed_by_few_before_anybody_tells():
    ids = tuple(range(50))
    burst = [TraceRequest(0.0, 5_001, 1, ids) for _ in range(6)]
    found = replay(burst, workers=4)
    assert found["token_hit_rate"] == pytest.approx(5 * 5_000 / (6 * 5_001), rel=0.25)


def test_nobody_waits_for_a_prefix_that_was_evicted():
    """Each prompt fills a worker's cache; that of the first is used again by the third."""

    def prompt(arrival_s, first):
        return TraceRequest(arrival_s, 1_001, 1, tuple(range(first, first + 10)))

    before = [prompt(2.0 * i, 100 * i) for i in range(3)]
    both_busy = [prompt(6.0, 300), prompt(6.1, 400)]
    found = replay([*before, *both_busy, prompt(6.2, 0)], cache_tokens=1_100)
    # It goes to the worker that is free first, at 7.001.
    assert found["token_hit_rate"] == 0.0
    assert found["ttft_p99_s"] == pytest.approx(1.802)


def test_a_small_cache_keeps_less():
    requests = conversations(12, 6)
    small = replay(requests, workers=4, cache_tokens=4_000)
    large = replay(requests, workers=4)
    assert 0 < small["token_hit_rate"] < 0.7 * large["token_hit_rate"]


def test_a_prompt_larger_than_the_cache_is_computed_and_not_kept():
    ids = tuple(range(50))
    found = replay([TraceRequest(t, 5_001, 1, ids) for t in (0.0, 9.0)], cache_tokens=2_000)
    assert found["token_hit_rate"] == 0.0


def test_least_queued_knows_no_caches_and_round_robin_no_queues():
    ids = tuple(range(10))
    requests = [TraceRequest(float(t * 5), 1_001, 1, ids) for t in range(4)]
    # The idle worker that comes first, again and again.
    assert replay(requests, Policy.LEAST_QUEUED)["load_imbalance"] == 2.0
    assert replay(requests, Policy.ROUND_ROBIN)["load_imbalance"] == 1.0


def test_a_turn_is_sent_when_the_one_before_it_has_ended():
    turns = [TraceRequest(t, 2_001, 1, tuple(range(20)), "s") for t in (0.0, 1.0, 9.0)]
    found = replay(turns, workers=1)
    # 2 s for the first, so that the second is late; none ever waits for another.
    assert found["ttft_p99_s"] == pytest.approx(2.001)
    assert found["ttft_p50_s"] == pytest.approx(0.001)
