"""A worker that lacks the beginning of a prompt fetches it from one that has it."""

import asyncio

import pytest
from support.prefixes import (
    ENGINE,
    LOCAL,
    LONG,
    SHARED,
    TAIL,
    by_id,
    fetching,
    follow,
    held_elsewhere,
    ids,
    make_busy,
    plain,
)
from support.virtual import ask, run

from core.config import PlacementConfig
from core.session import FetchOutcome, Role
from kv_transfer.transitions import Transition

# --- every direction ------------------------------------------------------------------------------


def test_a_prefill_worker_fetches_from_a_prefill_worker():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        tokens, ended = await ask(cluster, "second", TAIL)
        return holder, tokens, ended, by_id(cluster, holder).transfers.offers.num_sent

    holder, tokens, ended, num_sent = fetching(scenario)
    timing = ended.timing
    assert ended.error is None and timing.attempts == ("0:pd:ok",)
    assert timing.prefill_worker != holder and num_sent == 1
    assert (timing.fetch_outcome, timing.fetched_tokens) == (FetchOutcome.FETCHED, SHARED)
    assert timing.why["decision"]["source"] == holder
    assert ended.usage.cached_tokens == SHARED
    assert tokens == plain(TAIL)


def test_a_prefill_worker_fetches_from_a_decode_worker():
    async def scenario(cluster):
        follow(cluster)
        await ask(cluster, "first", LONG)
        await asyncio.sleep(0.5)
        [old] = [n for n, u in cluster.units.items() if u.descriptor.role is Role.PREFILL]
        await cluster.kill(old)
        await cluster.add(Role.PREFILL)
        await asyncio.sleep(1.0)
        # The speed of a worker that nobody has measured is that of the others.
        for session in cluster.sessions.all():
            session.measured(1_000, 0.7)
        tokens, ended = await ask(cluster, "second", TAIL)
        return ids(cluster, Role.DECODE), tokens, ended

    [holder], tokens, ended = fetching(scenario, prefill=1)
    assert ended.timing.why["decision"]["source"] == holder
    assert (ended.timing.fetch_outcome, ended.timing.fetched_tokens) == ("fetched", SHARED)
    assert ended.usage.cached_tokens == SHARED and tokens == plain(TAIL)


@pytest.mark.parametrize("n", [1, 2])
def test_a_worker_that_does_both_phases_fetches_from_another(n):
    async def scenario(cluster):
        holder, _ = await held_elsewhere(cluster, Role.DECODE)
        tokens, ended = await ask(cluster, "second", TAIL, n=n)
        return holder, tokens, ended

    holder, tokens, ended = fetching(scenario, prefill=0, decode=2, placement=LOCAL)
    timing = ended.timing
    assert timing.attempts == ("0:local:ok",) and timing.decode_worker != holder
    assert (timing.fetch_outcome, timing.fetched_tokens) == ("fetched", SHARED)
    assert ended.usage.cached_tokens == SHARED
    assert tokens == run(lambda c: ask(c, prompt=TAIL, n=n), engine=ENGINE)[0]


def test_what_was_fetched_is_cache_like_any_other():
    async def scenario(cluster):
        holder, _ = await held_elsewhere(cluster)
        for name in ("second", "third"):
            _, ended = await ask(cluster, name, TAIL)
            yield_ = ended.timing
        return holder, yield_, ended.usage

    holder, timing, usage = fetching(scenario)
    assert timing.prefill_worker != holder and timing.fetch_outcome == ""
    assert usage.cached_tokens == len(TAIL) - 2


def test_only_what_is_missing_travels():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        [other] = [name for name in ids(cluster, Role.PREFILL) if name != holder]
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0) | {holder: 0}
        await ask(cluster, "beginning", LONG[:61])
        await asyncio.sleep(0.5)
        view.claims[holder] = SHARED // 4
        tokens, ended = await ask(cluster, "second", TAIL)
        return other, tokens, ended

    other, tokens, ended = fetching(scenario)
    assert ended.timing.prefill_worker == other
    assert (ended.timing.fetch_outcome, ended.timing.fetched_tokens) == ("fetched", SHARED - 60)
    assert ended.usage.cached_tokens == SHARED and tokens == plain(TAIL)


def test_nothing_is_fetched_unless_it_is_switched_on():
    async def scenario(cluster):
        await held_elsewhere(cluster)
        return (await ask(cluster, "second", TAIL))[1], cluster.transitions

    ended, transitions = fetching(scenario, placement=PlacementConfig(path="pd", peer_fetch=False))
    assert ended.timing.fetch_outcome == "" and "source" not in ended.timing.why["decision"]
    assert transitions[Transition.SENDER_OFFERED] == 2, "the two hand-overs"


def test_two_workers_that_fetch_from_each_other_do_not_wait_for_each_other():
    other_prompt = tuple(1 + n * 11 % 90 for n in range(150))

    async def scenario(cluster):
        view = follow(cluster)
        a, b = ids(cluster, Role.DECODE)
        for name, prompt, busy in (("one", LONG, b), ("two", other_prompt, a)):
            make_busy(cluster.sessions, busy)
            await ask(cluster, name, prompt)
            for session in cluster.sessions.all():
                session._load.clear()
        await asyncio.sleep(0.5)
        view.claims = {}
        asked = []
        # Each prompt to the worker that lacks it, both at once.
        for name, prompt, busy in (("three", LONG, a), ("four", other_prompt, b)):
            make_busy(cluster.sessions, busy)
            asked.append(asyncio.ensure_future(ask(cluster, name, (*prompt[:140], 7))))
            await asyncio.sleep(0)
            for session in cluster.sessions.all():
                session._load.remove("busy", 0.0)
        return await asyncio.gather(*asked)

    replies = fetching(scenario, prefill=0, decode=2, placement=LOCAL, latency_s=(0.002, 0.003))
    assert [ended.timing.fetch_outcome for _, ended in replies] == ["fetched", "fetched"]
    for (tokens, ended), prompt in zip(replies, (LONG, other_prompt), strict=True):
        assert ended.error is None and tokens == plain((*prompt[:140], 7))


def test_what_is_only_on_its_way_to_a_worker_is_not_fetched_from_there():
    async def scenario(cluster):
        follow(cluster)
        asking = [asyncio.ensure_future(ask(cluster, "first", LONG))]
        await asyncio.sleep(0.01)  # it is sent, and far from computed
        [holder] = [
            u.descriptor.worker_id
            for u in cluster.units.values()
            if u.attempts.by_run and u.descriptor.role is Role.PREFILL
        ]
        make_busy(cluster.sessions, holder)
        asking.append(asyncio.ensure_future(ask(cluster, "second", TAIL)))
        return holder, await asyncio.gather(*asking)

    holder, (_, (tokens, ended)) = fetching(scenario)
    assert ended.timing.prefill_worker != holder and ended.timing.fetch_outcome == ""
    assert tokens == plain(TAIL)
