"""One rank of a group killed or stopped under load:
its requests go on elsewhere exactly, its group comes back."""

import asyncio
import os
import signal

import pytest
from support.process_cluster import ProcessCluster, config_of, is_gone, is_long, note, state_of

ROUNDS = 10 if is_long() else 1


async def rank_of(cluster, role):
    """A random rank of a random worker of a role; any of the group, not only the first."""
    groups = [
        r["rank_pids"]
        for r in await cluster.replicas()
        if r["role"] == role and r["state"] == "live"
    ]
    return cluster.rng.choice([pid for pids in groups for pid in pids])


@pytest.mark.sampled(3)
@pytest.mark.timeout(1200)
async def test_a_rank_killed_or_stopped_under_load_costs_nobody_a_token():
    """Exact because prefill has as many ranks:
    between unequal sizes sums round differently (docs/recovery.md)."""
    engine = {"num_blocks": 512, "tensor_parallel_size": 2}
    config = config_of(
        pools__decode__engine=engine, pools__prefill={"replicas": 1, "engine": engine}
    )
    async with ProcessCluster(config) as cluster:
        cluster.make_requests(16, max_tokens=40)
        await cluster.learn()
        affected, rebuilt = 0, []
        for _ in range(ROUNDS):
            for number in (signal.SIGKILL, signal.SIGSTOP):
                cluster.answers.clear()
                load = asyncio.create_task(cluster.load(6, 8))
                await asyncio.sleep(cluster.rng.uniform(0.5, 1.5))
                pid = await rank_of(cluster, "decode")
                os.kill(pid, number)
                began = asyncio.get_running_loop().time()
                while number == signal.SIGSTOP and state_of(pid) not in ("T", ""):
                    await asyncio.sleep(0.01)
                async with asyncio.timeout(60):
                    while not is_gone(pid) or not await _is_whole(cluster):
                        await asyncio.sleep(0.1)
                rebuilt.append(round(asyncio.get_running_loop().time() - began, 2))
                await load
                verdict = cluster.verdict()
                assert verdict["wrong"] == []
                affected += verdict["affected"]
        assert affected > 0, "no request was touched, so nothing was proved"
        assert await cluster.leaked() == {}
    print(affected, "affected, groups rebuilt after", rebuilt, "s")
    note("ranks", {"affected": affected, "lost": 0, "inexact": 0, "rebuilt_after_s": rebuilt})


async def _is_whole(cluster):
    live = [
        r
        for r in await cluster.replicas()
        if r["state"] == "live" and not any(map(is_gone, r["rank_pids"]))
    ]
    return len(live) == 3
