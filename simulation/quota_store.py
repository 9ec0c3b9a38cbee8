"""The store of quotas in memory, with the faults that Redis can have.

Owns the values with their time to live, and what goes wrong with them. Does not know what is in
them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Literal

from core.ports import NO_ENTRY, StoredValue, StoreFailed

CALL_S = 0.001
SLOW_S = 0.2


class MemoryQuotaStore:
    """The `QuotaStore` port, one for all routers; `mode` is its health."""

    def __init__(self, delay_s: Callable[[], float] = lambda: CALL_S) -> None:
        """Start empty and healthy; a call takes `delay_s` each way."""
        self.mode: Literal["ok", "down", "slow"] = "ok"
        self.num_answers_to_lose = 0
        """How many of the next calls are carried out, and reported to have failed."""
        self.num_calls = 0
        self._delay_s = delay_s
        self._values: dict[str, tuple[StoredValue, float]] = {}

    async def read(self, names: Sequence[str]) -> list[StoredValue]:
        """See `QuotaStore`."""
        await self._arrive()
        found = [self._value(name) for name in names]
        await self._answer()
        return found

    async def replace(
        self, name: str, value: StoredValue, ttl_s: float, others: Sequence[str] = ()
    ) -> list[StoredValue]:
        """See `QuotaStore`."""
        await self._arrive()
        found = [self._value(read) for read in (name, *others)]
        kept = value if found[0].version < value.version else found[0]
        self._values[name] = (kept, asyncio.get_running_loop().time() + ttl_s)
        await self._answer()
        return found

    def empty(self) -> None:
        """Forget everything, as after a restart without a disk."""
        self._values.clear()

    async def close(self) -> None:
        """See `QuotaStore`."""

    def _value(self, name: str) -> StoredValue:
        value, ends_at = self._values.get(name, (NO_ENTRY, 0.0))
        return value if ends_at > asyncio.get_running_loop().time() else NO_ENTRY

    async def _arrive(self) -> None:
        self.num_calls += 1
        await asyncio.sleep(SLOW_S if self.mode == "slow" else self._delay_s())
        if self.mode == "down":
            raise StoreFailed("the store is down")

    async def _answer(self) -> None:
        await asyncio.sleep(self._delay_s())
        if self.mode != "ok":
            raise StoreFailed(f"the store is {self.mode}")
        if self.num_answers_to_lose:
            self.num_answers_to_lose -= 1
            raise StoreFailed("the answer was lost")
