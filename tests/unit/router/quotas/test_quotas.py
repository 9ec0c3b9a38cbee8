"""Quotas of several routers over one store: what one grants counts at all."""

import asyncio
import random

import pytest
from support.quotas import (
    GRACE_S,
    KEY,
    LIMITS,
    Routers,
    Shifted,
    left,
    refused,
    take,
    virtual,
)

from core.clocks import LoopClock
from core.errors import InvalidRequest
from router.quotas.ledger import RUNS_PER_CHARGE, Amount
from simulation.loop import run_virtual
from simulation.quota_store import MemoryQuotaStore

# --- a healthy store ------------------------------------------------------------------------------


@virtual
async def test_the_token_after_the_last_is_refused_until_it_fits():
    async with Routers(1) as (one,):
        began_s = LoopClock().now_s()
        assert await take(one, 400)
        await asyncio.sleep(20)
        assert await take(one, 600)
        error = await refused(one, 1)
        assert "used 1000 tokens" in error.message and "the limit is 1000" in error.message
        assert began_s + 60 <= LoopClock().now_s() + error.retry_after_s <= began_s + 62
        await asyncio.sleep(error.retry_after_s - 0.5)
        assert not await take(one, 1)
        await asyncio.sleep(0.5)
        assert await take(one, 400)
        assert not await take(one, 1)


@virtual
async def test_what_one_router_grants_counts_at_the_other():
    async with Routers(2) as (one, two):
        assert await take(one, 600)
        assert not await take(two, 401)
        assert await take(two, 400)
        assert not await take(one, 1)
        assert left(one) == left(two) == 0


@virtual
async def test_a_routers_death_loses_nothing():
    async with Routers(2) as routers:
        one, two = routers
        assert await take(one, 600)
        await routers.kill(one)
        fresh = routers.new("r3")
        routers.start(fresh)
        assert not await take(fresh, 401)
        assert await take(fresh, 400)
        assert not await take(two, 1)


@virtual
async def test_requests_are_limited_beside_tokens():
    limits = Amount(3, 1000)
    async with Routers(2) as (one, two):
        for quotas in (one, two, one):
            assert await take(quotas, 1, limits=limits)
        error = await refused(two, 1, limits=limits)
        assert "3 requests" in error.message
        standing = two.standing(KEY, limits)
        assert standing.left == (0, 997)
        assert 58 < standing.reset_s[0] <= 62


@virtual
async def test_keys_do_not_share():
    async with Routers(1) as (one,):
        assert await take(one, 1000)
        assert await take(one, 1000, key="other")


@virtual
async def test_what_never_fits_is_no_matter_of_waiting():
    async with Routers(1) as (one,):
        with pytest.raises(InvalidRequest, match=r"may be 1001 tokens, the limit is 1000 a minute"):
            await one.charge(KEY, LIMITS, Amount(1, 1001))
        assert left(one) == 1000


@virtual
async def test_what_was_not_used_is_refunded_once_and_seen_at_the_other_router():
    async with Routers(2) as (one, two):
        charge = await take(one, 1000)
        assert not await take(two, 1)
        for _ in range(2):
            one.settle(KEY, charge, Amount(1, 300))
        assert left(one) == 700
        await asyncio.sleep(0.2)
        assert await take(two, 700)
        assert not await take(one, 1)


@virtual
async def test_what_comes_beyond_an_estimate_is_charged_of_a_request_that_outlasts_the_minute():
    """Nothing else of its key counts by then, and its account is gone."""
    async with Routers(2) as (one, two):
        charge = await take(one, 100)
        await asyncio.sleep(70)
        assert not one._accounts
        one.settle(KEY, charge, Amount(1, 900))
        assert left(one) == 200
        await asyncio.sleep(0.2)
        assert not await take(two, 201)
        assert await take(two, 200)


@virtual
async def test_a_refund_that_another_router_has_just_told_is_looked_for():
    """A refusal is never decided by what was known before."""
    async with Routers(2) as (one, two):
        charge = await take(one, 1000)
        assert not await take(two, 100)
        one.settle(KEY, charge, Amount(0, 0))
        assert left(two) == 0
        await asyncio.sleep(0.2)
        assert await take(two, 1000)


@virtual
async def test_a_refused_request_leaves_no_trace():
    async with Routers(2) as (one, two):
        await take(one, 900)
        for _ in range(5):
            assert not await take(two, 200)
        assert await take(two, 100)


@virtual
async def test_many_at_once_are_decided_with_few_calls_in_the_order_of_their_arrival():
    async with Routers(1) as routers:
        before = routers.store.num_calls
        charges = await asyncio.gather(*(take(routers[0], 10) for _ in range(300)))
        assert [c is not None for c in charges] == [True] * 100 + [False] * 200
        assert routers.store.num_calls - before < 8
        assert not routers.local_decisions


@pytest.mark.parametrize("seed", range(4))
def test_no_minute_holds_more_than_the_limit_whatever_the_order(seed):
    """The oracle adds up what was granted and used between two instants, and knows no slots.

    When in its call a request was charged is unknown, and routers' clocks lie some milliseconds
    apart: what lies within 60 s in any case counts.
    """

    async def main():
        rng = random.Random(seed)
        store = MemoryQuotaStore(lambda: rng.uniform(0.0001, 0.004))
        granted, refusals = [], []
        async with Routers(3, store) as routers:

            async def client():
                for _ in range(50):
                    await asyncio.sleep(rng.expovariate(0.4))
                    quotas, size = rng.choice(routers.made), rng.randint(1, 300)
                    asked_s = LoopClock().now_s()
                    charge = await take(quotas, size)
                    if charge is None:
                        refusals.append(size)
                        continue
                    entry = [asked_s, LoopClock().now_s(), size]
                    granted.append(entry)
                    await asyncio.sleep(rng.uniform(0, 5))
                    used = rng.randint(0, size)
                    entry[2] = used
                    quotas.settle(KEY, charge, Amount(1, used))

            await asyncio.gather(*(client() for _ in range(8)))
        assert not routers.local_decisions
        for start_s, _, _ in granted:
            within = [n for asked, at, n in granted if start_s <= asked and at < start_s + 59.95]
            assert sum(within) <= 1000
        assert len(refusals) > 20 and sum(n for _, _, n in granted) > 1000

    run_virtual(main())


# --- clocks ---------------------------------------------------------------------------------------


@virtual
async def test_routers_whose_clocks_began_elsewhere_count_alike():
    clocks = [Shifted(0.0), Shifted(1_000_000.25), Shifted(-5_000.75)]
    async with Routers(3, clocks=clocks) as (one, two, three):
        assert await take(two, 500)
        assert await take(one, 400)
        assert not await take(three, 101)
        assert await take(three, 100)
        await asyncio.sleep(59)
        for quotas in (one, two, three):
            assert not await take(quotas, 1)
        await asyncio.sleep(3)
        assert await take(one, 500)
        assert await take(three, 500)


@virtual
async def test_a_router_that_joins_with_any_clock_frees_nobody():
    async with Routers(2) as routers:
        one, two = routers
        assert await take(one, 900)
        for ahead_s in (1_000_000.0, -1_000_000.0):
            late = routers.new(f"late {ahead_s}", Shifted(ahead_s))
            routers.start(late)
            await asyncio.sleep(1.5)
            for quotas in (late, one, two):
                assert not await take(quotas, 101), ahead_s
        assert await take(late, 100)


@virtual
async def test_a_router_that_stood_still_frees_and_locks_nobody():
    stopped = Shifted()
    async with Routers(2, clocks=[Shifted(), stopped]) as (one, two):
        assert await take(two, 1000)
        stopped.ahead_s -= 3600.0
        assert not await take(two, 1)
        await asyncio.sleep(30)
        assert not await take(one, 1)
        await asyncio.sleep(32)
        assert await take(two, 500)
        assert await take(one, 500)


@virtual
async def test_what_was_granted_before_the_store_was_seen_moves_to_its_clock():
    store = MemoryQuotaStore()
    async with Routers(2, store, clocks=[Shifted(5000.0), Shifted(70.0)]) as routers:
        late = routers.new("late", Shifted(123.0))
        late.is_local = True
        assert await take(late, 400)
        routers.start(late)
        await asyncio.sleep(0.3)
        assert not late.is_local
        await asyncio.sleep(GRACE_S)
        assert not await take(routers[0], 601)
        assert await take(routers[1], 600)
        await asyncio.sleep(62)
        assert await take(late, 1000)


@virtual
async def test_what_is_refunded_moves_with_what_was_charged():
    store = MemoryQuotaStore()
    async with Routers(2, store, clocks=[Shifted(5000.0), Shifted(70.0)]) as routers:
        late = routers.new("late", Shifted(123.0))
        late.is_local = True
        unfinished = await take(late, 400)
        routers.start(late)
        await asyncio.sleep(0.3)
        late.settle(KEY, unfinished, Amount(1, 100))
        assert left(late) <= 500, "only a share, so soon after"
        await asyncio.sleep(GRACE_S)
        assert left(late) == 900
        assert not await take(routers[0], 901)
        assert await take(routers[0], 900)


# --- requests that are repeated -------------------------------------------------------------------


@virtual
async def test_a_named_request_is_charged_once_however_often_and_wherever_it_runs():
    async with Routers(2) as (one, two):
        charge = await take(one, 600, "answer 1")
        assert await take(two, 600, "answer 1")
        assert await take(one, 600, "answer 1")
        assert left(one) == 400
        assert await take(two, 400, "answer 2")
        assert await take(two, 400, "answer 2"), "what is paid passes a used-up limit"
        assert not await take(two, 1, "answer 3")
        one.settle(KEY, charge, Amount(1, 100))
        await asyncio.sleep(0.2)
        assert left(one) == 0, "later runs lean on it"


@virtual
async def test_who_cuts_the_first_run_short_pays_for_the_second():
    """At either router, one after the other or both at once."""
    async with Routers(2) as (one, two):
        first = await take(one, 500, "x")
        one.settle(KEY, first, Amount(1, 10))
        await asyncio.sleep(0.2)
        second = await take(two, 500, "x")
        assert left(two) == 500
        two.settle(KEY, second, Amount(1, 450))
        await asyncio.sleep(0.2)
        assert await take(one, 1, "y")
        assert left(one) == 549
        overlapped = await take(one, 400, "z")
        assert await take(two, 400, "z")
        one.settle(KEY, overlapped, Amount(1, 0))
        await asyncio.sleep(0.2)
        assert not await take(two, 150)


@virtual
async def test_two_copies_of_a_named_request_at_the_same_moment_are_charged_once():
    async with Routers(2) as (one, two):
        both = await asyncio.gather(take(one, 700, "x"), take(two, 700, "x"))
        assert all(both)
        assert left(one) == 300 or left(two) == 300
        assert await take(one, 300)


@virtual
async def test_a_named_request_that_never_ran_is_charged_when_it_comes_again():
    async with Routers(2) as (one, two):
        charge = await take(one, 800, "x")
        one.settle(KEY, charge, Amount(0, 0))
        await asyncio.sleep(0.2)
        assert left(one) == 1000
        assert await take(two, 800, "x")
        assert left(two) == 200


@virtual
async def test_one_charge_pays_for_some_runs_and_not_for_a_minute_of_them():
    async with Routers(2) as routers:
        for _ in range(2):
            for number in range(RUNS_PER_CHARGE):
                charge = await take(routers[number % 2], 500, "x")
                routers[number % 2].settle(KEY, charge, Amount(1, 400))
                await asyncio.sleep(0.2)
        assert not await take(routers[0], 201, "y")
        assert await take(routers[1], 200, "y")
        assert not await take(routers[0], 400, "x"), "the next charge would be over the limit"
