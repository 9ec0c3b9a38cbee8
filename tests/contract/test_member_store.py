"""The `MemberStore` port: what is put is there, and a store that is down fails in bounded time."""

import asyncio

import pytest
from redis import asyncio as redis_asyncio

from cluster.redis.member_store import KEY, RedisMemberStore
from cluster.redis.server import RedisServer
from core.ports import StoreFailed
from simulation.loop import run_virtual
from simulation.ports import MemoryStore


class Redis:
    """A real server of our own."""

    run = staticmethod(asyncio.run)

    def __init__(self):
        self.server = RedisServer()
        self.port = RedisMemberStore(self.server.url)

    async def read(self):
        client = redis_asyncio.Redis.from_url(self.server.url)
        try:
            return ((await client.get(KEY)) or b"").decode()
        finally:
            await client.aclose()

    def stop(self):
        self.server.stop()


class Simulated:
    """The simulation's store."""

    run = staticmethod(run_virtual)

    def __init__(self):
        self.port = MemoryStore()

    async def read(self):
        return self.port.members

    def stop(self):
        self.port.mode = "down"


@pytest.mark.parametrize("kind", [Redis, Simulated])
def test_what_was_put_last_is_there_and_a_store_that_is_down_fails_soon(kind):
    async def main():
        store = kind()
        try:
            async with asyncio.timeout(30):
                while True:
                    try:
                        await store.port.put("[1]", 10.0)
                        break
                    except StoreFailed:  # a server needs a moment to listen
                        await asyncio.sleep(0.05)
            assert await store.read() == "[1]"
            await store.port.put("[2]", 10.0)
            assert await store.read() == "[2]"
        finally:
            store.stop()
        async with asyncio.timeout(30):
            with pytest.raises(StoreFailed):
                await store.port.put("[3]", 10.0)
        await store.port.close()

    kind.run(main())
