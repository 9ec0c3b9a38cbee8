"""What a prompt costs whose beginning was evicted: computed, and loaded from host memory and disk.

    python -m benchmarks.storage_tiers [--rounds N] [--tokens 2048]

A model of Qwen2.5-0.5B's shape with random weights, one worker that does both phases, prompts of
which nine tenths are known. A `miss` computes everything; a `pool` hit finds the beginning in the
worker's KV pool; for `host` and `disk` another prompt has taken the pool's blocks before. TTFT is
measured at a gRPC client on the same machine; files come from the page cache, as the system has it.
"""

import argparse
import asyncio
import random
import tempfile
from pathlib import Path

import grpc

from benchmarks.handover import make_model
from benchmarks.record import quantiles, save
from benchmarks.streaming import timed_stream
from cluster.local import LocalCluster
from core.config import BatonConfig
from protos.baton.v1 import generation_pb2_grpc

BLOCK = 16
SETTLE_S = 2.0
"""For blocks to be written before the pool's are taken."""
ROOM = {"pool": {}, "host": {"host_bytes": 1 << 29}, "disk": {"disk_bytes": 1 << 29}}


def config_of(folder, kind, tokens):
    # The pool holds one prompt and a little more, so that the next one evicts it.
    engine = {
        "num_blocks": tokens // BLOCK + 24,
        "max_step_tokens": 512,
        "block_size_tokens": BLOCK,
    }
    cache = dict(ROOM[kind])
    if "disk_bytes" in cache:
        cache["disk_folder"] = str(Path(folder) / "blocks")
    return BatonConfig.model_validate(
        {
            "model": {"path": str(folder), "name": "shape", "max_model_len": 4096},
            "router": {
                "http_port": 0,
                "grpc_port": 0,
                "log_requests": False,
                "tokenizer_processes": 1,
            },
            "pools": {"prefill": {"engine": engine}, "decode": {"engine": engine}},
            "placement": {"path": "local"},
            "redis": {"enabled": False},
            "colocated": True,
            "prefix_cache": cache,
        }
    )


def tokens_of(seed, number):
    rng = random.Random(seed)
    return [rng.randrange(1000, 150000) for _ in range(number)]


async def ask(stub, ids):
    """Ask greedily for two tokens; returns TTFT (seconds) and the cached tokens."""
    began, stamps, timing = await timed_stream(stub, ids, 2)
    return stamps[0] - began, timing.cached_tokens


async def measure(folder, kind, tokens, rounds):
    known = tokens * 9 // 10 // BLOCK * BLOCK
    rows = []
    cluster = LocalCluster(config_of(folder, kind, tokens))
    await cluster.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.grpc_port}") as channel:
            stub = generation_pb2_grpc.GenerationStub(channel)
            await asyncio.sleep(2)
            await ask(stub, tokens_of("first", 256))
            for turn in range(rounds):
                beginning = tokens_of((kind, turn, "beginning").__repr__(), known)
                rest = [tokens_of(f"{kind} {turn} {n}", tokens - known) for n in range(2)]
                miss_s, cached = await ask(stub, beginning + rest[0])
                assert cached == 0
                await asyncio.sleep(SETTLE_S)
                if kind != "pool":
                    await ask(stub, tokens_of(f"{kind} {turn} other", tokens))
                    await asyncio.sleep(SETTLE_S)
                hit_s, cached = await ask(stub, beginning + rest[1])
                rows.append({"miss_s": miss_s, "hit_s": hit_s, "cached_tokens": cached})
    finally:
        await cluster.stop()
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    result = {"tokens": options.tokens, "rounds": options.rounds, "kinds": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shape"
        make_model(folder)
        for kind in ROOM:
            rows = asyncio.run(measure(folder, kind, options.tokens, options.rounds))
            miss = quantiles([row["miss_s"] for row in rows])
            hit = quantiles([row["hit_s"] for row in rows])
            cached = quantiles([row["cached_tokens"] for row in rows])
            result["kinds"][kind] = {"miss_s": miss, "hit_s": hit, "cached_tokens": cached}
            print(
                f"{kind:5} miss {miss['p50']:6.3f} s  hit {hit['p50']:6.3f} s  "
                f"= {hit['p50'] / miss['p50']:.2f} of a miss, {cached['p50']:.0f} tokens cached"
            )
    print(save("storage_tiers", result))


if __name__ == "__main__":
    main()
