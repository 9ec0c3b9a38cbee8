"""Can one tenant find out by a prompt's time to the first token what another has asked?

2 prefill and 2 decode workers, the tiny model, keys of two tenants. One asks half of some prompts;
then both ask all of them once, in random order, and a classifier of their times guesses which those
were: the area under its curve is 1 if it always knows, 0.5 if it knows nothing. The tenant itself
is the control: its own hits are seen. With 0.5 inside the interval of the other tenant's area,
nothing is seen across. Run: python -m benchmarks.cache_timing [--prompts 200]
"""

import argparse
import asyncio
import math
import random
import tempfile
import time
from pathlib import Path

import httpx
from rich.progress import Progress

from benchmarks.record import save
from cluster.local import LocalCluster
from cluster.redis.server import RedisServer
from core.config import BatonConfig
from router.access.credentials import new_key
from router.access.identities import KeyRole

TINY = Path(__file__).parent.parent / "models" / "baton-tiny"
PROMPT_CHARACTERS = 900
ALPHABET = "abcdefghijklmnopqrstuvwxyz     "
TENANTS = ("asker", "stranger")


def config_of(key_file, redis_url):
    engine = {"num_blocks": 16_384}
    return BatonConfig.model_validate(
        {
            "model": {"path": str(TINY), "name": "tiny"},
            "router": {
                "http_port": 0,
                "grpc_port": 0,
                "log_requests": False,
                "tokenizer_processes": 1,
            },
            "pools": {
                "prefill": {"replicas": 2, "engine": engine},
                "decode": {"replicas": 2, "engine": engine},
            },
            "redis": {"url": redis_url},
            "security": {"api_keys": str(key_file)},
        }
    )


async def ask(http, prompt):
    """Ask for one token; returns how long it took and what the reply owns to."""
    began = time.perf_counter()
    reply = await http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
    took_s = time.perf_counter() - began
    usage = reply.raise_for_status().json()["usage"]
    return took_s, usage["prompt_tokens_details"]["cached_tokens"]


def area(hits, misses):
    """Share of pairs in which the prompt that was asked before came faster: Mann and Whitney's U.

    Returns:
        The area, and half the width of its interval of 95 % if there is nothing to see.
    """
    pairs = [(hit < miss) + 0.5 * (hit == miss) for hit in hits for miss in misses]
    spread = math.sqrt((len(hits) + len(misses) + 1) / (12 * len(hits) * len(misses)))
    return sum(pairs) / len(pairs), 1.96 * spread


async def measure(num_prompts, keys, cluster, on_done):
    rng = random.Random(11)
    prompts = ["".join(rng.choices(ALPHABET, k=PROMPT_CHARACTERS)) for _ in range(num_prompts)]
    known = set(rng.sample(range(num_prompts), num_prompts // 2))
    url = f"http://127.0.0.1:{cluster.http_port}"
    clients = {
        tenant: httpx.AsyncClient(
            base_url=url, timeout=120, headers={"authorization": f"Bearer {keys[tenant]}"}
        )
        for tenant in TENANTS
    }
    samples = []
    try:
        for index in sorted(known):
            await ask(clients["asker"], prompts[index])
            on_done()
        await asyncio.sleep(1.0)
        # The stranger first: what it asks itself is its own from then on, and each asks once.
        for tenant in reversed(TENANTS):
            order = rng.sample(range(num_prompts), num_prompts)
            for index in order:
                took_s, cached = await ask(clients[tenant], prompts[index])
                samples.append(
                    {
                        "tenant": tenant,
                        "was_asked": index in known,
                        "ttft_s": took_s,
                        "cached_tokens": cached,
                    }
                )
                on_done()
    finally:
        for client in clients.values():
            await client.aclose()
    return samples


async def on_a_cluster(num_prompts, on_done):
    keys = {name: new_key(name, "standard", KeyRole.TENANT) for name in TENANTS}
    redis = RedisServer()
    with tempfile.TemporaryDirectory() as folder:
        key_file = Path(folder) / "keys"
        key_file.write_text("".join(line + "\n" for _, line in keys.values()))
        cluster = LocalCluster(config_of(key_file, redis.url))
        try:
            await cluster.start()
            await asyncio.sleep(2)
            return await measure(
                num_prompts, {name: key for name, (key, _) in keys.items()}, cluster, on_done
            )
        finally:
            await cluster.stop()
            redis.stop()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=200)
    options = parser.parse_args()
    with Progress() as progress:
        task = progress.add_task("requests", total=options.prompts * 5 // 2)
        samples = asyncio.run(on_a_cluster(options.prompts, lambda: progress.advance(task)))
    result = {}
    for tenant in TENANTS:
        mine = [s for s in samples if s["tenant"] == tenant]
        hits, misses = (
            [s["ttft_s"] for s in mine if s["was_asked"] is asked] for asked in (True, False)
        )
        found, half = area(hits, misses)
        result[tenant] = {
            "area": found,
            "chance": [0.5 - half, 0.5 + half],
            "is_chance": abs(found - 0.5) <= half,
            "cached_tokens": sum(s["cached_tokens"] for s in mine),
        }
        print(
            f"{tenant:9} area {found:.3f}, chance is {0.5 - half:.3f} to {0.5 + half:.3f}, "
            f"{result[tenant]['cached_tokens']} tokens cached"
        )
    print(save("cache_timing", {"prompts": options.prompts, **result, "samples": samples}))


if __name__ == "__main__":
    main()
