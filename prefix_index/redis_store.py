"""Redis as the advisory store.

Owns the key of the member list. Does not know what is stored.
"""

from __future__ import annotations

from redis import asyncio as redis_asyncio

from prefix_index.redis_calls import CALL_TIMEOUT_S, bounded

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
        await bounded(self._client.set(KEY, members, px=int(ttl_s * 1000)))

    async def close(self) -> None:
        """See `MemberStore`."""
        await self._client.aclose()
