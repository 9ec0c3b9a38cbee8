"""Requests on a cluster whose routers know what its workers cache, on virtual time: where they go,
what is found there, and that a view which is wrong costs hits alone."""

import asyncio

from support.virtual import run

from core.config import EngineConfig, PlacementConfig
from core.session import Role
from core.types import RequestEnded, SamplingParams
from simulation.oracle import Oracle
from simulation.prefix_invariants import check_views
from simulation.report import Report
from simulation.shape import VOCABULARY

LOCAL = PlacementConfig(path="local")
CHAT = tuple(range(1, 41))
"""Ten blocks."""
SEEN_S = 1.5
"""By then routers know of what was computed, and expect nothing more of what they have sent."""


async def ask(cluster, name, prompt=CHAT, scope="", router=None):
    """Ask a router, the first if none is named; checks the answer and returns its ending."""
    request = cluster.request(name, prompt, SamplingParams(max_tokens=4), scope=scope)
    wake = asyncio.Event()
    stream = (router or cluster.routers[0]).open(request, wake)
    events = []
    while not (events and isinstance(events[-1], RequestEnded)):
        await wake.wait()
        wake.clear()
        events += stream.take()
    (router or cluster.routers[0]).closed(wake)
    tokens = tuple(t for e in events for t in getattr(e, "token_ids", ()))
    [expected] = Oracle(cluster.layout, VOCABULARY, 200).expected(request)
    assert events[-1].error is None and tokens == expected.token_ids
    return events[-1]


def exact(cluster):
    report = Report()
    check_views(cluster, report)
    return report.violations == []


def test_the_next_turn_of_a_chat_goes_to_its_holder_whichever_router_is_asked():
    async def scenario(cluster):
        first = await ask(cluster, "one")
        await asyncio.sleep(SEEN_S)
        turns = [
            await ask(cluster, f"two-{i}", (*CHAT, 50 + i, 51, 52), router=router)
            for i, router in enumerate(cluster.routers)
        ]
        assert len({turn.timing.decode_worker for turn in (first, *turns)}) == 1
        assert [turn.timing.cached_tokens for turn in (first, *turns)] == [0, 40, 40]

    run(scenario, decode=4, prefill=0, routers=2, placement=LOCAL)


def test_another_tenant_neither_goes_there_for_it_nor_finds_it():
    async def scenario(cluster):
        await ask(cluster, "one", scope="red")
        await asyncio.sleep(SEEN_S)
        other = await ask(cluster, "two", scope="blue")
        same = await ask(cluster, "three", scope="red")
        assert (other.timing.cached_tokens, same.timing.cached_tokens) == (0, 36)

    run(scenario, decode=1, prefill=0, placement=LOCAL)


def test_a_holder_that_dies_is_forgotten_and_its_chat_is_exact_elsewhere():
    async def scenario(cluster):
        first = await ask(cluster, "one")
        await asyncio.sleep(SEEN_S)
        assert cluster.routers[0].view.workers()[first.timing.decode_worker] > 0
        await cluster.kill(first.timing.decode_worker)
        await asyncio.sleep(1.0)
        assert first.timing.decode_worker not in cluster.routers[0].view.workers()
        second = await ask(cluster, "two")
        assert second.timing.decode_worker != first.timing.decode_worker
        assert second.timing.cached_tokens == 0

    run(scenario, decode=3, prefill=0, placement=LOCAL)


def test_a_view_ten_minutes_old_costs_hits_and_nothing_else():
    """What it knows was evicted long ago, and of what is there now it knows nothing."""

    async def scenario(cluster):
        [old, young] = cluster.routers
        await ask(cluster, "one")
        await asyncio.sleep(SEEN_S)
        cluster.prefix_store.behind[old.name] = None
        for i in range(12):
            await ask(cluster, f"new-{i}", (60 + i, *CHAT), router=young)
        await asyncio.sleep(600.0)
        assert cluster.prefix_store.num_withheld > 0 and exact_but_for(cluster, old)
        stale = [await ask(cluster, f"stale-{i}", router=old) for i in range(3)]
        assert all(len(turn.timing.attempts) == 1 for turn in stale)
        cluster.prefix_store.behind.clear()
        await asyncio.sleep(2.0)
        assert exact(cluster)

    def exact_but_for(cluster, old):
        report = Report()
        check_views(cluster, report)
        return report.violations and all(f" {old.name}:" in v for v in report.violations)

    engine = EngineConfig(block_size_tokens=4, num_blocks=32, max_step_tokens=32, max_sequences=4)
    run(scenario, decode=2, prefill=0, routers=2, placement=LOCAL, engine=engine)


def test_ranks_that_return_with_empty_memory_take_their_blocks_out_of_every_view():
    async def scenario(cluster):
        first = await ask(cluster, "one")
        await asyncio.sleep(SEEN_S)
        node = first.timing.decode_worker
        assert cluster.routers[0].view.workers()[node] > 0
        cluster.runners[node].die_between_steps()
        await asyncio.sleep(2.0)
        assert cluster.units[node].descriptor.role is Role.DECODE
        assert cluster.routers[0].view.workers().get(node, 0) == 0 and exact(cluster)
        assert (await ask(cluster, "two")).timing.cached_tokens == 0

    run(scenario, decode=1, prefill=0, placement=LOCAL)
