"""Who goes next among tiers, and who makes room for whom; against a plain model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import TierConfig
from router.tier_queues import QueuedAhead, TierQueues, Waiter, _num_turns

TIERS = {
    "high": TierConfig(),
    "middle": TierConfig(delay_s=10.0),
    "low": TierConfig(delay_s=100.0, max_queued=4, max_queued_tokens=400),
}


def queues(max_queued=6, max_queued_tokens=1000, **tiers):
    return TierQueues({**TIERS, **tiers}, max_queued, max_queued_tokens)


def waiter(tier, at=0.0, tenant="t", tokens=1):
    return Waiter(tier, tenant, 1, tokens, at)


def joined(line, *args, **fields):
    """Join if there is room; returns the waiter and those that left for it."""
    new = waiter(*args, **fields)
    if line.token_limit(new.tier, new.num_tokens) is not None:
        return new, [new]
    if not line.has_place_for(new.tier, new.tenant):
        return new, [new]
    return new, line.join(new)


def taken(line):
    out = []
    while (queue := next(line.in_turn(), None)) is not None:
        out.append(queue.waiters.peek())
        line.take(out[-1])
    return out


def test_a_newcomer_of_a_higher_tier_goes_first_until_the_others_have_waited_their_delay():
    line = queues()
    old = joined(line, "low", 0.0)[0]
    middle = joined(line, "middle", 85.0)[0]
    before = joined(line, "high", 94.0)[0]
    after = joined(line, "high", 101.0)[0]
    assert taken(line) == [before, middle, old, after]


def test_the_lowest_tier_makes_room_first_and_there_the_newest_of_the_busiest_tenant():
    line = queues()
    for at, (tier, tenant) in enumerate(
        [("low", "a"), ("low", "b"), ("low", "b"), ("middle", "c"), ("middle", "c"), ("high", "d")]
    ):
        joined(line, tier, float(at), tenant)
    left = [joined(line, "high", 9.0, "e")[1][0] for _ in range(5)]
    assert [(one.tier, one.tenant, one.joined_at) for one in left] == [
        ("low", "b", 2.0),
        ("low", "a", 0.0),
        ("low", "b", 1.0),
        ("middle", "c", 4.0),
        ("middle", "c", 3.0),
    ]
    new, lost = joined(line, "low", 10.0)
    assert lost == [new], "nobody is lower"
    new, lost = joined(line, "high", 11.0, "d")
    assert [one.tenant for one in lost] == ["e"], "in its own tier, who has more makes room"
    assert len(line) == 6


def test_a_tier_that_is_full_by_itself_takes_no_place_of_others():
    line = queues(max_queued=9)
    for at in range(4):
        joined(line, "low", float(at), "a")
    high = joined(line, "high", 5.0)[0]
    new, lost = joined(line, "low", 6.0, "a")
    assert lost == [new]
    assert joined(line, "low", 7.0, "b")[1][0].joined_at == 3.0
    assert len(line) == 5 and high in taken(line)


def test_limits_of_tokens_are_reached_and_not_passed():
    line = queues(max_queued_tokens=500)
    assert [line.token_limit("high", n) for n in (500, 501)] == [None, (0, 500)]
    assert [line.token_limit("low", n) for n in (400, 401)] == [None, (0, 400)]
    low, left = joined(line, "low", tokens=400)
    assert left == [] and line.token_limit("low", 1) == (400, 400)
    assert joined(line, "high", 1.0, tokens=100)[1] == [], "all fit"
    assert joined(line, "high", 2.0, tokens=1)[1] == [low] and line.num_tokens == 101
    line.leave(low)
    assert line.num_tokens == 101, "it had left"
    assert len(taken(line)) == 2 and line.num_tokens == 0
    leaver, _ = joined(line, "low", 3.0, tokens=400)
    line.leave(leaver)
    assert len(line) == line.num_tokens == 0


def test_where_nobody_waits_in_the_lowest_tier_the_next_one_makes_room():
    line = queues(max_queued=2, max_queued_tokens=500)
    middle = [joined(line, "middle", float(at), tokens=100)[0] for at in range(2)]
    assert joined(line, "high", 2.0, tokens=1)[1] == [middle[1]], "for its place"
    assert joined(line, "high", 3.0, tokens=450)[1] == [middle[0]], "for its tokens"


def test_a_place_is_there_until_all_are_taken_and_then_in_lower_tiers_or_where_more_wait():
    line = queues(max_queued=2)
    joined(line, "middle", 0.0, "a")
    assert line.has_place_for("middle", "a")
    joined(line, "middle", 1.0, "a")
    tiers = {"high": True, "middle": False, "low": False}
    assert {tier: line.has_place_for(tier, "a") for tier in tiers} == tiers
    assert line.has_place_for("middle", "b") and not line.has_place_for("low", "b")
    assert [len(queue.waiters) for queue in line.in_turn()] == [2], "asking changes nothing"


def test_tokens_of_lower_tiers_make_room_and_those_of_higher_ones_do_not():
    line = queues(max_queued_tokens=500)
    low = [joined(line, "low", float(at), tokens=100)[0] for at in range(3)]
    joined(line, "middle", 3.0, tokens=200)
    assert line.num_tokens == 500
    new, lost = joined(line, "high", 4.0, tokens=150)
    assert lost == [low[2], low[1]] and line.num_tokens == 450
    new, lost = joined(line, "middle", 5.0, tokens=151)
    assert lost == [new], "200 and 150 stay: one of 151 would not fit without them"
    assert line.token_limit("middle", 151) == (350, 500)
    assert line.token_limit("low", 301) == (100, 400)
    assert line.num_tokens == 450 and low[0] in taken(line)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(TIERS)), st.sampled_from("aab"), st.integers(1, 200)),
        max_size=40,
    )
)
def test_no_limit_is_passed_and_nobody_leaves_for_one_of_a_lower_tier(arrivals):
    line = queues()
    standing = []
    for at, (tier, tenant, tokens) in enumerate(arrivals):
        new, left = joined(line, tier, float(at), tenant, tokens)
        standing = [one for one in [*standing, new] if one not in left]
        assert len(line) == len(standing) <= 6
        assert line.num_tokens == sum(one.num_tokens for one in standing) <= 1000
        low = [one for one in standing if one.tier == "low"]
        assert len(low) <= 4 and sum(one.num_tokens for one in low) <= 400
        delays = [TIERS[one.tier].delay_s for one in left]
        assert all(delay >= TIERS[tier].delay_s for delay in delays)
        assert delays == sorted(delays, reverse=True), "the lowest first"
        if left and left != [new] and TIERS[tier].delay_s < delays[-1]:
            lower = [one for one in standing if TIERS[one.tier].delay_s > delays[-1]]
            assert not lower, "somebody lower is left"
    order = taken(line)
    assert sorted(map(id, order)) == sorted(map(id, standing))
    due_at = {
        name: tier.delay_s + min((w.joined_at for w in standing if w.tier == name), default=0.0)
        for name, tier in TIERS.items()
    }
    seen = list(dict.fromkeys(one.tier for one in order))
    assert seen == sorted(seen, key=due_at.__getitem__), "tiers are served in their order"


# --- what is before a newcomer --------------------------------------------------------------------


def test_what_is_due_before_a_newcomer_counts_and_what_waits_behind_it_does_not():
    line = queues(max_queued=40)
    for at in range(4):
        joined(line, "low", float(at), tokens=7)
    for at in range(10):
        joined(line, "middle", 10.0 + at, tokens=5)
    for _ in range(2):
        joined(line, "high", 15.0, tokens=3)
    assert line.ahead_of("high", "t", 16.0) == QueuedAhead(2, 2, 6)
    assert line.ahead_of("middle", "t", 20.0) == QueuedAhead(12, 10, 56)
    assert line.ahead_of("low", "t", 20.0) == QueuedAhead(16, 4, 84)
    # The middle ones of the first five seconds have waited their ten by then.
    assert line.ahead_of("high", "t", 24.5) == QueuedAhead(7, 2, 31)
    assert line.ahead_of("high", "t", 200.0) == QueuedAhead(16, 2, 84)
    assert line.ahead_of("high", "other", 16.0) == QueuedAhead(1, 1, 3), "tenants take turns"


@pytest.mark.parametrize(
    ("at", "num_due"),
    [(9.9, 0), (10.0, 1), (10.5, 1), (13.0, 2), (15.5, 3), (17.9, 5), (18.0, 5), (99.0, 5)],
)
def test_of_those_who_came_evenly_as_many_are_due_as_have_waited_their_delay(at, num_due):
    line = queues()
    assert line.by_tier["middle"].num_due(at) == 0
    for joined_at in (0.0, 2.0, 4.0, 6.0, 8.0):
        joined(line, "middle", joined_at)
    assert line.by_tier["middle"].num_due(at) == num_due


@pytest.mark.parametrize(
    ("share", "num_ahead", "num_tokens"),
    # With a half every second turn is the other tier's: the newcomer, second of its own, is fourth.
    [(0.5, 3, 21), (0.4, 2, 14), (0.3, 2, 10)],
)
def test_a_tier_takes_no_more_turns_than_its_share_before_a_newcomer(share, num_ahead, num_tokens):
    line = queues(max_queued=90, other=TierConfig(max_running_share=share))
    for _ in range(80):
        joined(line, "other", 0.0, tokens=10)
    joined(line, "high", 1.0)
    assert line.ahead_of("high", "t", 2.0) == QueuedAhead(num_ahead, 1, num_tokens)


@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(1, 50), st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]))),
)
def test_turns_until_a_newcomers_add_up(num_own, others):
    num = _num_turns(num_own, others)
    taken = sum(min(num_due, share * num) for num_due, share in others)
    assert abs(num - num_own - taken) < 1e-6 * num
