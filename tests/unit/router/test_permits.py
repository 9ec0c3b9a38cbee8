"""Permits by tenant: nobody takes the last ones from those who have fewer."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.admission import in_tier, started

from core.config import TierConfig
from router.admission import Admission
from router.permits import KEPT_SHARE, Permits

WEIGHTS = {"heavy": 3.0, "light": 0.5}
TIERS = {
    "high": TierConfig(tenant_weights=WEIGHTS),
    "low": TierConfig(delay_s=60.0, max_running_share=0.75),
}


def filled(permits, tier, tenant):
    """How many the tenant gets one by one."""
    num = 0
    while permits.num_free and permits.is_within_share(tier, 1):
        if not permits.is_within_part(tier, tenant, 1):
            break
        permits.take(tier, tenant, 1)
        num += 1
    return num


def test_one_tenant_leaves_an_eighth_and_a_newcomer_has_it():
    permits = Permits(64, TIERS)
    assert filled(permits, "high", "a") == 56
    assert permits.is_within_part("high", "b", 8) and filled(permits, "high", "b") == 8
    assert permits.num_free == 0


def test_without_keys_one_has_all():
    permits = Permits(64, TIERS)
    assert filled(permits, "high", "") == 64


@pytest.mark.parametrize("num", [1, 2, 7])
def test_of_few_permits_none_is_kept(num):
    permits = Permits(num, TIERS)
    assert filled(permits, "high", "a") == num


def test_what_is_left_goes_by_weight_and_a_part_is_kept_for_who_may_come():
    """Beside one of weight 1 and one that may come, weight 3 is 3 parts of 5: 39 of 64."""
    permits = Permits(64, TIERS)
    permits.take("high", "a", 19)
    permits.take("high", "heavy", 38)
    assert not permits.is_within_part("high", "a", 1)
    assert permits.is_within_part("high", "heavy", 1)
    assert not permits.is_within_part("high", "heavy", 2)


async def test_of_few_permits_many_tenants_get_turns_by_their_weights():
    """Parts of less than one permit must not make all alike."""
    weights = {f"w{weight}": float(weight) for weight in range(1, 11)}
    admission = Admission(8, 999, 60.0, tiers={"one": TierConfig(tenant_weights=weights)})
    served = []

    async def client(tenant):
        while len(served) < 3_000:
            async with admission.permit(in_tier("one", tenant)):
                served.append(tenant)
                for _ in range(3):
                    await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        for tenant in weights:
            for _ in range(8):
                tasks.create_task(client(tenant))
    for tenant, weight in weights.items():
        share = served[500:].count(tenant) / len(served[500:])
        assert 0.8 < share / (weight / sum(weights.values())) < 1.25, tenant


def test_a_tier_keeps_an_eighth_of_what_it_can_have():
    """The higher tier has 40 of 64: the lower one can reach 24, and leaves 3 to newcomers."""
    permits = Permits(64, TIERS)
    permits.take("high", "x", 40)
    assert filled(permits, "low", "a") == 21
    assert filled(permits, "low", "b") == 3


def test_who_has_nothing_may_have_what_it_asks_for():
    permits = Permits(16, TIERS)
    permits.take("high", "a", 8)
    assert permits.is_within_part("high", "b", 8)
    assert not permits.is_within_part("high", "a", 8)


def test_a_tenant_that_has_left_is_forgotten():
    permits = Permits(16, TIERS)
    permits.take("high", "a", 8)
    permits.take("high", "a", 2)
    permits.give_back("high", "a", 8)
    permits.give_back("high", "a", 2)
    assert (permits.num_free, permits.taken_by_tier()) == (16, {"high": 0, "low": 0})
    assert not permits._held["high"]


@settings(deadline=None)
@given(st.integers(8, 200), st.lists(st.integers(1, 9), max_size=80))
def test_as_many_newcomers_find_one_as_are_kept_however_another_asks(num_permits, asked):
    permits = Permits(num_permits, TIERS)
    for num in asked:
        # Its first may be any: whoever has nothing is never held back.
        num = num if permits.num_taken else 1
        if num <= permits.num_free and permits.is_within_part("high", "a", num):
            permits.take("high", "a", num)
    for number in range(num_permits // KEPT_SHARE):
        assert filled(permits, "high", f"newcomer{number}")
        permits.give_back("high", f"newcomer{number}", permits._held["high"][f"newcomer{number}"])
        permits.take("high", f"newcomer{number}", 1)


# --- in admission ---------------------------------------------------------------------------------


async def test_one_that_waits_for_its_part_is_passed_by_a_newcomer_of_its_tier():
    admission, log, until = Admission(16, 99, 30.0, tiers=TIERS), [], asyncio.Event()
    many = await started(admission, log, until, *[in_tier("high", "a") for _ in range(30)])
    assert (admission.num_running, admission.num_queued) == (14, 16)
    few = await started(admission, log, until, *[in_tier("high", "b") for _ in range(3)])
    assert (admission.num_running, admission.num_queued) == (16, 17)
    assert log == ["a"] * 14 + ["b"] * 2
    until.set()
    await asyncio.gather(*many, *few)
    assert len(log) == 33 and (admission.num_running, admission.num_queued) == (0, 0)


async def test_who_is_passed_makes_up_for_no_turns_afterwards():
    admission, log, until = Admission(16, 99, 30.0, tiers=TIERS), [], asyncio.Event()
    a_ends = asyncio.Event()
    running = await started(admission, log, a_ends, *[in_tier("high", "a") for _ in range(14)])
    waiting = await started(admission, log, until, *[in_tier("high", "a") for _ in range(6)])
    waiting += await started(admission, log, until, *[in_tier("high", "b") for _ in range(8)])
    assert log[14:] == ["b", "b"]
    a_ends.set()
    await asyncio.gather(*running)
    order = "".join(log[16:])
    assert "aaa" not in order.rstrip("a") and order.count("a") == 6
    until.set()
    await asyncio.gather(*waiting)
