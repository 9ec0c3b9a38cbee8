"""The store of quotas in memory, with the faults that Redis can have.

Owns the values with their time to live, and what goes wrong with them. Does not know what is in
them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from core.ports import NO_ENTRY, StoredValue, StoreFailed
from simulation.loop import NODE

CALL_S = 0.001
SLOW_S = 0.2
Values = dict[str, tuple[StoredValue, float]]
"""By name, each with the end of its time to live."""


class MemoryQuotaStore:
    """The `QuotaStore` port, one for all routers; `mode` is its health."""

    def __init__(
        self,
        delay_s: Callable[[], float] = lambda: CALL_S,
        on_trouble: Callable[[], None] = lambda: None,
    ) -> None:
        """Start empty and healthy.

        Args:
            delay_s: What a call takes each way.
            on_trouble: Called when a call has failed, or something was lost.
        """
        self.mode: Literal["ok", "down", "slow", "frozen"] = "ok"
        self.cut: dict[str, None] = {}
        """Nodes that do not reach it."""
        self.num_answers_to_lose = 0
        """How many of the next calls are carried out, and reported to have failed."""
        self.num_answers_lost = 0
        self.num_calls = 0
        self.num_failed = 0
        """Calls without an answer, also those that their callers no longer waited for."""
        self.lost_at_s = -math.inf
        """When it last lost something that it had."""
        self._delay_s = delay_s
        self._on_trouble = on_trouble
        self._values: Values = {}
        self._frozen: list[tuple[Callable[[], list[StoredValue]], asyncio.Future[Any]]] = []

    async def read(self, names: Sequence[str]) -> list[StoredValue]:
        """See `QuotaStore`."""
        return await self._call(lambda: [self._value(name) for name in names])

    async def replace(
        self, name: str, value: StoredValue, ttl_s: float, others: Sequence[str] = ()
    ) -> list[StoredValue]:
        """See `QuotaStore`."""

        def carry_out() -> list[StoredValue]:
            found = [self._value(read) for read in (name, *others)]
            kept = value if found[0].version < value.version else found[0]
            self._values[name] = (kept, asyncio.get_running_loop().time() + ttl_s)
            return found

        return await self._call(carry_out)

    # --- what can go wrong ------------------------------------------------------------------------

    def empty(self) -> int:
        """Forget everything, as after a restart without a disk; returns how much that was."""
        return self.become({})

    def snapshot(self) -> Values:
        """Return what it has now, for `become`."""
        return dict(self._values)

    def become(self, values: Values) -> int:
        """Have what it had before, as after a failover to a replica that lagged.

        Returns:
            How many values it has lost.
        """
        num_lost = sum(values.get(name) != kept for name, kept in self._values.items())
        self._values = dict(values)
        if num_lost:
            self.lost_at_s = asyncio.get_running_loop().time()
            self._on_trouble()
        return num_lost

    def thaw(self) -> None:
        """Go on after a freeze: all calls are carried out, also those nobody waits for any more."""
        self.mode = "ok"
        frozen, self._frozen = self._frozen, []
        for carry_out, answer in frozen:
            found = carry_out()
            if not answer.done():
                answer.set_result(found)

    async def close(self) -> None:
        """See `QuotaStore`."""

    def _value(self, name: str) -> StoredValue:
        value, ends_at = self._values.get(name, (NO_ENTRY, 0.0))
        return value if ends_at > asyncio.get_running_loop().time() else NO_ENTRY

    async def _call(self, carry_out: Callable[[], list[StoredValue]]) -> list[StoredValue]:
        self.num_calls += 1
        try:
            await self._arrive()
            if self.mode == "frozen":
                answer = asyncio.get_running_loop().create_future()
                self._frozen.append((carry_out, answer))
                found: list[StoredValue] = await answer
            else:
                found = carry_out()
            await self._answer()
        except (StoreFailed, asyncio.CancelledError):
            self.num_failed += 1
            self._on_trouble()
            raise
        return found

    async def _arrive(self) -> None:
        await asyncio.sleep(SLOW_S if self.mode == "slow" else self._delay_s())
        if self.mode == "down" or NODE.get() in self.cut:
            raise StoreFailed("the store is down")

    async def _answer(self) -> None:
        await asyncio.sleep(self._delay_s())
        if self.mode in ("down", "slow"):
            raise StoreFailed(f"the store is {self.mode}")
        if self.num_answers_to_lose:
            self.num_answers_to_lose -= 1
            self.num_answers_lost += 1
            raise StoreFailed("the answer was lost")
