"""Who is next and who makes room, when several tenants wait in one line."""

from hypothesis import given, settings
from hypothesis import strategies as st

from router.fair_queue import FairQueue


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


@settings(deadline=None)
@given(st.lists(st.sampled_from("aaaabc"), max_size=40), st.sampled_from("abcd"))
def test_a_newcomer_knows_how_many_have_their_turn_before_it(arrivals, tenant):
    line = FairQueue(100)
    for number, other in enumerate(arrivals):
        line.join(other, (other, number))
    num_ahead = line.num_ahead(tenant)
    line.join(tenant, "newcomer")
    assert taken(line).index("newcomer") == num_ahead
