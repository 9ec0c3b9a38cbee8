"""A client that leaves at any stage of the walk: blocks back on both sides, nothing left anywhere.

Real scheduler, real gRPC transfers with agent threads, the tiny model. 30 trials a stage in `make
test`, 300 in `make test-long`; a trial counts only if the request was seen in its stage when the
client left.
"""

import asyncio
import random
import time

import pytest
from support.in_process_cluster import InProcessCluster
from support.models import TINY
from support.process_cluster import is_long, note

from core.config import EngineConfig
from core.errors import InvariantViolation
from core.session import Role
from core.types import TextDelta

pytestmark = pytest.mark.sampled(2)

TRIALS = 300 if is_long() else 30
ENGINE = EngineConfig(block_size_tokens=16, num_blocks=96, max_step_tokens=32)


def num_tokens(events):
    return sum(len(e.token_ids) for e in events if isinstance(e, TextDelta))


STAGES = {
    "waiting for a permit": lambda p, d, o, e: o._admission.num_queued > 0,
    "queued at prefill": lambda p, d, o, e: bool(p.scheduler.waiting),
    "prefill running": lambda p, d, o, e: bool(p.scheduler.running),
    "blocks reserved": lambda p, d, o, e: bool(d.scheduler.arriving),
    "transferring": lambda p, d, o, e: any(
        r._blocks and r._blocks.num_bytes for r in list(d.agent._receivers.values())
    ),
    "prefill done": lambda p, d, o, e: bool(p.scheduler.holding),
    "first token": lambda p, d, o, e: num_tokens(e) >= 1,
    "decoding": lambda p, d, o, e: num_tokens(e) >= 8,
}
longest_s: dict[str, float] = {}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", STAGES)
async def test_a_client_that_leaves_gives_everything_back(stage):
    rng, is_there = random.Random(5), STAGES[stage]
    async with InProcessCluster(TINY, engine=ENGINE, transport="grpc", threaded=True) as cluster:
        prefill, decode = cluster.of_role(Role.PREFILL)[0], cluster.of_role(Role.DECODE)[0]
        admission = cluster.orchestrator._admission
        done = 0
        for _ in range(TRIALS * 20):
            if done == TRIALS:
                break
            admission._permits.num_permits = 0 if stage == "waiting for a permit" else 64
            events = []
            prompt = [rng.randrange(10, 250) for _ in range(rng.randint(60, 300))]
            request = cluster.request(
                prompt, max_tokens=60, ignore_eos=True, n=rng.choice([1, 1, 2])
            )
            task = asyncio.create_task(cluster.orchestrator.run(request, events.append))
            while not task.done() and not is_there(prefill, decode, cluster.orchestrator, events):
                await asyncio.sleep(0)
            was_there = not task.done()
            left_at = time.monotonic()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await at_rest(cluster, 5.0)
            if was_there:
                done += 1
                longest_s[stage] = max(longest_s.get(stage, 0.0), time.monotonic() - left_at)
        assert done == TRIALS, f"only {done} trials met the stage"
    note("disconnects", {"trials_a_stage": TRIALS, "leaked": 0, "longest_return_s": longest_s})


async def at_rest(cluster, patience_s):
    """Wait until nothing is held anywhere; the last look may raise."""
    until = time.monotonic() + patience_s
    while True:
        try:
            for unit in cluster.units:
                unit.check_at_rest()
        except InvariantViolation:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.002)
        else:
            return
