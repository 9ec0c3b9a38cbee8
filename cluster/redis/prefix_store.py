"""Redis as the store of the prefix index.

Owns the keys and the commands. Does not know what is in the entries.

    baton:{NAMESPACE}:WORKER:INCARNATION:log      stream, one field an entry
    baton:{NAMESPACE}:WORKER:INCARNATION:head     string
    baton:{NAMESPACE}:WORKER:INCARNATION:NUMBER   hash, one field a segment

All keys of a cluster lie in one slot of Redis Cluster. Commands are those of Redis 6.2, without
scripts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redis import asyncio as redis_asyncio
from redis.exceptions import RedisError

from cluster.redis.client import CALL_TIMEOUT_S, bounded, close, new_client
from core.ids import WorkerLife
from core.ports import START, StoreFailed

TIMER_S = 0.15
"""How late a server may answer a call that waits: it looks at its timers ten times a second."""
LOG_ENTRIES = 4_096
READ_ENTRIES = 256
"""Entries of one life in one answer."""
FIELD = "e"
COUNT = "n"
"""Field of a whole content that says how many segments it has."""
OLDEST = "0-0"


class RedisPrefixStore:
    """The `PrefixStore` port over one Redis."""

    def __init__(self, url: str, namespace: str) -> None:
        """Prepare clients; nothing is sent yet. Calls that wait have one of their own."""
        self._prefix = f"baton:{{{namespace}}}"
        self._url = url
        self._client = new_client(url)
        self._waiting: tuple[float, redis_asyncio.Redis] | None = None
        self._answered_s = 0.0
        """When it last answered a call that waits, by its own clock."""

    def age_s(self, position: str) -> float:
        """See `PrefixStore`. A position begins with the milliseconds at which it was written."""
        milliseconds = position.partition("-")[0]
        written_s = int(milliseconds) / 1000 if milliseconds.isdecimal() else self._answered_s
        return max(0.0, self._answered_s - written_s)

    async def append(
        self, life: WorkerLife, batches: Sequence[bytes], ttl_s: float, after: str = START
    ) -> str:
        """See `PrefixStore`."""
        key = self._key(life, "log")
        pipeline = self._client.pipeline(transaction=False)
        if after != START:
            pipeline.xrange(key, after, after, count=1)
        for batch in batches:
            pipeline.xadd(key, {FIELD: batch}, maxlen=LOG_ENTRIES, approximate=True)
        pipeline.pexpire(key, int(ttl_s * 1000))
        answers = await bounded(pipeline.execute())
        if after != START and not answers[0]:
            raise StoreFailed("the log has lost what was added last, as after a failover")
        return _text(answers[-2])

    async def write_whole(
        self, life: WorkerLife, number: int, head: bytes, segments: Sequence[bytes], ttl_s: float
    ) -> None:
        """See `PrefixStore`."""
        key = self._key(life, str(number))
        ttl_ms = int(ttl_s * 1000)
        fields = {str(index): segment for index, segment in enumerate(segments)}
        fields[COUNT] = str(len(segments)).encode()  # there is a key even without segments
        for name, value in fields.items():
            pipeline = self._client.pipeline(transaction=False)
            pipeline.hset(key, name, value)
            pipeline.pexpire(key, ttl_ms)
            await bounded(pipeline.execute())
        await bounded(self._client.set(self._key(life, "head"), head, px=ttl_ms))

    async def renew(self, life: WorkerLife, number: int, ttl_s: float, after: str = START) -> bool:
        """See `PrefixStore`."""
        pipeline = self._client.pipeline(transaction=False)
        if after != START:
            pipeline.xrange(self._key(life, "log"), after, after, count=1)
        for name in ("log", "head", str(number)):
            pipeline.pexpire(self._key(life, name), int(ttl_s * 1000))
        return all(await bounded(pipeline.execute()))

    async def read_head(self, life: WorkerLife) -> bytes | None:
        """See `PrefixStore`."""
        return _bytes(await bounded(self._client.get(self._key(life, "head"))))

    async def read_segment(self, life: WorkerLife, number: int, index: int) -> bytes | None:
        """See `PrefixStore`."""
        call: Any = self._client.hget(self._key(life, str(number)), str(index))
        return _bytes(await bounded(call))

    async def read_log(
        self, positions: Mapping[WorkerLife, str], wait_s: float
    ) -> dict[WorkerLife, list[tuple[str, bytes]]]:
        """See `PrefixStore`."""
        keys = {self._key(life, "log").encode(): life for life in positions}
        streams: Any = {
            self._key(life, "log"): position or OLDEST for life, position in positions.items()
        }
        pipeline = self._client_that_waits(wait_s).pipeline(transaction=False)
        pipeline.xread(streams, count=READ_ENTRIES, block=max(1, int(wait_s * 1000)))
        pipeline.time()
        call = pipeline.execute(raise_on_error=False)
        answer, time = await bounded(call, wait_s + TIMER_S)
        if isinstance(answer, RedisError):
            raise StoreFailed(str(answer))
        # A Redis of others may not allow it: then nothing is known to be late.
        self._answered_s = 0.0 if isinstance(time, RedisError) else time[0] + time[1] / 1e6
        logs = answer.items() if isinstance(answer, dict) else answer or ()
        return {
            keys[_raw(key)]: [
                (_text(position), _bytes(fields.get(FIELD.encode())) or b"")
                for position, fields in _entries(entries)
            ]
            for key, entries in logs
        }

    async def close(self) -> None:
        """See `PrefixStore`."""
        clients = [self._client] if self._waiting is None else [self._client, self._waiting[1]]
        for client in clients:
            await close(client)

    def _key(self, life: WorkerLife, name: str) -> str:
        worker, incarnation = life
        return f"{self._prefix}:{worker}:{incarnation}:{name}"

    def _client_that_waits(self, wait_s: float) -> redis_asyncio.Redis:
        if self._waiting is None or self._waiting[0] < wait_s:
            self._waiting = (wait_s, new_client(self._url, wait_s + TIMER_S + CALL_TIMEOUT_S))
        return self._waiting[1]


def _entries(entries: Any) -> list[tuple[Any, dict[bytes, Any]]]:  # noqa: ANN401 - what Redis sent
    """Flatten what the two protocols of Redis nest differently."""
    if entries and isinstance(entries[0], list):
        entries = [entry for some in entries for entry in some]
    return [(position, fields or {}) for position, fields in entries]


def _raw(value: Any) -> bytes:  # noqa: ANN401
    return value if isinstance(value, bytes) else str(value).encode()


def _bytes(value: Any) -> bytes | None:  # noqa: ANN401
    return value if isinstance(value, bytes) else None


def _text(value: Any) -> str:  # noqa: ANN401
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
