"""Redis as the store of the member list.

Owns its key and command. Does not know what is stored.
"""

from __future__ import annotations

from cluster.redis.client import bounded, close, new_client

KEY = "baton:members"


class RedisMemberStore:
    """The `MemberStore` port over one Redis."""

    def __init__(self, url: str) -> None:
        """Prepare a client; nothing is sent yet."""
        self._client = new_client(url)

    async def put(self, members: str, ttl_s: float) -> None:
        """See `MemberStore`."""
        await bounded(self._client.set(KEY, members, px=int(ttl_s * 1000)))

    async def close(self) -> None:
        """See `MemberStore`."""
        await close(self._client)
