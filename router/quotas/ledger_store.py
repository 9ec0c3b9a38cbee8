"""Ledgers and the routers' clock in the store.

Owns what is read and written with each call. Does not know who is charged, nor what may fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from core.ports import QuotaStore, StoredValue
from router.quotas.ledger import WINDOW_S, Ledger
from router.quotas.shared_clock import CLOCK, SharedClock
from router.quotas.values import LedgerValue, ValueCodec

TTL_S = 2.0 * WINDOW_S


class StoreAnswer(NamedTuple):
    """What became of a call for one key's ledger."""

    known: StoredValue
    """What lies in the store now."""
    other: LedgerValue | None = None
    """What lay there before, if it is not what the caller knew."""
    is_written: bool = False
    is_expected: bool = False
    """It was what the caller knew."""


class LedgerStore:
    """One store; every call may raise `StoreFailed`."""

    def __init__(
        self,
        store: QuotaStore,
        codec: ValueCodec,
        clock: SharedClock,
        on_loss: Callable[[], None],
    ) -> None:
        """Use `store`; `on_loss` is called when it is found to have lost something."""
        self._store = store
        self._codec = codec
        self._clock = clock
        self._on_loss = on_loss

    async def renew_clock(self) -> None:
        """See whether the store is there and has lost nothing, and keep its clock."""
        is_lost = True
        while is_lost:
            value = self._clock.next_value()
            found = await self._store.replace(CLOCK, value, TTL_S)
            is_lost = self._clock.wrote(value, found[0])
            if is_lost:  # once more, with the new epoch
                self._on_loss()

    async def read(self, key: str) -> StoreAnswer:
        """Read a key's ledger."""
        clock_version = self._clock.version
        found, clock = await self._store.read([key, CLOCK])
        self._see_clock(clock, clock_version)
        return StoreAnswer(found, self._ledger(key, found))

    async def replace(self, key: str, known: StoredValue, ledger: Ledger) -> StoreAnswer:
        """Replace a key's ledger, unless another router has done so since `known` was read."""
        clock_version = self._clock.version
        content = self._codec.write_ledger(key, ledger, self._clock.now_ms())
        value = StoredValue(known.version + 1, content)
        found, clock = await self._store.replace(key, value, TTL_S, [CLOCK])
        self._see_clock(clock, clock_version)
        is_written = found.version < value.version
        now_there = value if is_written else found
        # After a loss, a version may come again with another content.
        if found == known:
            return StoreAnswer(now_there, None, is_written, is_expected=True)
        return StoreAnswer(now_there, self._ledger(key, found), is_written)

    async def close(self) -> None:
        """Let go of the connection."""
        await self._store.close()

    def _see_clock(self, clock: StoredValue, known: int) -> None:
        if self._clock.see(clock, known):
            self._on_loss()

    def _ledger(self, key: str, found: StoredValue) -> LedgerValue | None:
        value = self._codec.read_ledger(key, found.content)
        if value is not None:
            self._clock.follow(value.now_ms)
        return value
