"""What a reply costs: the most that may come of it, and in the end what came."""

import asyncio
from dataclasses import replace

import pytest
from support.quotas import Routers

from core.config import TierConfig
from core.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RateLimited,
    StepFailed,
)
from core.ids import RequestId
from core.types import GenerateRequest, RequestEnded, RequestTiming, SamplingParams, Usage
from router.access.identities import Identity
from router.charging import Charging, ReplyCost, used_tokens
from router.quota_headers import HEADERS
from router.quotas.ledger import NOTHING, Amount
from router.request_params import RequestParams
from router.tiers import Tiers
from simulation.loop import run_virtual

WHO = Identity("acme", "gold", key="0123abcd")
RAN = RequestTiming(path="pd")


def charging(quotas, **limits):
    return Charging(quotas, Tiers({"gold": TierConfig(**limits)}, "gold"))


def params(request_id="", **sampling):
    return RequestParams("abc", sampling, request_id=request_id, identity=WHO)


def made(num_tokens=10, max_tokens=100, n=1):
    return GenerateRequest(
        request_id=RequestId("r"),
        model="tiny",
        token_ids=(1,) * num_tokens,
        sampling=SamplingParams(max_tokens=max_tokens, n=n),
        seed=0,
        deadline_at=1e9,
    )


def tokens_left(charging):
    return int(charging.headers(WHO)["x-ratelimit-remaining-tokens"])


def with_one_router(test):
    def run():
        async def main():
            async with Routers(1) as (quotas,):
                await test(quotas)

        run_virtual(main())

    run.__name__ = test.__name__
    return run


@with_one_router
async def test_prompt_and_the_longest_output_of_every_choice_are_charged_until_the_end(quotas):
    it = charging(quotas, tokens_per_minute=1000)
    charge = await it.charge([params(max_tokens=100, n=3)], [made(n=3)])
    assert tokens_left(it) == 1000 - 310
    charge.request_ended(RequestEnded(Usage(10, 42), None, RAN))
    assert tokens_left(it) == 1000 - 52


@with_one_router
async def test_a_reply_to_several_prompts_is_one_request_and_is_settled_at_its_last_end(quotas):
    it = charging(quotas, requests_per_minute=5, tokens_per_minute=1000)
    every = [params(max_tokens=100)] * 3
    charge = await it.charge(every, [made(), made(20), made(30)])
    assert it.headers(WHO)["x-ratelimit-remaining-requests"] == "4"
    for ended in (Usage(10, 1), Usage(20, 2)):
        assert charge.request_ended(RequestEnded(ended, None, RAN)) is None
        assert tokens_left(it) == 1000 - 360
    cost = charge.request_ended(None)
    assert cost == ReplyCost(Amount(1, 360), NOTHING, Amount(1, 33), num_requests=3)
    assert tokens_left(it) == 1000 - 33
    assert it.headers(WHO)["x-ratelimit-remaining-requests"] == "4"


@with_one_router
async def test_what_never_ran_costs_nothing_not_even_a_request(quotas):
    it = charging(quotas, requests_per_minute=1, tokens_per_minute=1000)
    for end in (None, RequestEnded(Usage(0), Overloaded("full"))):
        charge = await it.charge([params(max_tokens=100)], [made()])
        with pytest.raises(RateLimited):
            await it.charge([params(max_tokens=100)], [made()])
        charge.request_ended(end)
        assert it.headers(WHO)["x-ratelimit-remaining-requests"] == "1"
        assert tokens_left(it) == 1000


def test_our_faults_are_not_charged_and_the_clients_choices_are():
    def used(error, timing=RAN):
        return used_tokens(RequestEnded(Usage(10, 5), error, timing))

    assert used(None) == 15
    assert used(Cancelled("left")) == 15
    assert used(DeadlineExceeded("late")) == 15
    assert used(StepFailed("ours")) == 0
    assert used(Cancelled("left the queue"), RequestTiming()) == 0


@with_one_router
async def test_an_open_length_is_estimated_and_what_comes_beyond_it_is_charged_at_the_end(quotas):
    it = charging(quotas, tokens_per_minute=10_000)
    charge = await it.charge([params()], [made(10, 100_000)])
    assert tokens_left(it) == 10_000 - 10 - 1024
    charge.request_ended(RequestEnded(Usage(10, 5000), None, RAN))
    assert tokens_left(it) == 10_000 - 5010


@with_one_router
async def test_an_estimate_keeps_nobody_out_and_a_named_length_does(quotas):
    it = charging(quotas, tokens_per_minute=500)
    charge = await it.charge([params()], [made(10, 100_000)])
    assert tokens_left(it) == 0
    charge.request_ended(RequestEnded(Usage(10, 20), None, RAN))
    with pytest.raises(InvalidRequest, match="max_tokens"):
        await it.charge([params(max_tokens=491)], [made(10, 491)])
    assert await it.charge([params(max_tokens=400)], [made(10, 400)])


@with_one_router
async def test_keys_without_limits_are_neither_charged_nor_shown(quotas):
    it = charging(quotas)
    assert await it.charge([params(max_tokens=9)], [made()]) is None
    assert it.headers(WHO) == {}
    assert charging(quotas, tokens_per_minute=5).headers(Identity(tier="")) == {}


@with_one_router
async def test_headers_show_only_the_limits_that_there_are(quotas):
    it = charging(quotas, requests_per_minute=3)
    await it.charge([params(max_tokens=9)], [made()])
    shown = it.headers(WHO)
    assert set(shown) == {h for h in HEADERS if h.endswith("requests")}
    assert shown["x-ratelimit-limit-requests"] == "3"
    assert shown["x-ratelimit-remaining-requests"] == "2"
    assert shown["x-ratelimit-reset-requests"].startswith("1m")


@with_one_router
async def test_a_named_request_is_charged_once(quotas):
    it = charging(quotas, requests_per_minute=9, tokens_per_minute=1000)
    for _ in range(2):
        await it.charge([params("x", max_tokens=100)], [made()])
    assert tokens_left(it) == 890
    await it.charge([params("y", max_tokens=100)], [made()])
    assert tokens_left(it) == 780
    assert it.headers(WHO)["x-ratelimit-remaining-requests"] == "7"


@with_one_router
async def test_a_stream_that_is_resumed_by_the_id_it_was_given_is_charged_once(quotas):
    it = charging(quotas, tokens_per_minute=1000)
    await it.charge([params(max_tokens=100)], [made()], is_resumable=True)
    assert tokens_left(it) == 890
    await it.charge([params("r", max_tokens=100)], [made()], is_resumable=True)
    assert tokens_left(it) == 890
    await it.charge([params(max_tokens=100)], [made()])
    assert tokens_left(it) == 780, "without an id that its client learns, it is another one"


@with_one_router
async def test_another_request_under_the_same_name_is_charged_by_itself(quotas):
    """A key would buy a minute of any prompts for the price of one."""
    it = charging(quotas, tokens_per_minute=1000)
    first = made()
    others = (
        replace(first, token_ids=(1,) * 9 + (2,)),
        replace(first, sampling=replace(first.sampling, temperature=0.5)),
        replace(first, seed=1),
    )
    for number, request in enumerate((first, *others), start=1):
        await it.charge([params("x", max_tokens=100)], [request])
        assert tokens_left(it) == 1000 - 110 * number
    await it.charge([params("x", max_tokens=100)], [replace(first, deadline_at=5.0)])
    assert tokens_left(it) == 1000 - 440


def test_nothing_runs_behind_if_no_tier_has_a_limit():
    async def main():
        async with Routers(1) as routers:
            idle = charging(routers.new("idle"))
            idle.start()
            assert idle._task is None
            await idle.stop()
            busy = charging(routers.new("busy"), tokens_per_minute=5)
            busy.start()
            task = busy._task
            await asyncio.sleep(0.1)
            assert not task.done()
            await busy.stop()
            assert task.done()

    run_virtual(main())


# --- at once --------------------------------------------------------------------------------------


@with_one_router
async def test_what_a_key_may_hold_at_once_is_free_again_when_its_requests_have_ended(quotas):
    it = charging(quotas, tokens_at_once=250)
    assert it.headers(WHO) == {}, "that is no quota"
    first = await it.charge([params(max_tokens=100)] * 2, [made(), made()])
    fact = "may use 220 tokens, this one 110, the limit at once is 250"
    with pytest.raises(RateLimited, match=fact):
        await it.charge([params(max_tokens=100)], [made()])
    other = Identity("acme", "gold", key="another")
    await it.charge([replace(params(max_tokens=100), identity=other)], [made()])
    assert first.request_ended(None) is None
    with pytest.raises(RateLimited):
        await it.charge([params(max_tokens=100)], [made()])
    assert first.request_ended(RequestEnded(Usage(10, 5), None, RAN)) is None
    assert await it.charge([params(max_tokens=240)], [made()]) is not None
    assert not it._at_once.keys() - {"another"}, "nothing is left of those that are gone"


@with_one_router
async def test_what_could_never_be_held_is_refused_for_good(quotas):
    it = charging(quotas, tokens_at_once=250)
    with pytest.raises(InvalidRequest, match="may use 251 tokens .* limit at once is 250"):
        await it.charge([params(max_tokens=241)], [made(10, 241)])
    assert await it.charge([params()], [made(10, 100_000)]), "an estimate keeps nobody out"
    both = charging(quotas, tokens_at_once=250, tokens_per_minute=100_000)
    assert await both.charge([params()], [made(10, 100_000)]), "nor beside a larger quota"


@with_one_router
async def test_who_is_over_its_quota_or_never_opens_its_requests_holds_nothing(quotas):
    it = charging(quotas, tokens_at_once=250, requests_per_minute=2)
    charge = await it.charge([params(max_tokens=100)], [made()])
    assert it._at_once == {WHO.key: 110}
    del charge
    assert not it._at_once
    await it.charge([params(max_tokens=100)], [made()])
    with pytest.raises(RateLimited, match="requests"):
        await it.charge([params(max_tokens=100)], [made()])
    assert not it._at_once
