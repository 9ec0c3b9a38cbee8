"""Redis freezes, dies and comes back empty under load:
nobody notices but `/ready`'s store field."""

import asyncio
import os
import signal

import httpx
import pytest
from redis import asyncio as redis_asyncio
from redis.exceptions import RedisError
from support.process_cluster import ProcessCluster, config_of, is_gone, is_long, note, state_of

from cluster.redis.member_store import KEY
from cluster.redis.server import RedisServer

FROZEN_S = 60 if is_long() else 6


async def store_state(cluster):
    async with httpx.AsyncClient(timeout=2) as http:
        return [
            (await http.get(f"http://127.0.0.1:{p}/ready")).json()["store"]
            for p, _ in cluster.local.addresses
        ]


async def until(predicate, timeout_s=15):
    async with asyncio.timeout(timeout_s):
        while not await predicate():
            await asyncio.sleep(0.1)


@pytest.mark.sampled(3)
@pytest.mark.timeout(400)
async def test_redis_killed_frozen_and_back_empty_costs_nothing():
    server = RedisServer()
    try:
        async with ProcessCluster(config_of(redis__url=server.url)) as cluster:
            cluster.make_requests(16, max_tokens=30)
            await cluster.learn()
            ttft = {}

            async def phase(name, seconds, start=lambda: None):
                cluster.answers.clear()
                load = asyncio.create_task(cluster.load(seconds, 6))
                await asyncio.sleep(0.3)
                start()
                await load
                verdict = cluster.verdict()
                assert verdict["wrong"] == [] and verdict["affected"] == 0, (name, verdict)
                times = sorted(a.ttft_s * 1000 for _, a in cluster.answers)
                ttft[name] = {
                    "p50_ms": times[len(times) // 2],
                    "p99_ms": times[int(0.99 * len(times))],
                    "n": len(times),
                }

            async def all_in(state):
                return set(await store_state(cluster)) == {state}

            async def is_held():
                client = redis_asyncio.Redis.from_url(server.url)
                try:
                    return await client.get(KEY) is not None
                except RedisError:
                    return False  # not up again yet
                finally:
                    await client.aclose()

            await until(lambda: all_in("ok"))
            await phase("control", 4 if not is_long() else 30)
            await phase("frozen", FROZEN_S, lambda: os.kill(server.pid, signal.SIGSTOP))
            assert state_of(server.pid) == "T"
            await until(lambda: all_in("down"))
            os.kill(server.pid, signal.SIGCONT)
            await until(lambda: all_in("ok"))
            killed = server.pid
            await phase(
                "killed", 5 if not is_long() else 30, lambda: os.kill(killed, signal.SIGKILL)
            )
            assert is_gone(killed)
            await until(is_held)
            assert server.num_restarts == 1
            await until(lambda: all_in("ok"))
            print(ttft)
            note(
                "store",
                {
                    "ttft": ttft,
                    "added_p99_ms": {
                        k: v["p99_ms"] - ttft["control"]["p99_ms"] for k, v in ttft.items()
                    },
                },
            )
    finally:
        if not is_gone(server.pid):
            os.kill(server.pid, signal.SIGCONT)
        server.stop()
