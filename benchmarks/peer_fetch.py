"""What a prefix costs the first token: computed, cached at the same worker, or fetched from a peer.

Two workers that do both phases, each with its ranks, and a router in this process; a real Redis
and a model of Qwen2.5-0.5B's shape with random weights. Each round has a fresh prefix: the first
prompt misses, the second hits at the same worker; for the third the router thinks that this worker
is busy, so that the other one fetches. Only the router's idea of it is busy: nothing else runs.
Run: python -m benchmarks.peer_fetch [--prompt 2048] [--hit 0.9] [--rounds N]
[--transports shm grpc]
"""

import argparse
import asyncio
import random
import tempfile
from pathlib import Path

from benchmarks.handover import config_of, make_model
from benchmarks.record import quantiles, save
from cluster.redis.server import RedisServer
from cluster.router_process import RunningRouter
from cluster.worker_process import RunningWorker
from core.config import BatonConfig
from core.ids import Ids, RequestId, RunId
from core.session import PoolId, Role
from core.types import GenerateRequest, RequestEnded, SamplingParams, TextDelta
from simulation.ports import StaticMembership

KEY = "a secret of sufficient length"
OUTPUT = 4
PUBLISHED_S = 0.5
"""Longer than a worker takes to publish what it has cached."""
BUSY_TOKENS = 10**9


def config_with(folder, transport, url):
    tree = config_of(folder, "colocated").model_dump()
    tree["security"]["cluster_key"] = KEY
    tree["redis"] = {"url": url}
    tree["transfer"]["transports"] = [transport]
    return BatonConfig.model_validate(tree)


class House:
    """Two workers and a router."""

    def __init__(self, router, workers):
        self.router = router
        self.workers = workers
        self.ids = Ids()

    async def ask(self, token_ids):
        """One greedy request; returns its TTFT at the router (s) and its timing."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        first = []
        ended = []

        def emit(event):
            if isinstance(event, TextDelta) and event.token_ids:
                first.append(loop.time())
            elif isinstance(event, RequestEnded):
                ended.append(event)

        sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
        request = GenerateRequest(
            RequestId(self.ids.request()), "", token_ids, sampling, 1, began + 600.0
        )
        await self.router.orchestrator.run(request, emit)
        assert ended[0].error is None, ended
        return first[0] - began, ended[0].timing

    def make_busy(self, name, *, is_busy):
        for session in self.router.sessions.all():
            if session.descriptor.worker_id == name:
                if is_busy:
                    session._load.add(RunId("busy"), BUSY_TOKENS, 0.0)
                else:
                    session._load.remove(RunId("busy"), 0.0)


async def started(config):
    membership = StaticMembership()
    router = RunningRouter(config, membership)
    workers = [await RunningWorker.start(config, PoolId(Role.DECODE), node="n") for _ in range(2)]
    await router.start()
    for worker in workers:
        membership.join(worker.descriptor)
    await asyncio.sleep(3.0)  # sessions stand, and the canary has gone through
    return House(router, workers)


async def one_round(house, rng, num_tokens, num_shared):
    """Return a row: TTFT of a miss, a hit at the same worker, and a fetch."""

    def tokens(count):
        return tuple(rng.randrange(1000, 150_000) for _ in range(count))

    shared = tokens(num_shared)
    miss_s, miss = await house.ask((*shared, *tokens(num_tokens - num_shared)))
    await asyncio.sleep(PUBLISHED_S)
    hit_s, hit = await house.ask((*shared, *tokens(num_tokens - num_shared)))
    assert hit.decode_worker == miss.decode_worker, hit
    assert hit.cached_tokens, hit
    await asyncio.sleep(PUBLISHED_S)
    house.make_busy(miss.decode_worker, is_busy=True)
    fetch_s, fetch = await house.ask((*shared, *tokens(num_tokens - num_shared)))
    house.make_busy(miss.decode_worker, is_busy=False)
    assert fetch.decode_worker != miss.decode_worker, fetch
    return {
        "miss_ttft_s": miss_s,
        "hit_ttft_s": hit_s,
        "fetch_ttft_s": fetch_s,
        "fetch_s": fetch.fetch_s,
        "fetched_tokens": fetch.fetched_tokens,
        "outcome": fetch.fetch_outcome,
    }


async def measure(folder, transport, options):
    server = RedisServer()
    house = await started(config_with(folder, transport, server.url))
    rng = random.Random(3)
    num_shared = int(options.prompt * options.hit)
    try:
        await one_round(house, rng, 256, 230)  # warms up kernels, connections and the speed
        rows = []
        for _ in range(options.rounds):
            rows.append(await one_round(house, rng, options.prompt, num_shared))
            print(transport, rows[-1], flush=True)
    finally:
        await house.router.stop()
        for worker in house.workers:
            await worker.stop(0.0)
        server.stop()
    fetched = [row for row in rows if row["outcome"] == "fetched"]
    result = {
        "transport": transport,
        "rounds": len(rows),
        "fetched": len(fetched),
        **{
            name: quantiles([row[name] for row in rows])
            for name in ("miss_ttft_s", "hit_ttft_s", "fetch_ttft_s", "fetch_s")
        },
        "rows": rows,
    }
    miss_s = result["miss_ttft_s"]["p50"]
    result["hit_of_miss"] = result["hit_ttft_s"]["p50"] / miss_s
    result["fetch_of_miss"] = result["fetch_ttft_s"]["p50"] / miss_s
    return result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--hit", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transports", nargs="+", default=["shm", "grpc"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shape"
        make_model(folder)
        results = [asyncio.run(measure(folder, t, options)) for t in options.transports]
    for r in results:
        print(
            f"{r['transport']:5} miss {r['miss_ttft_s']['p50']:.3f} s, hit {r['hit_of_miss']:.2f}x"
            f", fetched from a peer {r['fetch_of_miss']:.2f}x ({r['fetched']} of {r['rounds']})"
        )
    print(
        save("peer_fetch", {"prompt_tokens": options.prompt, "hit": options.hit, "rows": results})
    )


if __name__ == "__main__":
    main()
