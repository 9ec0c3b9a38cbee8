"""What the prefix index costs: names, look-ups, memory, updates, and how late they are.

    python -m benchmarks.prefix_index [NUM_ENTRIES]

Names, look-ups and updates are CPU seconds of one thread. Lateness is wall time through a real
Redis, from a block's registration in a pool to its match in a view, on one loop; 500 blocks, one
after the other at random instants. The load average beside it says what else the machine did.
"""

import asyncio
import json
import os
import random
import resource
import sys
import time
from pathlib import Path

from benchmarks.record import quantiles, save
from cluster.redis.prefix_store import RedisPrefixStore
from cluster.redis.server import RedisServer
from core.block_hash import block_hashes, root_hash
from core.clocks import SystemClock
from core.ids import Incarnation, WorkerId
from core.ports import START
from core.prefix_changes import PrefixChange, StorageTier
from engine.scheduling.block_changes import BlockChanges
from engine.scheduling.block_pool import BlockPool
from prefix_index.entries import Batch, EntryCodec, Head, entry_key
from prefix_index.feed import PrefixFeed
from prefix_index.publisher import Content, PrefixPublisher
from prefix_index.view import PrefixView

NUM_WORKERS = 8
NUM_ENTRIES = 5_000_000
SIZE = 16
ROUNDS = 300
CODEC = EntryCodec(entry_key("a key for benchmarks"))


def names(number):
    data = os.urandom(16 * number)
    return [data[at : at + 16] for at in range(0, len(data), 16)]


def cpu_us(call, rounds=ROUNDS):
    times = []
    for _ in range(rounds):
        began = time.thread_time()
        call()
        times.append((time.thread_time() - began) * 1e6)
    return quantiles(times)


def hashing():
    """ns a token, of a prompt of 100,000."""
    tokens = [random.Random(1).randrange(150_000) for _ in range(100_000)]
    root = root_hash("m", "t")
    times = cpu_us(lambda: block_hashes(root, tokens, SIZE), 30)
    return {key: value / 100 for key, value in times.items() if key != "count"}


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def filled(num_entries):
    """A view of so many entries, beside chains of 128 and 6,250 blocks that one worker holds."""
    view = PrefixView()
    before = resident_bytes()
    began = time.thread_time()
    per_worker = num_entries // NUM_WORKERS
    for worker in range(NUM_WORKERS):
        for _ in range(per_worker // 250):
            change = PrefixChange(stored=names(250))
            view.apply(WorkerId(f"w{worker}"), Incarnation(1), change)
    took_s = time.thread_time() - began
    chains = {length: names(length) for length in (128, 6_250)}
    for chain in chains.values():
        for at in range(0, len(chain), 25):
            view.apply(WorkerId("w3"), Incarnation(1), PrefixChange(stored=chain[at : at + 25]))
    books = {
        "entries": view.num_entries,
        "bytes": resident_bytes() - before,
        "cpu_us_per_block_stored": took_s / num_entries * 1e6,
    }
    return view, chains, books


def lookups(view, chains):
    found = {}
    for length, chain in chains.items():
        assert view.match(chain) == {"w3": length}
        found[f"{length}_blocks_hit_us"] = cpu_us(lambda chain=chain: view.match(chain))
        other = names(length)
        found[f"{length}_blocks_miss_us"] = cpu_us(lambda other=other: view.match(other))
    return found


class Prepared:
    """A store whose logs were written before."""

    def __init__(self, logs):
        self.logs = logs

    async def read_head(self, life):
        return CODEC.head(life, Head(0, 0, START))

    async def read_log(self, positions, wait_s):
        return {life: log for life, log in self.logs.items() if life in positions}


def updates(blocks_a_batch, num_blocks=100_000):
    """Blocks a second that one core takes over into a view, from signed batches."""
    lives = [(WorkerId(f"w{n}"), Incarnation(1)) for n in range(NUM_WORKERS)]
    each = num_blocks // blocks_a_batch // NUM_WORKERS
    logs = {
        life: [
            (
                str(number),
                CODEC.batch(life, Batch(number, PrefixChange(names(blocks_a_batch)))),
            )
            for number in range(1, each + 1)
        ]
        for life in lives
    }
    view = PrefixView()
    feed = PrefixFeed(Prepared(logs), view, lambda: lives, CODEC, SystemClock())
    began = time.thread_time()
    asyncio.run(feed.read())
    took_s = time.thread_time() - began
    assert view.num_entries == each * blocks_a_batch * NUM_WORKERS
    return view.num_entries / took_s


async def lateness():
    """Milliseconds from registration to match."""
    server = RedisServer()
    life = (WorkerId("w"), Incarnation(1))
    changes = BlockChanges()
    pool = BlockPool(2048, changes)
    publisher = PrefixPublisher(
        RedisPrefixStore(server.url, "b"),
        life,
        {StorageTier.POOL: Content(changes, pool.registered, 2048)},
        CODEC,
        SystemClock(),
    )
    view = PrefixView()
    feed = PrefixFeed(RedisPrefixStore(server.url, "b"), view, lambda: [life], CODEC, SystemClock())
    tasks = [asyncio.create_task(one.run()) for one in (publisher, feed)]
    rng = random.Random(1)
    times = []
    try:
        while feed.state != "ok" or not view.workers():
            await asyncio.sleep(0.05)
        parent = pool.remember_root("t")
        last = root_hash("m", "t")
        for _ in range(500):
            await asyncio.sleep(rng.uniform(0.0, 0.06))
            [block] = pool.allocate(1)
            tokens = [rng.randrange(1000)] * SIZE
            [last] = block_hashes(last, tokens, SIZE)
            began = time.monotonic()
            parent = pool.register(block, parent, last, tokens)
            while not view.match([last]):
                await asyncio.sleep(0.001)
            times.append((time.monotonic() - began) * 1000)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        server.stop()
    return quantiles(times)


def main():
    num_entries = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_ENTRIES
    result = {"load_average": os.getloadavg(), "hash_ns_per_token": hashing()}
    view, chains, result["view"] = filled(num_entries)
    result["lookup"] = lookups(view, chains)
    del view
    result["updates_per_s_per_core"] = {f"{size}_blocks_a_batch": updates(size) for size in (1, 50)}
    result["late_ms"] = asyncio.run(lateness())
    print(json.dumps(result, indent=2))
    print(save("prefix_index", result))


if __name__ == "__main__":
    main()
