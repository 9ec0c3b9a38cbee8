"""Preempted sequences and storage tiers, on virtual time: they go on where they were, exactly."""

import asyncio
import dataclasses

import pytest
from support.events import read_events
from support.virtual import run, unit

from core.config import EngineConfig, PlacementConfig
from core.prefix_changes import StorageTier
from core.session import Role
from core.stored_block import StorageFault
from core.types import SamplingParams
from engine.scheduling.sequence import Status
from simulation.block_store import MemoryBlockStore

SIZE = 4
ENGINE = EngineConfig(block_size_tokens=SIZE, num_blocks=40, max_step_tokens=32, max_sequences=8)
"""Two of the answers below fill the pool."""
PROMPTS = [tuple(range(1 + i, 31 + i)) for i in range(4)]
HOST = {"host_blocks": 200}
SAMPLED = {"temperature": 0.9, "presence_penalty": 0.7, "repetition_penalty": 1.2}


async def ask(cluster, name, prompt, tier="standard", **sampling):
    params = SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **sampling})
    request = dataclasses.replace(cluster.request(name, prompt, params, 600.0), tier=tier)
    events = await cluster.generate(request)
    assert events[-1].error is None
    return read_events(events)


async def ask_all(cluster, **sampling):
    asked = [ask(cluster, f"r{i}", prompt, **sampling) for i, prompt in enumerate(PROMPTS)]
    return await asyncio.gather(*asked)


def decode(cluster):
    return unit(cluster, Role.DECODE)


class Computed:
    """Tokens computed on decode workers, one by one or in prompts."""

    def __init__(self, cluster):
        self.num_tokens = 0
        scheduler = decode(cluster).scheduler
        commit = scheduler.commit

        def counting(plan, result, now_s):
            self.num_tokens += plan.num_tokens
            return commit(plan, result, now_s)

        scheduler.commit = counting


def swapped(sampling, path="pd", **shape):
    """Ask for all prompts at once; returns tokens, counts of the tiers, tokens computed."""

    async def scenario(cluster):
        computed = Computed(cluster)
        tokens = await ask_all(cluster, **sampling)
        worker = decode(cluster)
        assert worker.scheduler.num_preemptions > 0
        counts = worker.stored.tiers.counts if worker.stored else None
        return tokens, counts, computed.num_tokens

    placement = PlacementConfig(path=path)
    return run(scenario, **{"engine": ENGINE, "placement": placement, **shape})


def alone(sampling, path="pd"):
    async def scenario(cluster):
        tokens = await ask_all(cluster, **sampling)
        assert decode(cluster).scheduler.num_preemptions == 0
        return tokens

    roomy = ENGINE.model_copy(update={"num_blocks": 400})
    return run(scenario, engine=roomy, placement=PlacementConfig(path=path))


@pytest.mark.parametrize("path", ["pd", "local"])
@pytest.mark.parametrize("sampling", [{}, {"n": 2, "max_tokens": 24}, SAMPLED])
def test_what_a_preempted_sequence_has_computed_is_loaded_and_changes_no_token(sampling, path):
    tokens, counts, num_computed = swapped(sampling, path, **HOST)
    again, _, num_computed_again = swapped(sampling, path)
    assert tokens == again == alone(sampling, path)
    assert counts.swapped_in_blocks[StorageTier.HOST] > 0
    assert num_computed < num_computed_again


@pytest.mark.parametrize("copy_block_s", [0.05, 3.0])
def test_blocks_that_are_late_or_dearer_than_computing_are_computed(copy_block_s):
    tokens, counts, _ = swapped({}, **HOST, copy_block_s=copy_block_s)
    assert tokens == alone({})
    assert counts.swapped_in_blocks.total() == 0


def test_a_tier_without_room_costs_hits_alone():
    tokens, _, _ = swapped({}, host_blocks=3)
    assert tokens == alone({})


def test_copies_that_fail_cost_hits_alone():
    tokens, counts, _ = swapped({}, **HOST, copy_fault_odds=0.3)
    assert tokens == alone({})
    assert counts.faults[StorageTier.HOST, StorageFault.UNREACHABLE] > 0
    assert counts.swapped_in_blocks[StorageTier.HOST] > 0


def test_a_store_that_hangs_leaves_half_of_the_pool_to_those_who_compute(monkeypatch):
    read = MemoryBlockStore.read
    engine = ENGINE.model_copy(update={"num_blocks": 54})

    async def scenario(cluster):
        answers = asyncio.Event()

        async def hang(store, copies, pool):
            await answers.wait()
            return await read(store, copies, pool)

        monkeypatch.setattr(MemoryBlockStore, "read", hang)
        tokens = await ask_all(cluster, max_tokens=60)
        num_loading = decode(cluster).stored.tiers.num_loading
        answers.set()
        return tokens, num_loading

    tokens, num_loading = run(scenario, engine=engine, **HOST)
    assert 0 < num_loading <= engine.num_blocks // 2
    roomy = ENGINE.model_copy(update={"num_blocks": 400})
    assert tokens == run(lambda cluster: ask_all(cluster, max_tokens=60), engine=roomy)


@pytest.mark.parametrize(
    ("becomes", "copy_s"),
    [(Status.FINISHED, 0.001), (Status.RUNNING, 3.0)],
    ids=["cancelled", "late"],
)
def test_nothing_more_is_read_for_a_sequence_that_does_not_wait(becomes, copy_s, monkeypatch):
    monkeypatch.setattr("worker.stored_prefixes.READ_AT_ONCE_BLOCKS", 2)

    async def scenario(cluster):
        worker = decode(cluster)
        (store,) = worker.stored._stores.values()
        working = asyncio.get_running_loop().create_task(ask_all(cluster))
        loading = worker.scheduler.arriving.values()
        while not any(s.status is Status.LOADING for s in loading):
            await asyncio.sleep(0.0001)
        (sequence,) = (s for s in loading if s.status is Status.LOADING)
        assert store.num_read == 0 and worker.stored.num_live > 2
        store.copy_s = copy_s
        # The others compute.
        forget = worker.stored.tiers.forget
        monkeypatch.setattr(worker.scheduler.swapping, "begin", lambda other, _: forget(other))
        if becomes is Status.FINISHED:
            worker.scheduler.cancel(sequence)
        await asyncio.sleep(2 * copy_s)
        assert sequence.status is becomes
        assert store.num_read == 2 and worker.stored.num_live == 0
        store.copy_s = 0.0
        working.cancel()

    run(scenario, engine=ENGINE, step_s=0.2, **HOST)


def plans_after_arrival(scheduler, name):
    """Plans from now on that a request waited for; True: and it waits on."""
    plans = []
    plan = scheduler.plan

    def is_waiting():
        # A worker knows it by a key of the run.
        return any(s.request.request_id.startswith(f"{name}~") for s in scheduler.waiting)

    def watched(now_s):
        was_waiting = is_waiting()
        made = plan(now_s)
        if was_waiting:
            plans.append(is_waiting())
        return made

    scheduler.plan = watched
    return plans


def test_batch_work_yields_to_a_chat_and_goes_on_where_it_was():
    """What it has computed comes back from host memory; the chat waits for no copy."""
    prompts = PROMPTS[:2]

    async def batch(cluster):
        asked = [ask(cluster, f"b{i}", p, "batch", max_tokens=60) for i, p in enumerate(prompts)]
        return await asyncio.gather(*asked)

    async def scenario(cluster):
        working = asyncio.get_running_loop().create_task(batch(cluster))
        scheduler = decode(cluster).scheduler
        while cluster.num_steps == 0 or scheduler.pool.num_available > 4:
            await asyncio.sleep(0.001)
        before = {s.request.request_id: s.num_computed_tokens for s in scheduler.running}
        plans = plans_after_arrival(scheduler, "chat")
        chat = await ask(cluster, "chat", range(40, 80), "interactive", max_tokens=4)
        assert not working.done() and scheduler.num_preemptions > 0
        assert plans == [False], "the first plan after its arrival gives it blocks"
        tokens = await working
        counts = decode(cluster).stored.tiers.counts
        return chat, tokens, before, counts.swapped_in_blocks[StorageTier.HOST]

    async def separately(cluster):
        chat = await ask(cluster, "chat", range(40, 80), "interactive", max_tokens=4)
        return chat, await batch(cluster)

    chat, tokens, before, num_swapped_in = run(scenario, engine=ENGINE, **HOST)
    roomy = ENGINE.model_copy(update={"num_blocks": 400})
    assert (chat, tokens) == run(separately, engine=roomy)
    assert min(before.values()) > 30, "their output was under way"
    assert num_swapped_in > 0
