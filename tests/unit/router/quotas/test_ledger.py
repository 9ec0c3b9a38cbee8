"""The books of a key: copies merge in any order, and no 60 seconds hold more than the limit."""

from hypothesis import given
from hypothesis import strategies as st

from router.quotas.ledger import (
    MAX_RUNS,
    NOTHING,
    WINDOW_S,
    Amount,
    Ledger,
    Run,
    Slot,
    fits,
    less,
    reset_s,
    share_of,
    wait_s,
)

LIMITS = Amount(0, 1000)
numbers = st.integers(0, 50)
slots = st.dictionaries(
    st.tuples(st.sampled_from("abc"), st.integers(0, 3)),
    st.builds(Slot, numbers, numbers, numbers, numbers),
    max_size=8,
)
runs = st.dictionaries(
    st.sampled_from("xyz"),
    st.builds(
        Run, st.integers(1, 3), st.sampled_from("ab"), st.booleans(), numbers, numbers, numbers
    ),
    max_size=3,
)
copies = st.builds(lambda s, r: Ledger("a", s, r), slots, runs)


def merged(*ledgers):
    made = Ledger("a")
    for ledger in ledgers:
        made.merge(ledger.slots, ledger.runs)
    return made.slots, made.runs


def tokens(ledger, now_s):
    return ledger.used(now_s).tokens


@given(copies, copies, copies)
def test_copies_merge_in_any_order_and_any_number_of_times(a, b, c):
    assert merged(a, b) == merged(b, a)
    ab = Ledger("a", *merged(a, b))
    bc = Ledger("a", *merged(b, c))
    assert merged(ab, c) == merged(a, bc) == merged(c, a, b, a, c)
    assert merged(a, a) == merged(a)


def test_a_copy_that_is_behind_takes_nothing_away():
    ledger = Ledger("a")
    ledger.charge(10, Amount(1, 100))
    old = ledger.copy()
    ledger.charge(10, Amount(1, 50))
    ledger.refund(10, Amount(0, 30))
    ledger.merge(old.slots, old.runs)
    assert ledger.used(10) == (2, 120)


def test_a_copy_is_not_written_with_the_original():
    ledger = Ledger("a")
    copy = ledger.copy()
    copy.charge(1, Amount(1, 1))
    copy.begin("x", "o", Amount(1, 1), 1000)
    assert ledger.slots == {}
    assert ledger.runs == {}


def test_routers_are_added_up_and_own_ones_are_told_apart():
    here, there = Ledger("a"), Ledger("b")
    here.charge(5, Amount(1, 10))
    there.charge(5, Amount(1, 20))
    there.charge(6, Amount(2, 5))
    here.merge(there.slots, {})
    assert here.used(6) == (4, 35)
    assert here.own_used(6) == (1, 10)
    assert here.by_second(6) == {5: (2, 30), 6: (2, 5)}


def test_a_second_counts_for_sixty_full_seconds_after_its_end():
    ledger = Ledger("a")
    ledger.charge(100, Amount(1, 10))
    assert tokens(ledger, 100 + WINDOW_S) == 10
    assert tokens(ledger, 100 + WINDOW_S + 1) == 0
    ledger.prune(100 + WINDOW_S)
    assert ledger.slots
    ledger.prune(100 + WINDOW_S + 1)
    assert not ledger.slots


def test_no_more_is_refunded_than_was_charged():
    ledger = Ledger("a")
    ledger.refund(3, Amount(1, 5))
    assert ledger.slots == {}
    ledger.charge(3, Amount(1, 10))
    ledger.charge(4, Amount(1, 10))
    for _ in range(2):
        ledger.refund(3, Amount(1, 8))
    assert ledger.by_second(4) == {3: (0, 0), 4: (1, 10)}


@given(st.lists(st.tuples(st.integers(0, 150), st.integers(1, 400)), max_size=60))
def test_no_sixty_seconds_hold_more_than_the_limit(arrivals):
    """The oracle adds up instants, in milliseconds, and knows no slots."""
    ledger = Ledger("a")
    granted = []
    for now_s, size in sorted(arrivals):
        now_ms = now_s * 1000 + size * 2
        ledger.prune(now_ms // 1000)
        if fits(ledger.used(now_ms // 1000), Amount(1, size), LIMITS):
            ledger.charge(now_ms // 1000, Amount(1, size))
            granted.append((now_ms, size))
    for start_ms, _ in granted:
        held = sum(size for at, size in granted if start_ms <= at <= start_ms + 60_000)
        assert held <= LIMITS.tokens


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 400)), max_size=20),
    st.integers(1, 1000),
)
def test_what_is_told_to_wait_fits_then_and_not_a_second_before(charged, size):
    ledger = Ledger("a")
    for second, amount in charged:
        ledger.charge(second, Amount(1, amount))
    amount = Amount(1, size)
    wait = wait_s(ledger.by_second(60), amount, LIMITS, 60.25)
    assert fits(ledger.used(int(60.25 + wait)), amount, LIMITS)
    if wait:
        assert not fits(ledger.used(int(60.25 + wait - 1)), amount, LIMITS)
    else:
        assert fits(ledger.used(60), amount, LIMITS)


def test_each_limit_is_looked_at_and_none_is_no_limit():
    assert fits(Amount(9, 999), Amount(1, 1), Amount(10, 1000))
    assert not fits(Amount(10, 0), Amount(1, 0), Amount(10, 0))
    assert not fits(Amount(0, 1000), Amount(1, 1), Amount(0, 1000))
    assert fits(Amount(10**9, 10**9), Amount(1, 10**9), NOTHING)
    # A limit may have been lowered: what costs nothing still passes.
    assert fits(Amount(11, 1001), NOTHING, Amount(10, 1000))


def test_a_share_is_never_no_limit():
    assert share_of(Amount(10, 1000), 4) == (2, 250)
    assert share_of(Amount(1, 0), 4) == (1, 0)


def test_less_never_goes_below_nothing():
    assert less(Amount(1, 10), Amount(2, 4)) == (0, 6)


def test_all_is_reset_when_the_last_of_it_has_left():
    ledger = Ledger("a")
    ledger.charge(10, Amount(1, 5))
    ledger.charge(30, Amount(1, 0))
    assert reset_s(ledger.by_second(40), 40.5) == (50.5, 30.5)
    ledger.refund(10, Amount(0, 5))
    assert reset_s(ledger.by_second(40), 40.5) == (50.5, 0.0)
    assert reset_s({}, 40.5) == (0.0, 0.0)


# --- requests that their clients have named -------------------------------------------------------


def began(ledger, name, owner, tokens, now_ms):
    """What a run finds paid."""
    paid = ledger.paid(name)
    ledger.begin(name, owner, Amount(1, tokens), now_ms)
    return paid


def test_a_further_run_pays_only_what_the_earlier_ones_have_not():
    ledger = Ledger("a")
    assert began(ledger, "x", "one", 100, 5_000) == NOTHING
    assert began(ledger, "x", "two", 100, 6_000) == (1, 100)
    assert began(ledger, "x", "three", 150, 7_000) == (1, 100)
    assert began(ledger, "x", "four", 20, 8_000) == (1, 150)
    assert began(ledger, "y", "five", 7, 8_000) == NOTHING


def test_only_the_last_run_may_refund():
    ledger = Ledger("a")
    ledger.begin("x", "one", Amount(1, 100), 5_000)
    ledger.begin("x", "two", Amount(1, 100), 6_000)
    assert not ledger.settle("x", "one", Amount(1, 10))
    assert ledger.settle("x", "two", Amount(1, 30))
    assert ledger.paid("x") == (1, 30)


def test_runs_are_charged_anew_once_the_first_charge_has_left_the_window():
    ledger = Ledger("a")
    ledger.begin("x", "one", Amount(1, 100), 5_000)
    ledger.begin("x", "two", Amount(1, 100), 60_000)
    ledger.prune(65)
    assert ledger.paid("x") == (1, 100)
    ledger.prune(66)
    assert ledger.paid("x") == NOTHING


def test_a_run_that_was_forgotten_refunds_what_it_has_not_used():
    """A later one has paid for itself."""
    assert Ledger("a").settle("x", "one", Amount(1, 10))


def test_a_settled_run_counts_before_its_unsettled_copy_and_a_later_run_before_both():
    ledger = Ledger("a")
    ledger.begin("x", "one", Amount(1, 100), 5_000)
    unsettled = ledger.copy()
    ledger.settle("x", "one", Amount(1, 40))
    settled = ledger.copy()
    ledger.merge({}, unsettled.runs)
    assert ledger.runs == settled.runs
    later = unsettled.copy()
    later.begin("x", "two", Amount(1, 100), 6_000)
    ledger.merge({}, later.runs)
    assert ledger.runs == later.runs


def test_named_requests_are_bounded_and_the_oldest_are_forgotten():
    ledger = Ledger("a")
    for index in range(MAX_RUNS + 3):
        ledger.begin(f"x{index}", "one", Amount(1, 1), index)
    ledger.prune(1)
    assert len(ledger.runs) == MAX_RUNS
    assert "x2" not in ledger.runs
    assert "x3" in ledger.runs


def test_a_ledger_moves_to_another_clock_as_a_whole():
    ledger = Ledger("a")
    ledger.charge(10, Amount(1, 5))
    ledger.begin("x", "one", Amount(1, 5), 10_000)
    ledger.shift(1000)
    assert ledger.by_second(1010) == {1010: (1, 5)}
    ledger.prune(1010)
    assert ledger.paid("x") == (1, 5)
