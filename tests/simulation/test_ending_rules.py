"""Cancelled, stale, refused, drained or repeated:
how a request may end besides well, on virtual time."""

import asyncio
from dataclasses import replace

from support.virtual import PROMPT, ask, expected, run, unit

from core.config import PlacementConfig, RouterConfig
from core.errors import (
    Cancelled,
    Draining,
    DuplicateRequest,
    NoWorker,
)
from core.session import Role, Submit, Task
from core.types import SamplingParams, TextDelta


def test_a_cancel_before_its_submit_leaves_a_tombstone():
    async def scenario(cluster):
        decode = unit(cluster, Role.DECODE)
        decode.attempts.cancel("ghost", 3)
        request = cluster.request("ghost", PROMPT, SamplingParams(max_tokens=4))
        decode.attempts.submit("router", Submit(request, 3, Task.LOCAL, emitted=((),)))
        return decode.attempts.num_stale, dict(decode.attempts.by_run)

    stale, attempts = run(scenario)
    assert stale == 1 and attempts == {}


def test_a_submit_with_an_old_epoch_is_dropped():
    async def scenario(cluster):
        decode = unit(cluster, Role.DECODE)
        request = cluster.request("r", PROMPT, SamplingParams(max_tokens=4))
        decode.attempts.submit("router", Submit(request, 2, Task.LOCAL, emitted=((),)))
        decode.attempts.submit("router", Submit(request, 1, Task.LOCAL, emitted=((),)))
        epoch = decode.attempts.by_run["r"].epoch
        decode.attempts.cancel("r", 2)
        return epoch, decode.attempts.num_stale

    assert run(scenario) == (2, 1)


def test_two_tenants_never_share_blocks():
    async def scenario(cluster):
        cached = []
        for name, scope in (("a1", "a"), ("a2", "a"), ("b1", "b")):
            request = cluster.request(name, PROMPT, SamplingParams(max_tokens=4), scope=scope)
            events = await cluster.generate(request)
            cached.append(events[-1].usage.cached_tokens)
        return cached

    assert run(scenario) == [0, 56, 0]


def test_prefill_alone_serves_when_no_decode_worker_lives():
    tokens, ended = run(lambda c: ask(c), decode=0, placement=PlacementConfig(path="auto"))
    assert ended.error is None and ended.timing.path == "local" and tokens == expected()


def test_without_any_worker_the_refusal_is_immediate():
    tokens, ended = run(
        lambda c: ask(c), prefill=0, decode=0, placement=PlacementConfig(path="auto")
    )
    assert isinstance(ended.error, NoWorker) and ended.timing.e2e_s < 0.1


def test_a_request_id_may_be_used_again_after_its_end():
    """A worker keeps a tombstone of the first;
    the second must not be taken for a late Submit of it."""

    async def scenario(cluster):
        return [await ask(cluster, name="same") for _ in range(3)]

    replies = run(scenario)
    assert all(ended.error is None for _, ended in replies)
    assert [tokens for tokens, _ in replies] == [replies[0][0]] * 3


def test_an_abort_reaches_a_request_that_waits_for_a_permit_and_one_that_runs():
    async def scenario(cluster):
        one = asyncio.ensure_future(ask(cluster, name="one", max_tokens=60))
        two = asyncio.ensure_future(ask(cluster, name="two", max_tokens=60))
        await asyncio.sleep(0.05)
        assert (
            cluster.orchestrator.abort(("", "two"))
            and cluster.orchestrator.abort(("", "one"))
            and not cluster.orchestrator.abort(("", "none"))
        )
        return await asyncio.gather(one, two, return_exceptions=True)

    one, two = run(scenario, router=RouterConfig(max_running=1, max_queued=4))
    assert isinstance(one[1].error, Cancelled) and isinstance(two[1].error, Cancelled)


def test_draining_lets_requests_finish_for_a_while_and_then_ends_them():
    async def scenario(cluster):
        running = [
            asyncio.ensure_future(ask(cluster, name=f"r{i}", max_tokens=n, ignore_eos=True))
            for i, n in enumerate((4, 100))
        ]
        await asyncio.sleep(0.01)
        await cluster.orchestrator.drain(0.3)
        return [ended.error for _, ended in await asyncio.gather(*running)]

    short, long = run(scenario)
    assert short is None and isinstance(long, Draining)


def test_an_id_in_use_is_refused_and_the_first_goes_on():
    async def scenario(cluster):
        first = asyncio.ensure_future(ask(cluster, name="same"))
        await asyncio.sleep(0.001)
        events = await cluster.generate(
            cluster.request("same", PROMPT, SamplingParams(max_tokens=2))
        )
        return events, await first

    events, (tokens, ended) = run(scenario)
    assert isinstance(events[0].error, DuplicateRequest) and ended.error is None and len(tokens) > 0


def test_a_client_that_resumes_takes_the_place_of_its_old_run():
    """It may be back before the router has noticed that it left."""

    async def scenario(cluster):
        old = asyncio.ensure_future(ask(cluster, name="same", max_tokens=60))
        await asyncio.sleep(0.05)
        assert cluster.orchestrator.is_admitted(("", "same")), "it runs still"
        again = cluster.request("same", PROMPT, SamplingParams(max_tokens=60, temperature=0.0))
        events = await cluster.generate(replace(again, resume_from=(2,)))
        return (await old)[1], events

    left, events = run(scenario)
    assert isinstance(left.error, Cancelled) and events[-1].error is None
    tokens = [token for e in events if isinstance(e, TextDelta) for token in e.token_ids]
    assert tuple(tokens) == expected(max_tokens=60)[0][2:]
