"""Permits: who gets one, who waits for one, and that none is lost."""

import asyncio
from dataclasses import replace

import pytest
from support.admission import TIERS, hold, in_tier, started, take

from core.config import TierConfig
from core.errors import Draining, InvalidRequest, Overloaded
from core.types import CANARY_TIER, GenerateRequest, SamplingParams
from router.admission import Admission
from simulation.loop import run_virtual

REQUEST = GenerateRequest("r", "m", tuple(range(100)), SamplingParams(), 1, 0.0)


async def test_admission_is_bounded_and_first_come_first_served():
    admission, order = Admission(1, 2, 5.0), []

    async def one(name):
        async with admission.permit(REQUEST):
            order.append(name)
            await asyncio.sleep(0)

    async with admission.permit(REQUEST):
        waiting = [asyncio.create_task(one(n)) for n in "ab"]
        await asyncio.sleep(0)
        assert admission.num_queued == 2
        with pytest.raises(Overloaded, match="1 requests run and 2 wait"):
            async with admission.permit(REQUEST):
                pass
    await asyncio.gather(*waiting)
    assert order == ["a", "b"] and (admission.num_running, admission.num_queued) == (0, 0)


def of(tenant, n=1):
    return replace(REQUEST, tenant=tenant, sampling=SamplingParams(n=n))


async def test_one_tenants_many_do_not_keep_out_anothers_one():
    """The line is full of one tenant: its newest makes room, and the newcomer is next but one."""
    admission, log, until = Admission(2, 3, 5.0), [], asyncio.Event()
    many = [asyncio.create_task(hold(admission, of("a"), log, until)) for _ in range(5)]
    await asyncio.sleep(0)
    assert (admission.num_running, admission.num_queued) == (2, 3)
    with pytest.raises(Overloaded, match="2 requests run and 3 wait"):
        admission.check_open("standard", "a")  # before anything is done for one more
    admission.check_open("standard", "b")
    one = asyncio.create_task(hold(admission, of("b"), log, until))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="2 requests run and 3 wait"):
        await many[-1]
    until.set()
    await asyncio.gather(one, *many[:-1])
    assert log == ["a", "a", "a", "b", "a"]
    assert (admission.num_running, admission.num_queued) == (0, 0)


async def test_a_request_takes_a_permit_for_each_choice():
    admission, log, until = Admission(8, 9, 30.0), [], asyncio.Event()
    first = asyncio.create_task(hold(admission, of("a", n=5), log, until))
    await asyncio.sleep(0)
    large = asyncio.create_task(hold(admission, of("b", n=4), log, until))
    small = asyncio.create_task(hold(admission, of("c"), log, until))
    await asyncio.sleep(0)
    assert (admission.num_running, admission.num_queued) == (5, 2), "small ones do not pass it"
    until.set()
    await asyncio.gather(first, large, small)
    assert log == ["a", "b", "c"] and admission.num_running == 0
    tight = Admission(2, 9, 30.0)
    async with tight.permit(of("a", n=8)):
        assert tight.num_running == 2


@pytest.mark.parametrize("leaves", ["late", "cancelled"])
async def test_when_a_large_request_leaves_the_line_those_behind_it_get_what_is_free(leaves):
    wait_s = 0.02 if leaves == "late" else 30.0
    admission, log, until = Admission(8, 2, wait_s), [], asyncio.Event()
    running = asyncio.create_task(hold(admission, of("a", n=5), log, until))
    await asyncio.sleep(0)
    large = asyncio.create_task(hold(admission, of("b", n=4), log, until))
    await asyncio.sleep(0)
    admission._queue_wait_s = 30.0
    small = asyncio.create_task(hold(admission, of("b"), log, until))
    await asyncio.sleep(0)
    assert (admission.num_running, admission.num_queued) == (5, 2)
    if leaves == "cancelled":
        large.cancel()
    await asyncio.gather(large, return_exceptions=True)
    await asyncio.sleep(0)
    assert log == ["a", "b"]
    assert (admission.num_running, admission.num_queued) == (6, 0)
    until.set()
    await asyncio.gather(running, small)
    assert admission.num_running == 0


def test_one_reply_takes_half_of_all_permits_at_most():
    Admission(256, 0, 1.0).check_share(128, 1)
    Admission(1, 0, 1.0).check_share(1, 8)
    with pytest.raises(InvalidRequest, match="128 prompts x n = 2.*256 outputs.*limit is 128"):
        Admission(256, 0, 1.0).check_share(128, 2)


async def test_admission_is_bounded_in_prompt_tokens_too():
    admission = Admission(1, 100, 5.0, max_queued_tokens=100)
    request = [replace(REQUEST, token_ids=tuple(range(n))) for n in (10, 60, 50, 40)]
    async with admission.permit(request[0]):
        waiting = asyncio.ensure_future(take(admission, request[1]))
        await asyncio.sleep(0)
        with pytest.raises(
            Overloaded, match="60 prompt tokens wait, this one has 50, the limit is 100"
        ):
            await take(admission, request[2])
        other = asyncio.ensure_future(take(admission, request[3]))
        await asyncio.sleep(0)
    await asyncio.gather(waiting, other)
    assert admission._waiting.num_tokens == 0


async def test_admission_gives_up_in_time_and_returns_permits_of_those_who_left():
    admission = Admission(1, 5, 0.02)
    async with admission.permit(REQUEST):
        with pytest.raises(Overloaded, match=r"no permit within 0\.02 s"):
            async with admission.permit(REQUEST):
                pass
        task = asyncio.create_task(admission._acquire("standard", "", 1, 1))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    # A permit granted to a waiter in the moment it is cancelled is not lost.
    async with admission.permit(REQUEST):
        task = asyncio.create_task(admission._acquire("standard", "", 1, 1))
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (admission.num_running, admission.num_queued) == (0, 0)
    admission.is_draining = True
    with pytest.raises(Draining):
        async with admission.permit(REQUEST):
            pass


@pytest.mark.parametrize("is_first", [True, False])
def test_a_permit_that_comes_in_the_turn_in_which_its_waiter_gives_up_is_used_or_passed_on(
    is_first,
):
    async def main():
        admission, loop = Admission(1, 5, 1.0), asyncio.get_running_loop()
        await admission._acquire("standard", "", 1, 1)
        if is_first:
            loop.call_at(1.0, admission._release, "standard", "", 1)
        waiting = asyncio.ensure_future(take(admission, REQUEST))
        await asyncio.sleep(0.5)
        later = asyncio.ensure_future(take(admission, REQUEST))
        if not is_first:
            loop.call_at(1.0, admission._release, "standard", "", 1)
        found = await asyncio.gather(waiting, later, return_exceptions=True)
        assert loop.time() == 1.0
        return found, admission.num_running, admission.num_queued

    (first, second), running, queued = run_virtual(main())
    assert second is None and (running, queued) == (0, 0)
    assert first is None if is_first else isinstance(first, Overloaded)


async def test_prompts_fill_the_queue_to_its_last_token():
    admission = Admission(1, 5, 60.0, max_queued_tokens=10)
    await admission._acquire("standard", "", 1, 3)
    waiting = asyncio.ensure_future(admission._acquire("standard", "", 1, 10))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="10 prompt tokens wait, this one has 1, the limit is 10"):
        await admission._acquire("standard", "", 1, 1)
    admission._release("standard", "", 1)
    await waiting
    with pytest.raises(Overloaded, match="0 prompt tokens wait, this one has 11"):
        await admission._acquire("standard", "", 1, 11)


async def test_a_canary_needs_no_permit_and_takes_none():
    """A full router is still able to show that it serves."""
    admission = Admission(1, 5, 60.0)
    plain = GenerateRequest("r", "", (1, 2), SamplingParams(), 1, 1e6, (0,))
    async with admission.permit(plain):
        async with admission.permit(replace(plain, tier=CANARY_TIER)):
            assert admission.num_running == 1
        assert (admission.num_running, admission.num_queued) == (1, 0)
    assert admission.num_running == 0


# --- tiers ----------------------------------------------------------------------------------------


async def test_a_burst_of_a_tier_never_takes_more_than_its_share_of_permits():
    admission, log, until = Admission(8, 100, 5.0, tiers=TIERS), [], asyncio.Event()
    tasks = await started(admission, log, until, *[in_tier("low") for _ in range(80)])
    assert admission.running_by_tier() == {"high": 0, "low": 6}
    assert admission.queued_by_tier() == {"high": 0, "low": 74}
    admission.check_open("high", "other")
    high = await started(admission, log, until, in_tier("high", "x"), in_tier("high", "y", n=2))
    assert admission.running_by_tier() == {"high": 1, "low": 6}, "one is left for two choices"
    assert log[6:] == ["x"]
    low = await started(admission, log, until, in_tier("low", n=8))
    until.set()
    await asyncio.gather(*tasks, *high, *low)
    assert log[7] == "y" and len(log) == 83
    assert (admission.num_running, admission.num_queued) == (0, 0)


async def test_what_others_run_takes_nothing_of_a_tiers_share():
    admission, log, until = Admission(8, 9, 5.0, tiers=TIERS), [], asyncio.Event()
    requests = [*[in_tier("high") for _ in range(6)], in_tier("low"), in_tier("low")]
    tasks = await started(admission, log, until, *requests)
    assert admission.running_by_tier() == {"high": 6, "low": 2}
    until.set()
    await asyncio.gather(*tasks)


async def test_a_share_of_few_permits_is_one_at_least():
    admission, log, until = Admission(1, 9, 5.0, tiers=TIERS), [], asyncio.Event()
    tasks = await started(admission, log, until, in_tier("low", n=3), in_tier("high"))
    assert admission.running_by_tier() == {"high": 0, "low": 1}
    until.set()
    await asyncio.gather(*tasks)


def test_a_newcomer_of_a_higher_tier_goes_first_until_the_others_have_waited_their_delay():
    async def main():
        admission = Admission(1, 9, 500.0, tiers={**TIERS, "low": TierConfig(delay_s=60.0)})
        log = []

        async def one(request, at):
            await asyncio.sleep(at)
            async with admission.permit(request):
                log.append(request.tenant)
                await asyncio.sleep(10.0)

        await asyncio.gather(
            one(in_tier("low", "first"), 0.0),
            one(in_tier("low", "second"), 1.0),
            one(in_tier("low", "third"), 5.5),
            one(in_tier("high", "early"), 9.0),
            one(in_tier("high", "soon"), 9.5),
            *[one(in_tier("high", f"at {at}"), at) for at in (12.0, 19.0, 27.0, 39.0, 61.5, 63.0)],
        )
        return log

    assert run_virtual(main()) == [
        "first",
        "early",
        "soon",
        "at 12.0",
        "at 19.0",
        "at 27.0",
        "at 39.0",
        "second",
        "at 61.5",
        "at 63.0",
        "third",
    ]


async def test_when_the_queue_is_full_the_lowest_tier_is_refused_for_a_higher_one():
    admission, log, until = Admission(1, 2, 5.0, tiers=TIERS), [], asyncio.Event()
    low = [in_tier("low", tenant) for tenant in "abc"]
    tasks = await started(admission, log, until, *low)
    with pytest.raises(
        Overloaded, match=r"1 requests run and 2 wait.*of tier low 1 and 2, 1 and 2"
    ):
        admission.check_open("low", "d")
    admission.check_open("high", "d")
    tasks += await started(admission, log, until, in_tier("high", "d"))
    with pytest.raises(Overloaded, match="of tier low"):
        await tasks[1]
    assert admission.queued_by_tier() == {"high": 1, "low": 1}
    assert admission.num_refused == {"high": 0, "low": 2}
    until.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert log[:2] == ["a", "d"] and admission.num_running == 0


async def test_within_a_tier_tenants_take_turns_by_their_weights():
    admission, log, until = Admission(1, 20, 5.0, tiers=TIERS), [], asyncio.Event()
    requests = [in_tier("low", tenant) for tenant in "x" + "ab" * 6]
    tasks = await started(admission, log, until, *requests)
    until.set()
    await asyncio.gather(*tasks)
    first = log[1:10]
    assert (first.count("a"), first.count("b")) == (6, 3)


async def test_a_request_that_lacks_its_tiers_share_is_not_passed_by_its_own_tier():
    admission, log, until = Admission(8, 9, 5.0, tiers=TIERS), [], asyncio.Event()
    running = await started(admission, log, until, in_tier("low", "a", n=4))
    waiting = await started(admission, log, until, in_tier("low", "b", n=3), in_tier("low", "c"))
    assert admission.running_by_tier() == {"high": 0, "low": 4}, "one of low has room in its share"
    other = await started(admission, log, until, in_tier("high", "d"))
    until.set()
    await asyncio.gather(*running, *waiting, *other)
    assert log == ["a", "d", "b", "c"]


def test_of_tiers_with_one_delay_who_came_in_the_same_moment_goes_first():
    async def main():
        admission = Admission(4, 9, 5.0, tiers={"one": TierConfig(), "two": TierConfig()})
        log, until = [], asyncio.Event()
        requests = in_tier("one", "a", n=2), in_tier("one", "b", n=3), in_tier("two", "c")
        tasks = await started(admission, log, until, *requests)
        assert log == ["a"] and asyncio.get_running_loop().time() == 0.0
        until.set()
        await asyncio.gather(*tasks)
        return log

    assert run_virtual(main()) == ["a", "b", "c"]


async def test_who_is_refused_and_cancelled_in_one_turn_gives_nothing_back():
    admission, log, until = Admission(1, 1, 5.0, tiers=TIERS), [], asyncio.Event()
    requests = in_tier("high", "a"), in_tier("low", "b"), in_tier("high", "c")
    runs, refused, waits = await started(admission, log, until, *requests)
    assert admission.num_refused == {"high": 0, "low": 1}
    refused.cancel()
    await asyncio.gather(refused, return_exceptions=True)
    assert refused.cancelled() and (admission.num_running, log) == (1, ["a"])
    until.set()
    await asyncio.gather(runs, waits)
    assert admission.num_running == 0


def test_each_tier_has_its_own_time_to_wait():
    async def main():
        tiers = {"high": TierConfig(queue_wait_s=1.0), "low": TierConfig(delay_s=5.0)}
        admission, loop = Admission(1, 9, 30.0, tiers=tiers), asyncio.get_running_loop()
        ended = {}

        async def one(tier):
            with pytest.raises(Overloaded, match=r"no permit within (1|30) s"):
                await take(admission, in_tier(tier))
            ended[tier] = loop.time()

        async with admission.permit(in_tier("high")):
            await asyncio.gather(one("high"), one("low"))
        return ended, admission.num_refused

    ended, refused = run_virtual(main())
    assert ended == {"high": 1.0, "low": 30.0} and refused == {"high": 1, "low": 1}


async def test_a_large_request_is_not_passed_by_those_that_are_due_after_it():
    admission, log, until = Admission(4, 9, 5.0, tiers=TIERS), [], asyncio.Event()
    running = await started(admission, log, until, in_tier("high", "a", n=2))
    large = await started(admission, log, until, in_tier("high", "b", n=3))
    small = await started(admission, log, until, in_tier("low", "c"), in_tier("high", "d"))
    assert log == ["a"] and admission.num_queued == 3
    until.set()
    await asyncio.gather(*running, *large, *small)
    assert log == ["a", "b", "d", "c"]


@pytest.mark.parametrize(("at_s", "passes"), [(0.0, True), (49.9, True), (50.0, False)])
def test_a_large_request_of_a_lower_tier_is_passed_until_it_is_due(at_s, passes):
    async def main():
        tiers = {"middle": TierConfig(delay_s=10.0), "low": TierConfig(delay_s=60.0)}
        admission, log, until = Admission(4, 9, 500.0, tiers=tiers), [], asyncio.Event()
        large = in_tier("low", "a", n=2), in_tier("low", "b", n=3)
        tasks = await started(admission, log, until, *large)
        await asyncio.sleep(at_s)
        tasks += await started(admission, log, until, in_tier("middle", "c"))
        assert log == (["a", "c"] if passes else ["a"])
        until.set()
        await asyncio.gather(*tasks)

    run_virtual(main())


def test_one_that_waits_for_its_tiers_share_is_passed_however_long_it_has_waited():
    async def main():
        tiers = {"high": TierConfig(), "low": TierConfig(delay_s=5.0, max_running_share=0.5)}
        admission, log, until = Admission(4, 9, 500.0, tiers=tiers), [], asyncio.Event()
        low = [in_tier("low", tenant) for tenant in "abc"]
        tasks = await started(admission, log, until, *low)
        await asyncio.sleep(60.0)
        tasks += await started(admission, log, until, in_tier("high", "d"))
        assert log == ["a", "b", "d"]
        until.set()
        await asyncio.gather(*tasks)

    run_virtual(main())
