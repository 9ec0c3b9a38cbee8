"""The bound on a call: what fails is a store's failure, and a cancellation is never lost.

And the end of a client, which may fail as well.
"""

import asyncio

import pytest
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cluster.redis import client
from cluster.redis.client import bounded, close
from cluster.redis.member_store import RedisMemberStore
from cluster.redis.prefix_store import RedisPrefixStore
from cluster.redis.quota_store import RedisQuotaStore
from core.ports import StoreFailed


async def returning(answer):
    return answer


async def raising(error):
    raise error


async def losing(outcome):
    """As `asyncio.wait_for` of Python 3.11, if it is cancelled while its call ends."""
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        return await outcome


async def test_an_answer_is_returned():
    assert await bounded(returning(5)) == 5


@pytest.mark.parametrize("error", [RedisError("no"), OSError("no"), ValueError("no")])
async def test_what_a_client_raises_is_a_stores_failure(error):
    with pytest.raises(StoreFailed, match="no") as failed:
        await bounded(raising(error))
    assert failed.value.__cause__ is error


async def test_a_call_that_takes_too_long_is_a_stores_failure(monkeypatch):
    monkeypatch.setattr(client, "CALL_TIMEOUT_S", 0.01)
    with pytest.raises(StoreFailed, match="within 0.02 s"):
        await bounded(asyncio.sleep(60))


@pytest.mark.parametrize("ending", ["answer", "failure"])
async def test_a_cancellation_that_the_client_loses_is_not_lost(ending):
    outcome = returning(5) if ending == "answer" else raising(RedisError("no"))
    task = asyncio.create_task(bounded(losing(outcome), 60))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


async def test_a_timeout_around_the_call_is_not_lost_either():
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await bounded(losing(returning(5)), 60)


class Frozen:
    """A client whose server answers no more."""

    def __init__(self):
        self.is_closing = False

    async def aclose(self):
        self.is_closing = True
        await asyncio.sleep(60)


class Timid(Frozen):
    """One that gives up by itself, as the client does after its own timeout."""

    async def aclose(self):
        self.is_closing = True
        raise RedisTimeoutError("timed out closing connection")


@pytest.mark.parametrize("kind", [Frozen, Timid])
async def test_a_frozen_server_keeps_nobody_who_closes(kind, monkeypatch):
    monkeypatch.setattr(client, "CALL_TIMEOUT_S", 0.01)
    frozen = kind()
    async with asyncio.timeout(30):
        await close(frozen)
    assert frozen.is_closing


@pytest.mark.parametrize(
    "store",
    [
        RedisMemberStore("redis://127.0.0.1:1"),
        RedisQuotaStore("redis://127.0.0.1:1", "n"),
        RedisPrefixStore("redis://127.0.0.1:1", "n"),
    ],
    ids=lambda store: type(store).__name__,
)
async def test_every_store_closes_so(store):
    store._client = Timid()
    await store.close()
    assert store._client.is_closing
