"""Who is next and who makes room, when several tenants wait in one line."""

from hypothesis import given, settings
from hypothesis import strategies as st

from router.fair_queue import MAX_LEFT, FairQueue


def taken(line):
    out = []
    while (waiter := line.take()) is not None:
        out.append(waiter)
    return out


def test_tenants_take_turns_and_each_keeps_its_order():
    line = FairQueue(10)
    for waiter in ("a1", "a2", "a3", "b1", "c1", "b2"):
        assert line.join(waiter[0], waiter) is None
    assert line.peek() == "a1"
    assert taken(line) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert len(line) == 0 and line.peek() is None


def test_a_full_line_makes_room_for_who_has_less():
    line = FairQueue(4)
    for waiter in ("a1", "a2", "a3", "a4"):
        line.join("a", waiter)
    assert line.join("a", "a5") == "a5"
    assert line.join("b", "b1") == "a4"
    assert line.join("b", "b2") == "a3"
    assert line.join("b", "b3") == "b3", "it would take the place of somebody who has no more"
    assert line.join("c", "c1") == "a2"
    assert taken(line) == ["a1", "b1", "c1", "b2"]


def test_who_leaves_is_not_served():
    line = FairQueue(4)
    for waiter in ("a1", "a2", "b1"):
        line.join(waiter[0], waiter)
    assert line.leave("a", "a1") and not line.leave("a", "a1") and not line.leave("z", "z")
    assert len(line) == 2 and taken(line) == ["a2", "b1"]


@settings(deadline=None)
@given(st.lists(st.sampled_from("aaaabc"), max_size=60), st.integers(1, 8))
def test_a_tenant_waits_behind_at_most_one_of_each_other(arrivals, limit):
    line, standing = FairQueue(limit), {}
    for number, tenant in enumerate(arrivals):
        waiter = (tenant, number)
        loser = line.join(tenant, waiter)
        standing[waiter] = None
        standing.pop(loser, None)
        assert len(line) == len(standing) <= limit
        if loser not in (None, waiter):
            counts = [t for t, _ in standing]
            assert counts.count(loser[0]) >= counts.count(tenant) - 1
    order = taken(line)
    assert set(order) == set(standing)
    tenants = [t for t, _ in order]
    for tenant in set(tenants):
        before_first = tenants[: tenants.index(tenant)]
        assert len(before_first) == len(set(before_first))
        mine = [number for t, number in order if t == tenant]
        assert mine == sorted(mine)


def test_turns_follow_weights_and_coming_back_gains_none():
    line = FairQueue(100, {"a": 3, "c": 0.5})
    for number in range(20):
        for tenant in "abc":
            line.join(tenant, f"{tenant}{number}")
    first = "".join(line.take()[0] for _ in range(18))
    assert [first.count(tenant) for tenant in "abc"] == [12, 4, 2]
    # One at a time is no way to more turns.
    alone = FairQueue(100)
    for number in range(9):
        alone.join("a", f"a{number}")
    served = ""
    for number in range(8):
        if not served.endswith("a"):
            alone.join("b", f"b{number}")
        served += alone.take()[0]
    assert served == "abababab"


def test_who_comes_back_each_time_waits_for_its_turn_each_time():
    line = FairQueue(10)
    for waiter in ("a1", "a2", "a3", "a4"):
        line.join("a", waiter)
    served = [line.take()]
    for waiter in ("b1", "b2"):
        line.join("b", waiter)
        served += [line.take(), line.take()]
    assert served == ["a1", "a2", "b1", "a3", "b2"]
    assert line.oldest == "a4" and taken(line) == ["a4"] and line.oldest is None


def test_what_was_taken_while_nobody_else_waited_is_owed_to_nobody():
    line = FairQueue(10)
    line.join("a", "a0")
    line.take("a", 100.0)
    line.join("b", "b0")
    line.join("a", "a1")
    assert line.num_ahead("c") == 2 and taken(line) == ["b0", "a1"]
    line.join("b", "b1")
    line.join("a", "a2")
    line.take("a", 5.0)
    for number in range(4):
        line.join("b", f"b{2 + number}")
    line.join("a", "a3")
    assert line.num_ahead("a") == 6 and taken(line)[-1] == "a3"


def test_only_those_that_left_last_are_known():
    line = FairQueue(2)
    line.join("waits", "on and on")
    for number in range(MAX_LEFT + 5):
        line.join(f"t{number}", number)
        line.take(f"t{number}", 9.0)
    assert len(line._left) == MAX_LEFT and "t4" not in line._left
    line.take("waits")
    assert not line._left


def test_who_weighs_more_may_have_more_waiting():
    line = FairQueue(5, {"a": 4})
    for number in range(4):
        line.join("a", f"a{number}")
    line.join("b", "b0")
    assert line.join("b", "b1") == "b1", "four of weight 4 are no more than one"
    assert line.join("c", "c0") == "c0"
    assert line.leave("b", "b0") and line.join("a", "a4") is None
    assert line.join("b", "b2") == "a4"


@settings(deadline=None)
@given(
    st.lists(st.sampled_from("aabbc"), min_size=1, max_size=40),
    st.fixed_dictionaries({t: st.sampled_from([0.5, 1, 2, 3]) for t in "abc"}),
)
def test_nobody_waits_for_more_turns_than_weights_allow(arrivals, weights):
    line = FairQueue(100, weights)
    for number, tenant in enumerate(arrivals):
        line.join(tenant, (tenant, number))
    order = [tenant for tenant, _ in taken(line)]
    for tenant in set(order):
        before = order[: order.index(tenant)]
        for other in set(before):
            assert before.count(other) <= weights[other] / weights[tenant] + 1


@settings(deadline=None)
@given(
    st.lists(st.sampled_from("aaaabc"), max_size=40),
    st.integers(0, 20),
    st.sampled_from("abcd"),
    st.fixed_dictionaries({t: st.sampled_from([0.5, 1, 2, 3]) for t in "abcd"}),
)
def test_a_newcomer_knows_how_many_have_their_turn_before_it(arrivals, num_taken, tenant, weights):
    line = FairQueue(100, weights)
    for number, other in enumerate(arrivals):
        line.join(other, (other, number))
    for _ in range(num_taken):
        line.take()
    num_ahead = line.num_ahead(tenant)
    line.join(tenant, "newcomer")
    assert taken(line).index("newcomer") == num_ahead
