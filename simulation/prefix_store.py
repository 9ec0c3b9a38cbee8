"""The store of the prefix index in memory, with the faults that Redis can have.

Owns logs, heads and segments with their time to live, and what goes wrong with them. Does not know
what is in the entries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from core.ids import WorkerLife
from core.ports import START, StoreFailed

CALL_S = 0.001
SLOW_S = 0.1
LOG_ENTRIES = 4_096


@dataclass(slots=True)
class _Kept:
    """What is kept of one life."""

    log: list[tuple[str, bytes]] = field(default_factory=list)
    head: bytes | None = None
    segments: dict[int, list[bytes]] = field(default_factory=dict)
    ends_at: float = 0.0


class MemoryPrefixStore:
    """The `PrefixStore` port, one for all workers and routers; `mode` is its health."""

    def __init__(self) -> None:
        """Start empty and healthy."""
        self.mode: Literal["ok", "down", "slow"] = "ok"
        self.loses_next = 0
        """Batches that vanish after they were taken."""
        self.fails_after_next = 0
        """Batches that are kept, and reported to have failed."""
        self.num_bitten = 0
        self._kept: dict[WorkerLife, _Kept] = {}
        self._serial = 0
        self._added_s: dict[str, float] = {}
        self._answered_s = 0.0
        self._arrived = asyncio.Event()

    def age_s(self, position: str) -> float:
        """See `PrefixStore`."""
        return max(0.0, self._answered_s - self._added_s.get(position, self._answered_s))

    def empty(self) -> None:
        """Forget everything, as after a restart without a disk."""
        self._kept.clear()

    def log_of(self, life: WorkerLife) -> list[tuple[str, bytes]]:
        """Return a life's log itself, to be read or damaged."""
        return self._of(life).log

    def forge(self, life: WorkerLife, entry: bytes) -> None:
        """Add what no worker wrote to a log."""
        self._add(life, entry)

    async def append(self, life: WorkerLife, batches: Sequence[bytes], ttl_s: float) -> str:
        """See `PrefixStore`."""
        await self._call()
        kept = self._touch(life, ttl_s)
        for batch in batches:
            if self.loses_next:
                self.loses_next -= 1
                self.num_bitten += 1
            else:
                self._add(life, batch)
        if self.fails_after_next:
            self.fails_after_next -= 1
            self.num_bitten += 1
            raise StoreFailed("the answer was lost")
        return kept.log[-1][0] if kept.log else START

    async def write_whole(
        self, life: WorkerLife, number: int, head: bytes, segments: Sequence[bytes], ttl_s: float
    ) -> None:
        """See `PrefixStore`."""
        await self._call()
        kept = self._touch(life, ttl_s)
        kept.segments[number] = list(segments)
        await self._call()
        kept.head = head

    async def renew(self, life: WorkerLife, number: int, ttl_s: float) -> bool:
        """See `PrefixStore`."""
        await self._call()
        kept = self._of(life)
        is_there = bool(kept.log) and kept.head is not None and number in kept.segments
        if is_there:
            self._touch(life, ttl_s)
        return is_there

    async def read_head(self, life: WorkerLife) -> bytes | None:
        """See `PrefixStore`."""
        await self._call()
        return self._of(life).head

    async def read_segment(self, life: WorkerLife, number: int, index: int) -> bytes | None:
        """See `PrefixStore`."""
        await self._call()
        segments = self._of(life).segments.get(number, [])
        return segments[index] if index < len(segments) else None

    async def read_log(
        self, positions: Mapping[WorkerLife, str], wait_s: float
    ) -> dict[WorkerLife, list[tuple[str, bytes]]]:
        """See `PrefixStore`."""
        await self._call()
        found = self._after(positions)
        if not found:
            try:
                async with asyncio.timeout(wait_s):
                    while not found:
                        await self._arrived.wait()
                        found = self._after(positions)
            except TimeoutError:
                pass
            await self._call()
        self._answered_s = asyncio.get_running_loop().time()
        return found

    async def close(self) -> None:
        """See `PrefixStore`."""

    def _after(
        self, positions: Mapping[WorkerLife, str]
    ) -> dict[WorkerLife, list[tuple[str, bytes]]]:
        found = {}
        for life, position in positions.items():
            later = [item for item in self._of(life).log if item[0] > position]
            if later:
                found[life] = later
        return found

    def _add(self, life: WorkerLife, entry: bytes) -> None:
        kept = self._kept.setdefault(life, _Kept())
        self._serial += 1
        position = f"{self._serial:016d}"
        kept.log.append((position, entry))
        self._added_s[position] = asyncio.get_running_loop().time()
        del kept.log[:-LOG_ENTRIES]
        self._arrived.set()
        self._arrived = asyncio.Event()

    def _touch(self, life: WorkerLife, ttl_s: float) -> _Kept:
        self._of(life)
        kept = self._kept.setdefault(life, _Kept())
        kept.ends_at = asyncio.get_running_loop().time() + ttl_s
        return kept

    def _of(self, life: WorkerLife) -> _Kept:
        kept = self._kept.get(life, _Kept())
        if kept.ends_at and kept.ends_at < asyncio.get_running_loop().time():
            self._kept.pop(life, None)
            return _Kept()
        return kept

    async def _call(self) -> None:
        await asyncio.sleep(SLOW_S if self.mode == "slow" else CALL_S)
        if self.mode != "ok":
            self.num_bitten += 1
            raise StoreFailed(f"the store is {self.mode}")
