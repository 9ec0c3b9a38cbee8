"""The member mirror against a real Redis: written when it is there,
bounded and patient when it is not."""

import asyncio
import json

from redis import asyncio as redis_asyncio

from cluster.redis.member_store import KEY, RedisStore
from cluster.redis.server import RedisServer
from prefix_index.mirror import FAILURES_TO_BREAK, MembershipMirror


async def test_members_are_mirrored_and_a_dead_store_harms_nobody():
    server = RedisServer()
    store = RedisStore(server.url)
    mirror = MembershipMirror(store, lambda: [{"pid": 1}])
    client = redis_asyncio.Redis.from_url(server.url)
    try:
        async with asyncio.timeout(20):  # the server needs a moment
            while not await mirror.write_once():
                await asyncio.sleep(0.05)
        assert mirror.state == "ok"
        assert json.loads(await client.get(KEY)) == [{"pid": 1}]
    finally:
        await client.aclose()
        server.stop()
    for _ in range(FAILURES_TO_BREAK):
        assert not await mirror.write_once()
    assert mirror.state == "down"
    await store.close()
