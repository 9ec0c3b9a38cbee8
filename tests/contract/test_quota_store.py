"""What quotas need of a store: the one in memory and a real Redis keep the same."""

import asyncio
import os
import signal

import pytest
from support.stores import eventually

from cluster.redis.quota_store import RedisQuotaStore
from core.ports import NO_ENTRY, StoredValue, StoreFailed
from simulation.quota_store import MemoryQuotaStore

TTL_S = 30.0


@pytest.fixture(params=["memory", "redis"])
async def store(request):
    if request.param == "memory":
        yield MemoryQuotaStore()
        return
    server = request.getfixturevalue("server")
    made = RedisQuotaStore(server.url, os.urandom(4).hex())
    yield made
    await made.close()


def value(version, content=b"x"):
    return StoredValue(version, content)


async def test_a_value_comes_back_as_it_was_written(store):
    assert await eventually(lambda: store.read(["a", "b"])) == [NO_ENTRY, NO_ENTRY]
    assert await store.replace("a", value(1, b"\0\xff one"), TTL_S) == [NO_ENTRY]
    assert await store.read(["b", "a"]) == [NO_ENTRY, value(1, b"\0\xff one")]


async def test_a_value_replaces_only_a_lower_version(store):
    await eventually(lambda: store.replace("a", value(5, b"five"), TTL_S))
    for version in (4, 5):
        assert await store.replace("a", value(version, b"no"), TTL_S) == [value(5, b"five")]
        assert await store.read(["a"]) == [value(5, b"five")]
    assert await store.replace("a", value(6, b"six"), TTL_S) == [value(5, b"five")]
    assert await store.replace("a", value(60, b"sixty"), TTL_S) == [value(6, b"six")]
    assert await store.read(["a"]) == [value(60, b"sixty")]


async def test_other_values_are_read_in_the_same_call(store):
    await eventually(lambda: store.replace("clock", value(3, b"tick"), TTL_S))
    found = await store.replace("a", value(1), TTL_S, ["clock", "none"])
    assert found == [NO_ENTRY, value(3, b"tick"), NO_ENTRY]


async def test_of_writers_that_have_read_the_same_one_replaces_it(store):
    await eventually(lambda: store.replace("a", value(1, b"begin"), TTL_S))
    writers = [store.replace("a", value(2, b"%d" % i), TTL_S) for i in range(8)]
    answers = await asyncio.gather(*writers, return_exceptions=True)
    winners = [
        i for i, answer in enumerate(answers) if isinstance(answer, list) and answer[0].version < 2
    ]
    left = (await eventually(lambda: store.read(["a"])))[0]
    assert left.version == 2
    # One whose answer came too late may have been it.
    if not any(isinstance(answer, StoreFailed) for answer in answers):
        assert [b"%d" % i for i in winners] == [left.content]
    assert len(winners) <= 1


async def test_a_value_vanishes_unless_it_is_written_again(store):
    await eventually(lambda: store.replace("a", value(9), 0.3))
    await eventually(lambda: store.replace("b", value(9), TTL_S))
    async with asyncio.timeout(20):
        while (await eventually(lambda: store.read(["a"])))[0] is not NO_ENTRY:
            await asyncio.sleep(0.05)
    assert await eventually(lambda: store.read(["b"])) == [value(9)]
    # What comes into its place may have any version.
    assert await eventually(lambda: store.replace("a", value(2), TTL_S)) == [NO_ENTRY]


@pytest.mark.parametrize("fault", ["gone", "frozen"])
async def test_a_store_that_is_away_fails_soon_and_closes(server, fault):
    store = RedisQuotaStore(server.url, "n")
    await eventually(lambda: store.replace("a", value(1), TTL_S))
    pid = server.pid
    if fault == "gone":
        server.stop()
    else:
        os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(20):
            with pytest.raises(StoreFailed):
                await store.read(["a"])
            with pytest.raises(StoreFailed):
                await store.replace("a", value(2), TTL_S)
            await store.close()
    finally:
        if fault == "frozen":
            os.kill(pid, signal.SIGCONT)


async def test_a_forgotten_value_is_told_from_a_kept_one(server):
    """A server that was started again has nothing: the version before says so."""
    store = RedisQuotaStore(server.url, "n")
    await eventually(lambda: store.replace("a", value(7), TTL_S))
    os.kill(server.pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        while server.num_restarts == 0:
            await asyncio.sleep(0.02)
    found = await eventually(lambda: store.replace("a", value(8), TTL_S))
    assert found[0] in (NO_ENTRY, value(8))  # the latter if a first answer came too late
    assert (await eventually(lambda: store.read(["a"])))[0] == value(8)
    await store.close()


async def test_what_is_no_entry_of_ours_counts_as_an_empty_one(server):
    store = RedisQuotaStore(server.url, "n")
    await eventually(lambda: store.read(["a"]))
    await store._client.xadd("baton:{n}:quota:a", {"other": b"1"}, id="4-2")
    assert await eventually(lambda: store.read(["a"])) == [value(4, b"")]
    await store._client.set("baton:{n}:quota:b", b"text")
    with pytest.raises(StoreFailed):
        await store.read(["b"])
    with pytest.raises(StoreFailed):
        await store.replace("b", value(1), TTL_S)
    await store.close()
