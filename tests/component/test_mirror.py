"""The member mirror against a real Redis: written when it is there,
bounded and patient when it is not."""

import asyncio
import json
import logging

from redis import asyncio as redis_asyncio

from cluster.redis.member_store import KEY, RedisMemberStore
from cluster.redis.server import RedisServer
from core import events
from prefix_index.mirror import FAILURES_TO_BREAK, MembershipMirror


async def test_members_are_mirrored_and_a_dead_store_harms_nobody():
    server = RedisServer()
    store = RedisMemberStore(server.url)
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


async def test_a_store_that_does_not_answer_is_told_of_with_the_limit(caplog):
    """It takes connections and says nothing: asyncio's own error would have no words."""
    caplog.set_level(logging.INFO, events.LOGGER.name)
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = RedisMemberStore(f"redis://127.0.0.1:{port}")
    # Its own limit would come first.
    store._client.connection_pool.connection_kwargs["socket_timeout"] = 60.0
    mirror = MembershipMirror(store, list)
    try:
        for _ in range(FAILURES_TO_BREAK):
            assert not await mirror.write_once()
    finally:
        await store.close()
        server.close()
    (told,) = (r.fields for r in caplog.records if r.event == "store_down")
    assert told == {"reason": "Redis did not answer within 0.1 s"}
