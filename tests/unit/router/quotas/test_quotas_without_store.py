"""Quotas while their store is away, slow or empty: no request waits for it, and little is lost."""

import asyncio
import logging

from support.quotas import (
    GRACE_S,
    KEY,
    PERIOD_S,
    Routers,
    Shifted,
    left,
    refused,
    take,
    virtual,
)

from core.clocks import LoopClock
from router.quotas.ledger import Amount
from router.quotas.quotas import CALL_TIMEOUT_S
from simulation.loop import run_virtual
from simulation.quota_store import MemoryQuotaStore


@virtual
async def test_a_call_whose_answer_is_lost_charges_once():
    async with Routers(1) as routers:
        (one,) = routers
        routers.store.num_answers_to_lose = 1
        assert await take(one, 600)
        assert routers.local_decisions == ["r0"]
        assert left(one) == 400
        await asyncio.sleep(2)
        assert await take(one, 400)
        assert not await take(one, 1)


@virtual
async def test_a_client_that_leaves_while_it_is_charged_pays_nothing():
    async with Routers(2, MemoryQuotaStore(lambda: 0.01)) as (one, two):
        for delay_s in (0.0, 0.005, 0.015, 0.019):
            claim = asyncio.create_task(take(one, 900))
            await asyncio.sleep(delay_s)
            claim.cancel()
            await asyncio.gather(claim, return_exceptions=True)
            await asyncio.sleep(0.5)
        assert await take(two, 1000)


@virtual
async def test_one_of_several_that_leaves_while_they_are_charged_pays_nothing():
    async with Routers(2, MemoryQuotaStore(lambda: 0.01)) as (one, two):
        first = asyncio.create_task(take(one, 100))
        await asyncio.sleep(0.005)
        # Both wait behind the first, and are then charged with one call.
        claims = [asyncio.create_task(take(one, 200)) for _ in range(2)]
        await asyncio.sleep(0.025)
        assert first.done() and not claims[1].done()
        claims[1].cancel()
        await asyncio.gather(*claims, return_exceptions=True)
        assert claims[0].result() and claims[1].cancelled()
        await asyncio.sleep(0.5)
        assert await take(two, 700)
        assert not await take(two, 1)


@virtual
async def test_who_leaves_takes_nothing_back_that_a_copy_of_the_request_leans_on():
    """The copy found it charged, and pays nothing itself."""
    async with Routers(2, MemoryQuotaStore(lambda: 0.01)) as (one, two):
        first = asyncio.create_task(take(one, 900, "x"))
        await asyncio.sleep(0.012)
        copy = asyncio.create_task(take(two, 900, "x"))
        await asyncio.sleep(0.003)
        assert not first.done()
        first.cancel()  # charged at the store, which one does not know yet
        await asyncio.gather(first, return_exceptions=True)
        assert (await copy).amount.tokens == 0
        await asyncio.sleep(0.5)
        assert not await take(one, 101)
        assert await take(two, 100)


@virtual
async def test_a_copy_whose_call_fails_pays_itself_and_what_it_leaned_on_is_not_refunded():
    """Its call had begun a run in the store, so that the first one's end finds a later run."""
    async with Routers(2) as routers:
        one, two = routers
        first = await take(one, 300, "x")
        assert await take(two, 1)  # so that two knows of the first run
        routers.store.num_answers_to_lose = 1
        second = await take(two, 300, "x")
        assert second.amount.tokens == 300
        assert routers.local_decisions == ["r1"]
        await asyncio.sleep(0.5)
        one.settle(KEY, first, Amount(1, 10))
        two.settle(KEY, second, Amount(1, 10))
        await asyncio.sleep(0.5)
        assert left(one) == 1000 - 300 - 10 - 1


@virtual
async def test_without_the_store_each_router_grants_its_share_and_waits_for_nobody():
    async with Routers(2) as routers:
        one, two = routers
        assert await take(one, 100)
        assert await take(two, 200)
        assert await take(one, 1)  # now it knows of both
        routers.store.mode = "down"
        await asyncio.sleep(3 * PERIOD_S + 0.5)
        assert one.is_local and two.is_local
        before = routers.store.num_calls, LoopClock().now_s()
        assert await take(one, 399)
        error = await refused(one, 1)
        assert "its share" in error.message
        assert error.retry_after_s > 50
        assert before == (routers.store.num_calls, LoopClock().now_s())
        assert left(one) == 0
        # Of the other's it knows all that was told.
        assert not await take(two, 901)
        assert await take(two, 300)
        assert not await take(two, 1)


@virtual
async def test_also_the_first_calls_that_fail_grant_no_more_than_a_share():
    """All that come within the first 50 ms are decided before the store is known to be away."""
    async with Routers(2) as routers:
        routers.store.mode = "slow"
        charges = await asyncio.gather(*(take(q, 100) for q in routers.made for _ in range(9)))
        assert not routers[0].is_local
        assert [charge is not None for charge in charges] == 2 * [*5 * [True], *4 * [False]]
        error = await refused(routers[0], 100)
        assert error.retry_after_s == PERIOD_S, "the next call may not fail"


@virtual
async def test_one_request_is_granted_even_if_a_share_is_less():
    async with Routers(4) as routers:
        routers.store.mode = "down"
        await asyncio.sleep(3 * PERIOD_S + 0.5)
        assert await take(routers[0], 800)
        assert not await take(routers[0], 1)


@virtual
async def test_a_slow_store_is_awaited_for_50_ms_and_soon_not_at_all():
    async with Routers(2) as routers:
        (one, _) = routers
        assert await take(one, 1)
        routers.store.mode = "slow"
        waits = []
        for _ in range(6):
            began_s = LoopClock().now_s()
            assert await take(one, 1)
            waits.append(LoopClock().now_s() - began_s)
        assert max(waits) <= CALL_TIMEOUT_S + 0.001
        assert waits[-1] == 0
        assert one.is_local


@virtual
async def test_one_that_is_back_is_told_what_was_granted_without_it():
    async with Routers(2) as routers:
        one, two = routers
        routers.store.mode = "down"
        await asyncio.sleep(3 * PERIOD_S + 0.5)
        assert await take(one, 500)
        assert await take(two, 400)
        routers.store.mode = "ok"
        await asyncio.sleep(1.5 * PERIOD_S + GRACE_S)
        assert not one.is_local
        assert not await take(one, 101)
        assert await take(one, 100)
        assert not await take(two, 1)


@virtual
async def test_an_emptied_store_forgets_nothing_that_a_router_knew():
    async with Routers(2) as routers:
        one, two = routers
        assert await take(one, 600)
        assert await take(two, 300)
        routers.store.empty()
        # The first knows nothing of the 300: it must not grant by what it knows.
        assert not await take(one, 200)
        await asyncio.sleep(PERIOD_S + GRACE_S + 0.5)
        assert not await take(one, 101)
        assert await take(one, 100)
        assert not await take(two, 1)
        assert not routers.local_decisions


@virtual
async def test_a_charge_counts_once_after_a_loss_however_clocks_have_drifted():
    for drift_s in (-20.0, -0.9, -0.4, 0.4, 3.0):
        clocks = [Shifted(), Shifted()]
        async with Routers(2, clocks=clocks) as routers:
            one, two = routers
            assert await take(one, 600)
            assert await take(two, 300)
            clocks[1].ahead_s += drift_s
            routers.store.empty()
            for _ in range(int((PERIOD_S + GRACE_S + 0.5) / 0.05)):
                for quotas in routers:  # it looks, and is behind by less than the drift
                    assert not await take(quotas, 1000)
                await asyncio.sleep(0.05)
            assert not await take(one, 101), drift_s
            assert await take(one, 100), drift_s
            assert not await take(two, 1), drift_s


@virtual
async def test_an_emptied_store_is_told_of_routers_that_are_dead():
    async with Routers(3) as routers:
        one, two, three = routers
        assert await take(one, 600)
        assert await take(two, 100)
        await routers.kill(one)
        routers.store.empty()
        await asyncio.sleep(PERIOD_S + GRACE_S + 0.5)
        assert not await take(three, 301)
        assert await take(three, 300)


@virtual
async def test_the_first_to_see_an_emptied_store_may_be_new_and_count_from_elsewhere():
    for ahead_s in (-100_000.0, 100_000.0):
        async with Routers(2) as routers:
            one, two = routers
            assert await take(one, 700)
            routers.store.empty()
            fresh = routers.new("fresh", Shifted(ahead_s))
            routers.start(fresh)
            await asyncio.sleep(PERIOD_S + GRACE_S + 0.5)
            assert not await take(two, 301), ahead_s
            assert await take(fresh, 300), ahead_s
            await asyncio.sleep(64)
            assert await take(one, 1000), ahead_s


@virtual
async def test_who_meets_others_that_began_anew_and_count_from_elsewhere_frees_nobody():
    """It was cut off meanwhile, for longer than it had lived: their clock is the younger one."""
    for ahead_s in (100_000.0, 300_000.0):
        async with Routers(2, clocks=[Shifted(200_000.0), Shifted(0.0)]) as routers:
            one, two = routers
            assert await take(one, 100)
            await routers.kill(one)  # it stands still, and goes on below
            await routers.kill(two)
            routers.store.empty()
            fresh = routers.new("fresh", Shifted(ahead_s))
            routers.start(fresh)
            await asyncio.sleep(10)
            assert await take(fresh, 700)
            routers.start(one)
            await asyncio.sleep(PERIOD_S + GRACE_S + 0.5)
            for quotas in (one, fresh):
                assert not await take(quotas, 201), ahead_s
            assert await take(one, 200), ahead_s
            await asyncio.sleep(64)
            assert await take(fresh, 1000), ahead_s


@virtual
async def test_a_charge_counts_once_if_its_call_finds_another_clock_in_an_emptied_store():
    async with Routers(2) as routers:
        one, two = routers
        unfinished = await take(one, 500)
        routers.store.empty()
        fresh = routers.new("fresh", Shifted(5.0))
        routers.start(fresh)
        await asyncio.sleep(0.01)
        before = one._clock.moved_s
        assert not await take(one, 100), "no more than a share, so soon after"
        assert one._clock.moved_s == before + 5
        one.settle(KEY, unfinished, Amount(1, 300))
        await asyncio.sleep(PERIOD_S + GRACE_S + 0.5)
        assert not await take(two, 701)
        assert await take(two, 700)


@virtual
async def test_no_router_grants_by_what_it_knows_if_a_new_one_was_first_at_an_emptied_store():
    async with Routers(3) as routers:
        for quotas in routers:
            assert await take(quotas, 300)
        routers.store.empty()
        fresh = routers.new("fresh")
        routers.start(fresh)
        await asyncio.sleep(0.01)
        assert fresh._clock.is_shared
        for quotas in routers:
            assert not await take(quotas, 200)
        assert await take(routers[0], 30)


@virtual
async def test_what_was_charged_after_a_loss_counts_though_its_version_was_known_with_less():
    """The call of the third is told so when it has charged: beyond the limit, or a copy anew."""
    for request_id, charged in (("", None), ("x", 0)):
        async with Routers(3) as routers:
            one, two, three = routers
            assert await take(one, 700)
            routers.store.empty()
            await asyncio.sleep(PERIOD_S + 0.1)
            for _ in range(5):  # it knows later versions than others
                assert await take(three, 1)
            routers.store.empty()
            assert await take(two, 1)
            assert await take(two, 270, "x")
            charge = await take(three, 270, request_id)
            assert (charge and charge.amount.tokens) == charged, request_id


@virtual
async def test_what_is_in_the_store_and_of_no_router_changes_nothing():
    async with Routers(2) as routers:
        one, two = routers
        assert await take(one, 600)
        for name, (value, ends_at) in dict(routers.store._values).items():
            forged = type(value)(value.version + 5, value.content[:-1] + b"?")
            routers.store._values[name] = (forged, ends_at)
        await asyncio.sleep(PERIOD_S + GRACE_S + 0.5)
        assert not await take(two, 500)
        assert await take(two, 400)


@virtual
async def test_accounts_of_idle_keys_are_dropped():
    async with Routers(1) as (one,):
        for index in range(20):
            await take(one, 1, key=f"key{index}")
        await asyncio.sleep(59)
        assert len(one._accounts) == 20
        await asyncio.sleep(5)
        assert not one._accounts


def test_events_say_when_routers_cannot_compare_and_when_they_can_again(caplog):
    async def main():
        async with Routers(2) as routers:
            routers.store.mode = "down"
            await asyncio.sleep(3 * PERIOD_S + 0.5)
            routers.store.mode = "ok"
            await asyncio.sleep(2 * PERIOD_S)

    caplog.set_level(logging.INFO, "baton")
    run_virtual(main())
    assert [r.event for r in caplog.records] == ["quotas_local"] * 2 + ["quotas_shared"] * 2
    assert caplog.records[0].fields["reason"] == "the store is down"
