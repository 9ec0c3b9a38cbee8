"""A worker that lacks the beginning of a prompt fetches it from one that has it, on virtual time.

Each fault is checked to have happened; whatever happens, the answer is exact and no attempt is
lost.
"""

import asyncio

import pytest
from support.prefixes import follow, make_busy
from support.virtual import ask, run

from core.config import EngineConfig, PlacementConfig, TransferConfig
from core.session import FetchOutcome, OfferPrefix, Role
from core.types import SamplingParams
from kv_transfer import codec
from kv_transfer.transitions import Transition

LONG = tuple(1 + n * 7 % 90 for n in range(150))
TAIL = (*LONG[:140], 3, 1, 4, 1, 5, 9, 2, 6, 5, 3)
"""The same but for its end: 35 blocks of 4 tokens are shared."""
SHARED = 140
ENGINE = EngineConfig(block_size_tokens=4, num_blocks=160, max_step_tokens=64, max_sequences=16)
FETCHES = PlacementConfig(path="pd", peer_fetch=True)
LOCAL = PlacementConfig(path="local", peer_fetch=True)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


def fetching(scenario, **shape):
    return run(scenario, **{"engine": ENGINE, "placement": FETCHES, "prefill": 2, **shape})


def plain(prompt, **shape):
    """The answer of a cluster that fetches nothing."""
    return run(lambda c: ask(c, prompt=prompt), engine=ENGINE, **shape)[0]


def ids(cluster, role):
    return [u.descriptor.worker_id for u in cluster.units.values() if u.descriptor.role is role]


def by_id(cluster, worker_id):
    return next(u for u in cluster.units.values() if u.descriptor.worker_id == worker_id)


async def held_elsewhere(cluster, role=Role.PREFILL, prompt=LONG):
    """One worker has computed a prompt; those of its role that did not are free, it is not."""
    follow(cluster)
    await ask(cluster, "first", prompt)
    await asyncio.sleep(0.5)
    view = cluster.orchestrator._attempts._prefixes._view
    [holder] = [
        u.descriptor.worker_id
        for u in cluster.units.values()
        if u.descriptor.role is role and u.pool.num_cached
    ]
    make_busy(cluster.sessions, holder)
    return holder, view


# --- every direction -------------------------------------------------------------------------------


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

    ended, transitions = fetching(scenario, placement=PlacementConfig(path="pd"))
    assert ended.timing.fetch_outcome == "" and "source" not in ended.timing.why["decision"]
    assert transitions[Transition.SENDER_OFFERED] == 2, "the two hand-overs"


# --- everything that can go wrong ------------------------------------------------------------------


def is_frame(message):
    return isinstance(message, bytes) and message[:1] == b"\x05"


def is_between_prefill(stream):
    ends = (stream.node, stream.peer.node)
    return stream.kind == "fetch" and all(node.startswith("prefill") for node in ends)


def computed(ended, outcome, tokens, prompt=TAIL):
    """The fetch ended so, and the prompt was computed, in the same attempt."""
    assert ended.error is None and ended.timing.attempts == ("0:pd:ok",)
    assert (ended.timing.fetch_outcome, ended.timing.fetched_tokens) == (outcome, 0)
    assert tokens == plain(prompt)


def test_a_holder_that_has_evicted_it_refuses_at_once():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        pool = by_id(cluster, holder).pool
        pool.free(pool.allocate(pool.num_available))  # all that was cached makes room
        view.claims = {holder: SHARED // 4} | dict.fromkeys(ids(cluster, Role.DECODE), 0)
        tokens, ended = await ask(cluster, "second", TAIL)
        return tokens, ended, by_id(cluster, holder).transfers.offers.num_declined

    tokens, ended, num_declined = fetching(scenario)
    computed(ended, "not_held", tokens)
    assert num_declined == 1 and ended.timing.fetch_s < 0.02


def test_a_prompt_of_another_scope_is_not_sent_whatever_an_index_says():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = {holder: SHARED // 4} | dict.fromkeys(ids(cluster, Role.DECODE), 0)
        request = cluster.request("second", TAIL, GREEDY, scope="another tenant")
        events = await cluster.generate(request)
        return events[-1]

    ended = fetching(scenario)
    assert ended.error is None and ended.timing.fetch_outcome == "not_held"
    assert ended.usage.cached_tokens == 0


def test_a_holder_that_dies_in_the_middle_costs_no_attempt():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        seen = []

        def watch(stream, message):
            if is_frame(message) and not seen:
                seen.append(stream.node)
                cluster.loop.create_task(cluster.kill(holder))
                return None
            return message

        cluster.hub.tamper = watch
        tokens, ended = await ask(cluster, "second", TAIL)
        return holder, seen, tokens, ended

    holder, seen, tokens, ended = fetching(scenario)
    assert seen == [holder]
    computed(ended, "failed", tokens)


def test_wrong_bytes_are_asked_for_again_and_then_computed():
    async def scenario(cluster):
        _, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        flips = []

        def flip(stream, message):
            if is_between_prefill(stream) and is_frame(message):
                flips.append(stream)
                return message[:-5] + bytes([message[-5] ^ 4]) + message[-4:]
            return message

        cluster.hub.tamper = flip
        tokens, ended = await ask(cluster, "second", TAIL)
        return len(flips), tokens, ended

    flips, tokens, ended = fetching(scenario)
    assert flips >= 2
    computed(ended, "failed", tokens)


def test_a_slow_holder_is_waited_for_no_longer_than_computing_takes():
    async def scenario(cluster):
        _, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        cluster.hub.extra_delay_s = lambda stream: 3.0 * is_between_prefill(stream)
        tokens, ended = await ask(cluster, "second", TAIL)
        return cluster.transitions[Transition.RECEIVER_FETCHING], tokens, ended

    num_fetches, tokens, ended = fetching(scenario)
    assert num_fetches == 3, "two hand-overs, and the fetch that came to nothing"
    computed(ended, "late", tokens)
    assert 0.05 < ended.timing.fetch_s < 0.25


def test_an_offer_that_is_lost_on_its_way_costs_a_short_wait():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        commands = by_id(cluster, holder).attempts
        lost = []
        commands.offer_prefix = lost.append
        tokens, ended = await ask(cluster, "second", TAIL)
        return lost, tokens, ended

    lost, tokens, ended = fetching(scenario)
    assert [type(message) for message in lost] == [OfferPrefix]
    computed(ended, "late", tokens)


def test_a_puller_without_room_computes():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        [other] = [name for name in ids(cluster, Role.PREFILL) if name != holder]
        unit_ = by_id(cluster, other)
        unit_.scheduler.prefixes.num_reserved = 1_000  # as many others are fetched
        tokens, ended = await ask(cluster, "second", TAIL)
        unit_.scheduler.prefixes.num_reserved -= 1_000
        return tokens, ended

    tokens, ended = fetching(scenario)
    computed(ended, "no_room", tokens)


def test_peers_read_a_bounded_part_of_a_pool():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        prefixes = by_id(cluster, holder).scheduler.prefixes
        prefixes.num_read = ENGINE.num_blocks // 4 - SHARED // 4 + 1
        tokens, ended = await ask(cluster, "second", TAIL)
        prefixes.num_read = 0
        return tokens, ended

    tokens, ended = fetching(scenario)
    computed(ended, "not_held", tokens)


def test_an_offer_that_nobody_comes_for_is_over_with_its_lease():
    async def scenario(cluster):
        holder, _ = await held_elsewhere(cluster)
        unit_ = by_id(cluster, holder)
        transfer_id = cluster.ids.transfer()
        unit_.attempts.offer_prefix(OfferPrefix(transfer_id, LONG, "", "prefill2", 7))
        num_pinned = unit_.pool.num_held
        await asyncio.sleep(3.0)
        return num_pinned, unit_.pool.num_held, len(unit_.transfers.offers)

    transfer = TransferConfig(lease_s=1.0, frame_bytes=4096)
    assert fetching(scenario, transfer=transfer) == (len(LONG) // 4, 0, 0)


def test_a_request_that_leaves_while_its_prefix_comes_leaves_nothing_behind():
    async def scenario(cluster):
        _, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        started = asyncio.Event()

        def watch(stream, message):
            if is_frame(message):
                started.set()
            return message

        cluster.hub.tamper = watch
        asking = asyncio.ensure_future(ask(cluster, "second", TAIL))
        await started.wait()
        reserved = [u.scheduler.prefixes.num_reserved for u in cluster.units.values()]
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.sleep(1.0)
        cluster.hub.tamper = lambda stream, message: message
        return reserved, [u.scheduler.prefixes.num_reserved for u in cluster.units.values()]

    before, after = fetching(scenario)
    assert any(before) and not any(after)


@pytest.mark.parametrize("side", ["puller", "holder"])
def test_a_pool_that_is_replaced_in_mid_fetch_is_neither_read_nor_attached(side):
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        [other] = [name for name in ids(cluster, Role.PREFILL) if name != holder]
        target = by_id(cluster, holder if side == "holder" else other)
        replaced = []

        def replace(stream, message):
            is_frame = isinstance(message, bytes) and codec.decode(message)
            kind = type(is_frame[1]).__name__ if is_frame else ""
            if kind == ("Reserved" if side == "holder" else "Commit") and not replaced:
                if stream.peer.node.startswith("prefill"):
                    replaced.append(kind)
                    target.components.kv.generation += 1
            return message

        cluster.hub.tamper = replace
        tokens, ended = await ask(cluster, "second", TAIL)
        return replaced, tokens, ended

    replaced, tokens, ended = fetching(scenario)
    assert len(replaced) == 1 and ended.error is None
    assert ended.timing.fetched_tokens == 0 and tokens == plain(TAIL)


def test_a_holder_that_failed_is_asked_for_nothing_for_a_while():
    async def scenario(cluster):
        holder, view = await held_elsewhere(cluster)
        view.claims = dict.fromkeys(ids(cluster, Role.DECODE), 0)
        by_id(cluster, holder).attempts.offer_prefix = lambda message: None
        outcomes = []
        for number in range(3):
            prompt = (*LONG[:140], *(number + 10,) * 10)
            [other] = [name for name in ids(cluster, Role.PREFILL) if name != holder]
            pool = by_id(cluster, other).pool
            pool.free(pool.allocate(pool.num_available))
            _, ended = await ask(cluster, f"r{number}", prompt)
            outcomes.append(ended.timing.fetch_outcome)
            await asyncio.sleep(0.1 if not number else 6.0)
        return outcomes

    assert fetching(scenario) == ["late", "", "late"]


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
                session._load.remove("busy")
        return await asyncio.gather(*asked)

    replies = fetching(scenario, prefill=0, decode=2, placement=LOCAL, latency_s=(0.002, 0.003))
    assert [ended.timing.fetch_outcome for _, ended in replies] == ["fetched", "fetched"]
    for (tokens, ended), prompt in zip(replies, (LONG, other_prompt), strict=True):
        assert ended.error is None and tokens == plain((*prompt[:140], 7))
