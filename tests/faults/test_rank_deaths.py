"""One worker of a role, whose only rank is killed every few seconds under eight streams.

Nobody else can take the requests: they wait until the rank is back, in the worker that lived on,
with fresh memory. Ranks start as slowly as actors do, so that requests and transfers come while
there is none. Five minutes of it in `make test-long`, some kills in `make test`.
"""

import asyncio
import os
import signal

import pytest
from support.process_cluster import ProcessCluster, config_of, is_gone, is_long, note
from support.samples import sample

SECONDS, PERIOD_S = (300, 5.0) if is_long() else (10, 4.0)
STREAMS = 8
LAUNCH_DELAY_S = 0.3
TIMEOUT_S = 120.0
"""Of a request: many restarts long, so that only one that nobody wakes comes near it."""
LAYOUTS = {
    "pd": {"placement__path": "pd"},
    "colocated": {"colocated": True, "pools__prefill__replicas": 0},
}
VICTIMS = [("pd", "decode"), ("colocated", "decode"), ("pd", "prefill")]


async def kill_rank(cluster, role):
    """SIGKILL a rank of a role's worker; returns once another stands in its place."""
    worker = next(r for r in await cluster.replicas() if r["role"] == role)
    (pid,) = worker["rank_pids"]
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        while not is_gone(pid):
            await asyncio.sleep(0.01)
        while True:
            now = [r for r in await cluster.replicas() if r["role"] == role]
            pids = [pid for r in now if r["state"] == "live" for pid in r["rank_pids"]]
            if len(pids) == 1 and not is_gone(pids[0]):
                break
            await asyncio.sleep(0.05)
    assert [r["worker_id"] for r in now] == [worker["worker_id"]], "the worker did not live on"


@pytest.mark.sampled(3)
@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize(("layout", "role"), sample(VICTIMS, 1))
async def test_a_rank_killed_again_and_again_costs_nobody_a_token(layout, role):
    sizes = {"pools__prefill__replicas": 1, "pools__decode__replicas": 1, "router__replicas": 1}
    config = config_of(**{**sizes, **LAYOUTS[layout]})
    async with ProcessCluster(config, launch_delay_s=LAUNCH_DELAY_S) as cluster:
        cluster.make_requests(2 * STREAMS, max_tokens=60)
        await cluster.learn()
        loop = asyncio.get_running_loop()
        load = asyncio.create_task(cluster.load(SECONDS, STREAMS, TIMEOUT_S))
        began, num_kills, rebuilt = loop.time(), 0, []
        while (due := began + (num_kills + 0.5) * PERIOD_S) < began + SECONDS:
            await asyncio.sleep(max(0.0, due - loop.time()))
            killed_at = loop.time()
            await kill_rank(cluster, role)
            rebuilt.append(round(loop.time() - killed_at, 2))
            num_kills += 1
        await load
        verdict = cluster.verdict()
        wrong = verdict.pop("wrong")
        facts = {"kills": num_kills, **verdict, "rebuilt_max_s": max(rebuilt), "wrong": len(wrong)}
        print(facts, wrong[:3])
        note(f"rank_deaths_{layout}_{role}", facts)
        assert wrong == []
        # A decode rank always has answers in hand; a prefill rank may be between two prompts.
        wanted = num_kills if role == "decode" else 1
        assert verdict["affected"] >= wanted, "kills that touched nobody prove nothing"
        assert await cluster.leaked() == {}
