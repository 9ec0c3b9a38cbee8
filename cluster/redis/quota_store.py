"""Redis as the store of quotas.

Owns the keys and the commands. Does not know what is in the values.

    baton:{NAMESPACE}:quota:NAME      stream of one entry; its id is the version, `VERSION-0`

Redis takes an entry only if its id is greater than the newest one's: that is the comparison, in one
command and without scripts, which Baton's own server does not allow. All keys of a cluster lie in
one slot of Redis Cluster. Commands are those of Redis 6.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis.exceptions import RedisError, ResponseError

from cluster.redis.client import bounded, close, new_client
from core.ports import NO_ENTRY, StoredValue, StoreFailed

FIELD = "v"
TAKEN = "equal or smaller than the target stream top item"
"""In Redis' answer to an entry whose id is not greater."""


class RedisQuotaStore:
    """The `QuotaStore` port over one Redis."""

    def __init__(self, url: str, namespace: str) -> None:
        """Prepare a client; nothing is sent yet."""
        self._prefix = f"baton:{{{namespace}}}:quota:"
        self._client = new_client(url)

    async def read(self, names: Sequence[str]) -> list[StoredValue]:
        """See `QuotaStore`."""
        pipeline = self._client.pipeline(transaction=False)
        for name in names:
            pipeline.xrange(self._prefix + name, count=1)
        return [_value(entries) for entries in await bounded(pipeline.execute())]

    async def replace(
        self, name: str, value: StoredValue, ttl_s: float, others: Sequence[str] = ()
    ) -> list[StoredValue]:
        """See `QuotaStore`."""
        key = self._prefix + name
        pipeline = self._client.pipeline(transaction=False)
        for read in (name, *others):
            pipeline.xrange(self._prefix + read, count=1)
        pipeline.xadd(
            key, {FIELD: value.content}, id=f"{value.version}-0", maxlen=1, approximate=False
        )
        pipeline.pexpire(key, int(ttl_s * 1000))
        *found, added, _ = await bounded(pipeline.execute(raise_on_error=False))
        for answer in found:
            if isinstance(answer, RedisError):
                raise StoreFailed(str(answer))
        if isinstance(added, RedisError):
            if not (isinstance(added, ResponseError) and TAKEN in str(added)):
                raise StoreFailed(str(added))
            before = _value(found[0])
            if before.version < value.version:  # another's came between the two commands
                return await self.read((name, *others))
        return [_value(entries) for entries in found]

    async def close(self) -> None:
        """See `QuotaStore`."""
        await close(self._client)


def _value(entries: Any) -> StoredValue:  # noqa: ANN401 - what Redis sent
    if not entries:
        return NO_ENTRY
    entry_id, fields = entries[0]
    version = int(bytes(entry_id).partition(b"-")[0])
    return StoredValue(version, bytes((fields or {}).get(FIELD.encode(), b"")))
