"""Requests that are still being made: they will want permits, so newcomers are refused for them."""

import asyncio
from contextlib import ExitStack, contextmanager

import pytest
from support.admission import TIERS, in_tier, started, take

from core.config import TierConfig
from core.errors import Draining, QueueFull, TooLate
from router.admission import MAX_ARRIVAL_S, Admission
from router.expected_wait import MIN_INTERVALS, Ahead
from simulation.loop import run_virtual


@contextmanager
def arriving(admission, tier, tenant, **fields):
    leave = admission.arrive(tier, tenant, **fields)
    try:
        yield
    finally:
        leave()


@pytest.mark.parametrize("is_whole", [False, True])
async def test_as_many_arrive_as_could_run_or_wait(is_whole):
    admission = Admission(1, 2, 30.0)
    with ExitStack() as places:
        for _ in range(3):
            places.enter_context(arriving(admission, "standard", "t", is_whole=is_whole))
        with pytest.raises(QueueFull, match=r"0 requests run and 0 wait, 3 arrive; .* 1 and 2"):
            admission.check_open("standard", "t", is_whole=is_whole)
        with (
            pytest.raises(QueueFull, match="3 arrive"),
            arriving(admission, "standard", "t", is_whole=is_whole),
        ):
            pytest.fail("it has no place")
        # Who has arrived gets what is free: those who still come are behind it.
        await take(admission, in_tier("standard"))
    admission.check_open("standard", "t")
    assert admission.num_refused["standard"] == 2


async def test_a_place_that_is_left_twice_is_left_once():
    admission = Admission(2, 0, 30.0)
    leave = admission.arrive("standard", "t")
    leave()
    with arriving(admission, "standard", "t"):
        leave()
        with arriving(admission, "standard", "t"), pytest.raises(QueueFull):
            admission.check_open("standard", "t")


@pytest.mark.parametrize("is_whole", [False, True])
def test_who_takes_long_to_arrive_is_not_waited_for(is_whole):
    async def main():
        admission = Admission(1, 0, 30.0)
        with arriving(admission, "standard", "t", is_whole=is_whole):
            await asyncio.sleep(MAX_ARRIVAL_S)
            with pytest.raises(QueueFull):
                admission.check_open("standard", "t", is_whole=is_whole)
            await asyncio.sleep(0.1)
            admission.check_open("standard", "t", is_whole=is_whole)

    run_virtual(main())


def test_one_that_is_whole_takes_the_place_of_a_body_that_takes_too_long():
    async def main():
        admission = Admission(1, 0, 30.0)
        with arriving(admission, "standard", "t"):
            await asyncio.sleep(MAX_ARRIVAL_S + 0.1)
            with arriving(admission, "standard", "t", is_whole=True), pytest.raises(QueueFull):
                admission.check_open("standard", "t")
            admission.check_open("standard", "t")

    run_virtual(main())


async def test_bodies_that_still_come_keep_no_place_from_one_that_is_whole():
    admission = Admission(1, 0, 30.0)
    with arriving(admission, "standard", "t"):
        with arriving(admission, "standard", "t", is_whole=True):
            for is_whole in (False, True):
                with pytest.raises(QueueFull):
                    admission.check_open("standard", "t", is_whole=is_whole)
        admission.check_open("standard", "t", is_whole=True)


async def test_who_comes_for_another_tier_takes_no_place_that_its_own_does_not_have():
    tiers = {"high": TierConfig(), "low": TierConfig(delay_s=60.0)}
    admission = Admission(1, 0, 30.0, tiers=tiers)
    with arriving(admission, "high", "a"):
        with pytest.raises(QueueFull):
            admission.arrive("low", "b", ["low", "high"])


async def test_who_is_let_in_for_another_tier_alone_is_not_counted():
    tiers = {"high": TierConfig(), "low": TierConfig(delay_s=60.0)}
    admission = Admission(1, 1, 30.0, tiers=tiers)
    with arriving(admission, "high", "a"), arriving(admission, "high", "a"):
        with arriving(admission, "low", "b", others=["high"]):
            with pytest.raises(QueueFull, match="2 arrive"):
                admission.check_open("high", "a")


async def test_one_tenants_arrivals_do_not_keep_out_anothers():
    admission = Admission(2, 2, 30.0)
    with ExitStack() as places:
        for _ in range(4):
            places.enter_context(arriving(admission, "standard", "busy"))
        for _ in range(2):
            places.enter_context(arriving(admission, "standard", "b"))
        with pytest.raises(QueueFull):
            admission.check_open("standard", "busy")
    for tenant in ("busy", "b"):
        admission.check_open("standard", tenant)


async def test_a_lower_tiers_arrivals_make_room_for_a_higher_tiers():
    admission = Admission(2, 2, 30.0, tiers=TIERS)
    with ExitStack() as places:
        for _ in range(4):
            places.enter_context(arriving(admission, "low", "t"))
        with pytest.raises(QueueFull):
            admission.check_open("low", "t")
        admission.check_open("high", "t")


@pytest.mark.parametrize("is_whole", [False, True])
async def test_who_may_not_wait_may_arrive_while_permits_are_free(is_whole):
    tiers = {"high": TierConfig(max_queued=0)}
    admission = Admission(2, 0, 30.0, tiers=tiers)
    with arriving(admission, "high", "t", is_whole=is_whole):
        admission.check_open("high", "t", is_whole=is_whole)
        with arriving(admission, "high", "t", is_whole=is_whole), pytest.raises(QueueFull):
            admission.check_open("high", "t", is_whole=is_whole)


async def test_nobody_arrives_at_a_router_that_drains():
    admission = Admission(2, 2, 30.0)
    admission.is_draining = True
    with pytest.raises(Draining), arriving(admission, "standard", "t"):
        pytest.fail("it drains")


@pytest.mark.parametrize(
    ("num_heads", "num_whole", "is_whole", "is_refused"),
    [
        (9, 0, False, False),
        (10, 0, False, True),
        (5, 5, False, True),
        (90, 9, True, False),
        (0, 10, True, True),
    ],
)
def test_a_newcomer_waits_for_those_who_arrive_before_it(
    num_heads, num_whole, is_whole, is_refused
):
    async def main():
        # Whose body is not here yet might ask for the lower tier, which has room.
        tiers = {"high": TierConfig(queue_wait_s=5.5), "low": TierConfig(delay_s=60.0)}
        admission, log, until = Admission(2, 99, 99.0, tiers=tiers), [], asyncio.Event()
        tasks = await started(admission, log, until, *[in_tier("high") for _ in range(3)])
        for _ in range(MIN_INTERVALS + 1):
            await asyncio.sleep(0.5)
            admission._shedding.released("high", is_awaited=True)
        # It waits for one that waits, those who arrive, and its own turn.
        with ExitStack() as places:
            for _ in range(num_whole):
                places.enter_context(arriving(admission, "high", "t", is_whole=True))
            for _ in range(num_heads):
                places.enter_context(arriving(admission, "high", "t", others=["low"]))
            if is_refused:
                with pytest.raises(TooLate, match=r"6\.00 s for a permit"):
                    admission.check_open("high", "t", is_whole=is_whole)
            else:
                admission.check_open("high", "t", is_whole=is_whole)
        until.set()
        await asyncio.gather(*tasks)

    run_virtual(main())


@pytest.mark.parametrize(
    ("tier", "num_arriving", "are_free"),
    [
        ("high", 2, {"high": True, "low": True}),
        ("high", 3, {"high": False, "low": False}),
        ("low", 1, {"high": True, "low": True}),
        ("low", 2, {"high": True, "low": False}),
    ],
)
async def test_a_permit_is_free_if_those_who_arrive_before_leave_one_and_one_of_the_tiers_share(
    tier, num_arriving, are_free
):
    admission, log, until = Admission(4, 99, 30.0, tiers=TIERS), [], asyncio.Event()
    tasks = await started(admission, log, until, in_tier("low"))
    with ExitStack() as places:
        for _ in range(num_arriving):
            places.enter_context(arriving(admission, tier, "t"))
        for name, is_free in are_free.items():
            among = admission._arriving
            assert admission._ahead_of_newcomer(name, "t", among).is_free == is_free
            # Those who arrive are behind one that is made.
            assert admission._ahead_of(name, "t").is_free
    until.set()
    await asyncio.gather(*tasks)


async def test_before_a_newcomer_are_those_who_run_who_wait_and_who_arrive():
    admission, log, until = Admission(4, 99, 30.0, tiers=TIERS), [], asyncio.Event()
    for tier in TIERS:
        assert admission._ahead_of(tier, "t") == Ahead(0, 0, 0, is_free=True)
    requests = [in_tier("low"), *[in_tier("high") for _ in range(3)], in_tier("low")]
    tasks = await started(admission, log, until, *requests)
    with ExitStack() as places:
        for tier in ("low", "low", "high"):
            places.enter_context(arriving(admission, tier, "t"))
        found = {
            tier: admission._ahead_of_newcomer(tier, "t", admission._arriving) for tier in TIERS
        }
    # Two of low's three permits are left, for the fourth of its own; high may have all permits.
    assert found == {
        "high": Ahead(4, 1, 0, is_free=False),
        "low": Ahead(4, 4, 1, is_free=False, num_own_releases=2),
    }
    until.set()
    await asyncio.gather(*tasks)
