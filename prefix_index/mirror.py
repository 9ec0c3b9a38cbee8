"""A mirror of the member list in the store, for operators and for routers on other clusters.

Owns one entry with a time to live, and the breaker that keeps a slow or dead store from being asked
too often. Does not know where members come from, nor Redis.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from core import events
from core.ports import MemberStore, StoreFailed

PERIOD_S = 2.0
TTL_S = 10.0
MAX_PAUSE_S = 4.0
"""Longest pause of the breaker: a store that comes back, empty or not,
holds the members within 5 s."""
FAILURES_TO_BREAK = 3


class MembershipMirror:
    """Writes the members every two seconds, and pauses longer while the store fails."""

    def __init__(
        self, store: MemberStore, read_members: Callable[[], list[dict[str, Any]]]
    ) -> None:
        """Keep the collaborators; nothing is sent until `run`."""
        self._store, self._read_members = store, read_members
        self.state = "starting"
        self.num_failures = 0
        """Failures in a row."""

    async def run(self) -> None:
        """Write until cancelled."""
        try:
            while True:
                await self.write_once()
                is_broken = self.num_failures >= FAILURES_TO_BREAK
                await asyncio.sleep(MAX_PAUSE_S if is_broken else PERIOD_S)
        finally:
            await self._store.close()

    async def write_once(self) -> bool:
        """Write the members once.

        Returns:
            False if the store did not take it.
        """
        try:
            await self._store.put(json.dumps(self._read_members()), TTL_S)
        except StoreFailed as error:
            self.num_failures += 1
            if self.num_failures == FAILURES_TO_BREAK:
                events.STORE_DOWN.log(reason=str(error))
                self.state = "down"
            return False
        if self.state != "ok":
            events.STORE_UP.log()
        self.state, self.num_failures = "ok", 0
        return True
