"""What the prefix index needs of a store: the one in memory and a real Redis keep the same."""

import asyncio
import contextlib
import os
import signal

import pytest
from redis import asyncio as redis_asyncio
from support.stores import eventually

from cluster.redis.prefix_store import RedisPrefixStore
from cluster.redis.server import RedisServer
from core.block_hash import block_hashes, root_hash
from core.clocks import SystemClock
from core.ids import Incarnation, WorkerId
from core.ports import START, StoreFailed
from core.prefix_changes import StorageTier
from engine.scheduling.block_changes import BlockChanges
from engine.scheduling.block_pool import BlockPool
from prefix_index.entries import EntryCodec, entry_key
from prefix_index.feed import PrefixFeed
from prefix_index.publisher import Content, PrefixPublisher
from prefix_index.view import PrefixView
from simulation.prefix_store import MemoryPrefixStore

LIFE = (WorkerId("prefill-a"), Incarnation(7))
OTHER = (WorkerId("prefill-b"), Incarnation(8))
TTL_S = 30.0


@pytest.fixture(params=["memory", "redis"])
async def store(request):
    if request.param == "memory":
        yield MemoryPrefixStore()
        return
    server = request.getfixturevalue("server")
    made = RedisPrefixStore(server.url, os.urandom(4).hex())
    yield made
    await made.close()


async def test_a_log_is_read_on_from_any_position(store):
    assert await eventually(lambda: store.read_log({LIFE: START}, 0.01)) == {}
    first = await eventually(lambda: store.append(LIFE, [b"one", b"\0\xfftwo"], TTL_S))
    logs = await eventually(lambda: store.read_log({LIFE: START, OTHER: START}, 0.01))
    assert [entry for _, entry in logs[LIFE]] == [b"one", b"\0\xfftwo"]
    assert logs[LIFE][-1][0] == first and set(logs) == {LIFE}
    await eventually(lambda: store.append(LIFE, [b"three"], TTL_S))
    await eventually(lambda: store.append(OTHER, [b"else"], TTL_S))
    logs = await eventually(lambda: store.read_log({LIFE: first, OTHER: START}, 0.01))
    assert {life: [e for _, e in log] for life, log in logs.items()} == {
        LIFE: [b"three"],
        OTHER: [b"else"],
    }


async def test_the_age_of_a_batch_is_told_by_the_stores_own_clock(store):
    first = await eventually(lambda: store.append(LIFE, [b"one"], TTL_S))
    await asyncio.sleep(0.3)
    second = await eventually(lambda: store.append(LIFE, [b"two"], TTL_S))
    await eventually(lambda: store.read_log({LIFE: START}, 0.01))
    old, new = store.age_s(first), store.age_s(second)
    assert old - new >= 0.25 and old < 60
    assert store.age_s(START) == 0.0


async def test_who_waits_is_told_when_something_comes(store):
    position = await eventually(lambda: store.append(LIFE, [b"one"], TTL_S))
    waiting = asyncio.create_task(eventually(lambda: store.read_log({LIFE: position}, 20.0)))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await eventually(lambda: store.append(LIFE, [b"two"], TTL_S))
    async with asyncio.timeout(15):
        assert [entry for _, entry in (await waiting)[LIFE]] == [b"two"]


async def test_a_call_that_waits_in_vain_is_no_failure(store):
    """A server looks at its timers ten times a second, so that its answer is late."""
    await eventually(lambda: store.append(LIFE, [b"one"], TTL_S))
    num_rounds = 0
    answers = []
    while answers.count({}) < 8:  # on a busy machine, some are late for other reasons
        num_rounds += 1
        assert num_rounds <= 10
        answers = []
        for _ in range(8):
            with contextlib.suppress(StoreFailed):
                answers.append(await store.read_log({OTHER: START}, 0.01))


async def test_the_newest_whole_content_is_read_in_parts(store):
    assert await eventually(lambda: store.read_head(LIFE)) is None
    assert await eventually(lambda: store.read_segment(LIFE, 1, 0)) is None
    await eventually(lambda: store.write_whole(LIFE, 1, b"head1", [b"a", b"b\0"], TTL_S))
    await eventually(lambda: store.write_whole(LIFE, 5, b"head5", [b"c"], TTL_S))
    assert await eventually(lambda: store.read_head(LIFE)) == b"head5"
    assert await eventually(lambda: store.read_segment(LIFE, 5, 0)) == b"c"
    assert await eventually(lambda: store.read_segment(LIFE, 5, 1)) is None
    assert await eventually(lambda: store.read_segment(LIFE, 1, 1)) == b"b\0"
    assert await eventually(lambda: store.read_head(OTHER)) is None


async def test_renewing_says_whether_all_is_still_there(store):
    assert not await eventually(lambda: store.renew(LIFE, 1, TTL_S))
    await eventually(lambda: store.write_whole(LIFE, 1, b"head", [b"a"], TTL_S))
    assert not await eventually(lambda: store.renew(LIFE, 1, TTL_S)), "there is no log"
    await eventually(lambda: store.append(LIFE, [b"one"], TTL_S))
    assert await eventually(lambda: store.renew(LIFE, 1, TTL_S))
    assert not await eventually(lambda: store.renew(LIFE, 2, TTL_S))


async def test_what_is_added_after_an_entry_that_is_gone_is_said_to_have_failed(store):
    await eventually(lambda: store.write_whole(LIFE, 1, b"head", [b"a"], TTL_S))
    first = await eventually(lambda: store.append(LIFE, [b"one"], TTL_S, START))
    second = await eventually(lambda: store.append(LIFE, [b"two"], TTL_S, first))
    assert await eventually(lambda: store.renew(LIFE, 1, TTL_S, second))
    gone = "1-1"  # a position of either store, which no entry has
    assert not await eventually(lambda: store.renew(LIFE, 1, TTL_S, gone))
    with pytest.raises(StoreFailed, match="lost"):
        await store.append(LIFE, [b"three"], TTL_S, gone)


async def test_an_empty_whole_content_is_renewed_too(store):
    await eventually(lambda: store.write_whole(LIFE, 3, b"head", [], TTL_S))
    await eventually(lambda: store.append(LIFE, [b"one"], TTL_S))
    assert await eventually(lambda: store.renew(LIFE, 3, TTL_S))


async def test_what_is_not_renewed_vanishes(store):
    await eventually(lambda: store.write_whole(LIFE, 1, b"head", [b"a"], 0.2))
    await eventually(lambda: store.append(LIFE, [b"one"], 0.2))
    async with asyncio.timeout(20):
        while await eventually(lambda: store.read_head(LIFE)) is not None:
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.3)
    assert not await eventually(lambda: store.renew(LIFE, 1, TTL_S))
    assert await eventually(lambda: store.read_log({LIFE: START}, 0.01)) == {}


class Running:
    """A pool's publisher and a router's feed over one real server."""

    def __init__(self, server):
        key = entry_key("a secret of sufficient length")
        self.changes = BlockChanges()
        self.pool = BlockPool(256, self.changes)
        self.publisher = PrefixPublisher(
            RedisPrefixStore(server.url, "n"),
            LIFE,
            {StorageTier.POOL: Content(self.changes, self.pool.registered, 256)},
            EntryCodec(key),
            SystemClock(),
        )
        self.feed = PrefixFeed(
            RedisPrefixStore(server.url, "n"),
            PrefixView(),
            lambda: {LIFE},
            EntryCodec(key),
            SystemClock(),
        )

    async def __aenter__(self):
        self._tasks = [asyncio.create_task(one.run()) for one in (self.publisher, self.feed)]
        return self

    async def __aexit__(self, *_):
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def compute(self, first):
        tokens = [first, *range(63)]
        hashes = block_hashes(root_hash("m", "t"), tokens, 16)
        identity = self.pool.remember_root("t")
        taken = self.pool.allocate(4)
        for index, (block, name) in enumerate(zip(taken, hashes, strict=True)):
            own = tokens[index * 16 : index * 16 + 16]
            identity = self.pool.register(block, identity, name, own)
        self.pool.free(taken)
        return hashes

    async def sees(self, hashes):
        async with asyncio.timeout(30):
            while self.feed.view.match(hashes) != {LIFE[0]: len(hashes)}:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("fault", ["killed", "frozen", "emptied"])
async def test_hits_come_back_after_redis_was(fault):
    server = RedisServer()
    try:
        async with Running(server) as running:
            await running.sees(running.compute(1))
            if fault == "killed":
                os.kill(server.pid, signal.SIGKILL)
            elif fault == "frozen":
                os.kill(server.pid, signal.SIGSTOP)
            else:
                await empty(server)
            fresh = running.compute(2)
            if fault == "frozen":
                async with asyncio.timeout(30):
                    while running.feed.state != "down":
                        await asyncio.sleep(0.05)
                assert running.feed.view.match(fresh) == {}
                os.kill(server.pid, signal.SIGCONT)
            await running.sees(fresh)
            await late_router_sees(server, fresh)
            assert running.publisher.num_wholes >= (1 if fault == "frozen" else 2)
    finally:
        os.kill(server.pid, signal.SIGCONT)
        server.stop()


async def late_router_sees(server, hashes):
    """Another router finds it all in Redis: it knows nothing else."""
    codec = EntryCodec(entry_key("a secret of sufficient length"))
    store = RedisPrefixStore(server.url, "n")
    late = PrefixFeed(store, PrefixView(), lambda: {LIFE}, codec, SystemClock())
    async with asyncio.timeout(30):
        while late.view.match(hashes) != {LIFE[0]: len(hashes)}:
            await eventually(late.read)
    await store.close()


async def empty(server):
    """Our user may not flush: every key is made to end."""
    client = redis_asyncio.Redis.from_url(server.url)
    base = "baton:{n}:prefill-a:7"
    for name in ("log", "head", *map(str, range(20))):
        await client.pexpire(f"{base}:{name}", 1)
    await asyncio.sleep(0.05)
    assert await client.get(f"{base}:head") is None
    await client.aclose()
