"""Redis as the advisory store.

Owns every use of the Redis client, and the bound on each call. Does not know what is stored.
"""

from __future__ import annotations

import asyncio

from redis import asyncio as redis_asyncio
from redis.exceptions import RedisError

from core.ports import StoreFailed

CALL_TIMEOUT_S = 0.05
KEY = "baton:members"


class RedisStore:
    """The `MemberStore` port over one Redis."""

    def __init__(self, url: str) -> None:
        """Prepare a client; nothing is sent yet."""
        self._client = redis_asyncio.Redis.from_url(
            url,
            socket_timeout=CALL_TIMEOUT_S,
            socket_connect_timeout=CALL_TIMEOUT_S,
            retry_on_timeout=False,
        )

    async def put(self, members: str, ttl_s: float) -> None:
        """See `MemberStore`."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S * 2):
                await self._client.set(KEY, members, px=int(ttl_s * 1000))
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreFailed(str(error)) from error

    async def close(self) -> None:
        """See `MemberStore`."""
        await self._client.aclose()
