"""A mirror of the member list in Redis, for operators and for routers on other clusters.

Owns one key with a time to live, and the breaker that keeps a slow or dead store from being asked
too often. Does not know where members come from. Called by `cluster.router_process`, in the
background only.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from redis import asyncio as redis_asyncio
from redis.exceptions import RedisError

CALL_TIMEOUT_S = 0.05
PERIOD_S = 2.0
TTL_S = 10
KEY = "baton:members"
MAX_PAUSE_S = 30.0
FAILURES_TO_BREAK = 3


class MembershipMirror:
    """Writes the members every two seconds, and pauses longer and longer while Redis fails."""

    def __init__(self, url: str, read_members: Callable[[], list[dict[str, Any]]]) -> None:
        """Prepare a client; nothing is sent until `run`."""
        self._client = redis_asyncio.Redis.from_url(
            url, socket_timeout=CALL_TIMEOUT_S, socket_connect_timeout=CALL_TIMEOUT_S, retry_on_timeout=False
        )
        self._read_members = read_members
        self.state = "starting"
        self.num_failures = 0
        """Failures in a row."""

    async def run(self) -> None:
        """Write until cancelled."""
        pause_s = PERIOD_S
        try:
            while True:
                await self.write_once()
                is_broken = self.num_failures >= FAILURES_TO_BREAK
                pause_s = min(pause_s * 2, MAX_PAUSE_S) if is_broken else PERIOD_S
                await asyncio.sleep(pause_s)
        finally:
            await self._client.aclose()

    async def write_once(self) -> bool:
        """Write the members once, within 50 ms or so.

        Returns:
            False if the store did not take it.
        """
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S * 2):
                await self._client.set(KEY, json.dumps(self._read_members()), ex=TTL_S)
        except (RedisError, OSError, TimeoutError):
            self.num_failures += 1
            if self.num_failures >= FAILURES_TO_BREAK:
                self.state = "down"
            return False
        self.state, self.num_failures = "ok", 0
        return True
