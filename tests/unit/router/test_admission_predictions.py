"""Whom admission refuses by a prediction among tiers, and when those should come again."""

import asyncio

import pytest
from support.admission import TIERS, in_tier, started, take

from core.config import TierConfig
from core.errors import QueueFull, TooLate
from router.admission import Admission
from router.expected_wait import MIN_INTERVALS
from simulation.loop import run_virtual


async def measured(admission, interval_s):
    """Let the router know how rarely a permit comes free, while all are taken."""
    for _ in range(MIN_INTERVALS + 1):
        await asyncio.sleep(interval_s)
        admission._shedding.released("high", is_awaited=True)


def test_a_newcomer_waits_for_those_who_go_before_it_and_for_no_others():
    async def main():
        tiers = {
            "high": TierConfig(queue_wait_s=4.5),
            "low": TierConfig(delay_s=60.0, queue_wait_s=24.5),
        }
        admission, log, until = Admission(1, 99, 30.0, tiers=tiers), [], asyncio.Event()
        tasks = await started(admission, log, until, *[in_tier("low") for _ in range(21)])
        await measured(admission, 1.0)
        admission.check_open("high", "t")
        admission.check_open("low", "t")
        tasks += await started(admission, log, until, *[in_tier("high") for _ in range(4)])
        with pytest.raises(
            TooLate, match=r"5\.00 s for a permit, tiers\.high\.queue_wait_s is 4\.50"
        ):
            admission.check_open("high", "t")
        with pytest.raises(
            TooLate, match=r"25\.00 s for a permit, tiers\.low\.queue_wait_s is 24\.5"
        ):
            await take(admission, in_tier("low"))
        assert admission.queued_by_tier() == {"high": 4, "low": 20}
        until.set()
        await asyncio.gather(*tasks)
        return admission.num_refused

    assert run_virtual(main()) == {"high": 1, "low": 1}


def test_who_makes_room_for_a_higher_tier_comes_again_after_all_that_goes_before_it():
    async def main():
        admission, log, until = Admission(1, 2, 60.0, tiers=TIERS), [], asyncio.Event()
        tasks = await started(admission, log, until, *[in_tier("low", t) for t in "abc"])
        await measured(admission, 5.0)
        tasks += await started(admission, log, until, in_tier("high", "d"))
        with pytest.raises(QueueFull) as caught:
            await tasks[1]
        until.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        return caught.value.retry_after_s

    # The one of the higher tier, the one that stays, and its own turn: 15 s, and a quarter.
    assert 11.25 <= run_virtual(main()) <= 18.75


def test_who_may_ask_for_more_tiers_is_refused_if_none_has_room_and_told_of_the_first_that_will():
    async def main():
        tiers = {"high": TierConfig(max_queued=0), "low": TierConfig(delay_s=60.0, max_queued=5)}
        admission, log, until = Admission(1, 9, 90.0, tiers=tiers), [], asyncio.Event()
        tasks = await started(admission, log, until, *[in_tier("low") for _ in range(5)])
        await measured(admission, 5.0)
        admission.check_open("high", "t", ["high", "low"])
        tasks += await started(admission, log, until, in_tier("low"))
        with pytest.raises(QueueFull, match="of tier high") as caught:
            admission.check_open("low", "t", ["high", "low"])
        until.set()
        await asyncio.gather(*tasks)
        return caught.value.retry_after_s, admission.num_refused

    retry_after_s, refused = run_virtual(main())
    assert 3.75 <= retry_after_s <= 6.25 and refused == {"high": 0, "low": 1}


def test_a_tier_that_has_its_share_waits_for_its_own_permits_alone():
    async def main():
        admission = Admission(4, 99, 500.0, tiers=TIERS)

        async def one(tier, at, held_s):
            await asyncio.sleep(at)
            async with admission.permit(in_tier(tier)):
                await asyncio.sleep(held_s)

        low = [one("low", at, 9.0) for at in (0.0, 3.0, 6.0, *[7.0] * 27)]
        high = [one("high", 0.5 + at, 0.8) for at in range(70)]
        tasks = [asyncio.ensure_future(coroutine) for coroutine in (*low, *high)]
        await asyncio.sleep(60.4)
        assert admission.running_by_tier()["low"] == 3
        num_queued = admission.queued_by_tier()["low"]
        ahead = {tier: admission._ahead_of(tier, "t") for tier in TIERS}
        assert ahead["high"].is_free
        found = {tier: admission._shedding.room_in_s(tier, ahead[tier]) for tier in TIERS}
        await asyncio.gather(*tasks)
        return num_queued, found

    num_queued, found = run_virtual(main())
    assert num_queued > 5 and found["high"] == 0
    assert found["low"] == pytest.approx(3.0 * (num_queued + 1))
