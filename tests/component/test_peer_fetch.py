"""Prefixes fetched from peers with real models: equal, bit for bit, to what one engine computes.

Every direction, transport, block size, number of ranks, and pools that stand for a device's.
"""

import random

import pytest
from support.in_process_cluster import InProcessCluster, load
from support.models import TINY
from support.prefixes import PoolsView, look_at, make_busy

from core.config import EngineConfig
from core.plan import SampleSpec, StepItem, StepPlan
from core.session import Role
from core.types import SamplingParams
from engine.model.runner import ModelRunner
from simulation.hash_runner import MemoryKV

pytestmark = pytest.mark.sampled(2)

RNG = random.Random(9)
SHARED = [RNG.randrange(256) for _ in range(320)]
FIRST = [*SHARED, *(RNG.randrange(256) for _ in range(20))]
SECOND = [*SHARED, *(RNG.randrange(256) for _ in range(30))]
NUM_TOKENS = 12


def alone(prompt, dtype="float32"):
    """One sequence, one block table, the whole prompt at once."""
    spec, model = load(TINY, dtype)
    runner = ModelRunner(model, MemoryKV(spec.layout(16), 40)._shards[0], 40, 16)
    out, start, fresh = [], 0, list(prompt)
    while len(out) < NUM_TOKENS:
        end = start + len(fresh)
        sample = SampleSpec(0, len(out), 7, SamplingParams(temperature=0.0))
        table = tuple(range(-(-end // 16)))
        item = StepItem(1, start, tuple(fresh), table, (sample,))
        token = runner.execute(StepPlan(1, (item,)), lambda *_: None).tokens[1, 0].token_id
        out.append(token)
        start, fresh = end, [token]
    return out


def engine(block=16, ranks=1):
    return EngineConfig(
        block_size_tokens=block,
        num_blocks=96 * 16 // block,
        max_step_tokens=64,
        tensor_parallel_size=ranks,
    )


async def ask_both(cluster, source):
    """Let one worker compute a prompt, and another fetch what the next prompt shares with it.

    Returns:
        The second reply, and the workers that have served the first, by id.
    """
    view = PoolsView(lambda: cluster.units)
    look_at(cluster.orchestrator._attempts, view, b"")
    await cluster.ask(FIRST, max_tokens=NUM_TOKENS, ignore_eos=True)
    holders = [u for u in cluster.units if u.pool.num_cached]
    by_id = {u.descriptor.worker_id: u for u in holders}
    view.claims = {name: 0 for name, u in by_id.items() if u.descriptor.role is not source}
    make_busy(cluster.sessions, *by_id, now_s=cluster.clock.now_s())
    for session in cluster.sessions.all():
        # On a real clock a report may come between: the worker's own, by which it has nothing to
        # do, and which is taken to count already what the router thinks to have sent.
        session._load.report = lambda load, now_s: None
        for _ in range(30):
            session.measured(1_000, 10.0)  # the tiny model is faster than any fetch
    return await cluster.ask(SECOND, max_tokens=NUM_TOKENS, ignore_eos=True), by_id


async def second_answer(cluster, source):
    """Ask both, and see that the fetch went from a worker of this role to one that had nothing."""
    reply, by_id = await ask_both(cluster, source)
    timing = reply.ended.timing
    assert reply.ended.error is None and timing.fetch_outcome == "fetched", timing
    assert by_id[timing.why["decision"]["source"]].descriptor.role is source
    assert timing.prefill_worker not in by_id
    return reply


CASES = {
    "prefill from prefill": (Role.PREFILL, {}),
    "prefill from decode": (Role.DECODE, {}),
    "decode from decode": (Role.DECODE, {"prefill": 0, "path": "local"}),
}


@pytest.mark.parametrize("transport", ["inproc", "grpc", "shm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
async def test_a_fetched_prefix_is_the_computed_one(case, dtype, transport):
    source, how = CASES[case]
    workers = {"prefill": 2, "decode": 2} | how
    async with InProcessCluster(
        TINY, dtype, engine=engine(), transport=transport, threaded=True, **workers
    ) as cluster:
        reply = await second_answer(cluster, source)
    assert reply.ended.timing.fetched_tokens == len(SHARED)
    assert reply.ended.usage.cached_tokens == len(SHARED)
    assert reply.tokens[0] == alone(SECOND, dtype)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (engine(16), engine(32)),
        (engine(32), engine(8)),
        (engine(16, ranks=2), engine(16)),
        (engine(16), engine(16, ranks=2)),
    ],
    ids=["larger", "smaller", "one rank of two", "two ranks of one"],
)
async def test_a_prefix_fits_the_blocks_and_ranks_of_whoever_fetches_it(prefill, decode):
    async with InProcessCluster(
        TINY, engine=prefill, decode_engine=decode, transport="grpc", prefill=2, decode=1
    ) as cluster:
        reply = await second_answer(cluster, Role.DECODE)
    assert reply.ended.timing.fetched_tokens >= len(SHARED) - 32
    assert reply.tokens[0] == alone(SECOND)


async def test_a_device_loads_what_was_fetched_before_it_computes():
    async with InProcessCluster(
        TINY, engine=engine(), transport="shm", prefill=2, decode=1, staged=True
    ) as cluster:
        reply = await second_answer(cluster, Role.PREFILL)
    assert reply.tokens[0] == alone(SECOND)


async def test_what_a_decode_workers_device_keeps_to_itself_is_not_fetched():
    async with InProcessCluster(
        TINY, engine=engine(), transport="shm", prefill=2, decode=1, staged=True
    ) as cluster:
        reply, _ = await ask_both(cluster, Role.DECODE)
    assert reply.ended.timing.fetch_outcome == ""
    assert "source" not in reply.ended.timing.why["decision"]
    assert reply.tokens[0] == alone(SECOND)
