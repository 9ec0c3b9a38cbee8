"""What the fault search takes for certain of quotas: its record's bounds, on rows of few asks."""

import pytest

from simulation.quota_record import FREE, LEAST_RUNS, QuotaAsk, QuotaCost, Troubles, least, most

ENDED = QuotaCost(1, 30)


def ask(at_s=10.0, name="r", router="a", tokens=100, **fields):
    fields = {"answered_s": at_s + 0.01, "is_granted": True, **fields}
    return QuotaAsk(router, "key", name, QuotaCost(1, tokens), at_s, **fields)


def bounds(asks, reader="a", now_s=20.0, **troubles):
    known = Troubles(**troubles)
    return least(asks, reader, now_s, now_s, known), most(asks, now_s, known)


def test_an_estimate_counts_until_the_end_and_then_what_was_used():
    assert bounds([ask()]) == (QuotaCost(1, 100), QuotaCost(1, 100))
    assert bounds([ask(ended_s=12.0, used=ENDED)]) == (ENDED, ENDED)
    # Just now, so that others may not have heard of it.
    assert bounds([ask(ended_s=19.9, used=ENDED)]) == (ENDED, QuotaCost(1, 100))


def test_what_a_request_used_beyond_its_estimate_counts_from_its_end():
    assert bounds([ask(ended_s=12.0, used=QuotaCost(1, 170))])[1] == QuotaCost(1, 170)
    late = ask(ended_s=75.0, used=QuotaCost(1, 170))
    assert bounds([late], now_s=80.0)[1] == QuotaCost(0, 70)


def test_a_charge_leaves_after_a_minute():
    assert bounds([ask(at_s=10.0)], now_s=60.0) == (QuotaCost(1, 100), QuotaCost(1, 100))
    assert bounds([ask(at_s=10.0)], now_s=70.0) == (FREE, QuotaCost(1, 100))
    assert bounds([ask(at_s=10.0)], now_s=80.0) == (FREE, FREE)
    assert bounds([ask(at_s=10.0)], now_s=80.0, missed_s=10.0)[1] == QuotaCost(1, 100)
    assert bounds([ask(at_s=10.0)], now_s=60.0, gained_s=10.0)[0] == FREE


def test_runs_of_one_name_count_once_and_others_apart():
    twice = [ask(at_s=10.0, ended_s=11.0, used=ENDED), ask(at_s=14.0, router="b")]
    assert bounds(twice) == (QuotaCost(1, 100), QuotaCost(1, 100))
    assert bounds([ask(name="r"), ask(name="s")])[0] == QuotaCost(2, 200)
    local = [ask(), ask(at_s=14.0, is_local=True)]
    assert bounds(local) == (QuotaCost(1, 100), QuotaCost(2, 200)), "each may have paid for itself"


def test_a_charge_pays_for_some_runs_for_sure_and_for_no_more():
    runs = [ask(at_s=10.0 + i, ended_s=10.5 + i, used=ENDED) for i in range(LEAST_RUNS + 1)]
    assert bounds(runs[:-1])[1] == ENDED
    assert bounds(runs) == (ENDED, QuotaCost(LEAST_RUNS + 1, 30 * (LEAST_RUNS + 1)))


def test_one_that_another_run_leans_on_is_not_refunded():
    first = ask(ended_s=15.0, used=ENDED)
    second = ask(at_s=12.0, router="b", ended_s=15.0, used=ENDED)
    assert bounds([first, second])[1] == QuotaCost(1, 100)
    second = ask(at_s=14.0, router="b", ended_s=15.0, used=ENDED)
    first.ended_s = 12.0
    assert bounds([first, second])[1] == ENDED


def test_one_whose_next_run_fell_back_on_its_router_may_be_leaned_on_too():
    """The call that failed may have begun that run: the first refunds nothing, the second pays."""
    first = ask(ended_s=15.0, used=ENDED)
    second = ask(at_s=14.0, router="b", ended_s=16.0, used=ENDED, is_local=True)
    assert bounds([first, second])[1] == QuotaCost(2, 130)
    # It also may have if its router then refused it.
    refused = ask(at_s=14.0, router="b", is_granted=False, is_local=True)
    assert bounds([first, refused], at_s=[14.005], now_s=25.0)[1] == QuotaCost(1, 100)


def test_what_was_settled_or_has_no_run_in_the_store_is_not_leaned_on():
    second = ask(at_s=14.0, router="b", ended_s=16.0, used=ENDED, is_local=True)
    settled = ask(ended_s=12.0, used=ENDED)
    assert bounds([settled, second])[1] == QuotaCost(2, 60)
    of_another = ask(name="s", ended_s=15.0, used=ENDED)
    assert bounds([of_another, second])[1] == QuotaCost(2, 60)
    alone = ask(ended_s=15.0, used=ENDED, is_local=True)
    assert bounds([alone, second])[1] == QuotaCost(2, 60)
    later = ask(at_s=14.5, ended_s=15.0, used=ENDED)
    assert bounds([second, later])[1] == QuotaCost(2, 60)
    nameless = [ask(name="", ended_s=15.0, used=ENDED), ask(at_s=14.0, name="", is_local=True)]
    assert bounds(nameless)[1] == QuotaCost(2, 130)


@pytest.mark.parametrize(("is_local", "lost_at_s"), [(True, -1.0), (False, 12.0)])
def test_others_need_not_know_what_is_not_in_the_store_until_all_was_well(is_local, lost_at_s):
    asks = [ask(is_local=is_local)]
    at_s = [10.0, 12.0]
    for reader, now_s, known in (
        ("a", 13.0, QuotaCost(1, 100)),
        ("b", 13.0, FREE),
        ("b", 20.0, QuotaCost(1, 100)),
    ):
        assert bounds(asks, reader, now_s, at_s=at_s, lost_at_s=lost_at_s)[0] == known
    died = {"a": 12.0}
    assert bounds(asks, "b", at_s=at_s, lost_at_s=lost_at_s, died=died)[0] == FREE


def test_a_call_in_trouble_may_have_charged_twice_until_all_was_well():
    asks = [ask()]
    assert bounds(asks, now_s=13.0, at_s=[10.005])[1] == QuotaCost(2, 200)
    assert bounds(asks, now_s=20.0, at_s=[10.005])[1] == QuotaCost(1, 100)
    refused = [ask(is_granted=False)]
    assert bounds(refused, now_s=13.0, at_s=[10.005])[1] == QuotaCost(1, 100)
    assert bounds(refused, now_s=13.0)[1] == FREE
    left = [ask(is_granted=False, answered_s=None, left_s=10.01)]
    assert bounds(left, now_s=10.3)[1] == QuotaCost(1, 100)
    assert bounds(left, now_s=13.0)[1] == FREE
    assert bounds(left, now_s=13.0, died={"a": 10.1}, at_s=[10.1])[1] == QuotaCost(1, 100)


def test_the_end_of_a_request_at_a_router_that_died_may_be_unknown():
    asks = [ask(ended_s=12.0, used=ENDED)]
    assert bounds(asks, died={"a": 12.1}, at_s=[12.1])[1] == QuotaCost(1, 100)
    assert bounds(asks, died={"a": 14.0}, at_s=[14.0])[1] == ENDED
    assert bounds(asks, died={"a": 14.0}, at_s=[14.0, 16.0], lost_at_s=16.0)[1] == QuotaCost(1, 100)
