"""The store of the prefix index in memory, with the faults that Redis can have.

Owns logs, heads and segments with their time to live, and what goes wrong with them. Does not know
what is in the entries.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from core.ids import WorkerLife
from core.ports import START, StoreFailed
from simulation.loop import NODE

CALL_S = 0.001
SLOW_S = 0.1
LOG_ENTRIES = 4_096


class Mishap(StrEnum):
    """What can happen to one batch that is added."""

    LOST = "lost"
    """Taken, and gone: as what a failover had not copied yet."""
    REPEATED = "repeated"
    SWAPPED = "swapped"
    """It stands in the log after the next one."""
    ANSWER_LOST = "answer_lost"
    """Kept, and reported to have failed."""


@dataclass(slots=True)
class _Kept:
    """What is kept of one life."""

    log: list[tuple[str, bytes]] = field(default_factory=list)
    head: bytes | None = None
    segments: dict[int, list[bytes]] = field(default_factory=dict)
    held: list[bytes] = field(default_factory=list)
    """Entries that come into the log after the next one."""
    ends_at: float = 0.0


class MemoryPrefixStore:
    """The `PrefixStore` port, one for all workers and routers; `mode` is its health."""

    def __init__(self) -> None:
        """Start empty and healthy."""
        self.mode: Literal["ok", "down", "slow"] = "ok"
        self.mishaps: Counter[Mishap] = Counter()
        """How many of the next batches each befalls."""
        self.behind: dict[str, None] = {}
        """Nodes that find nothing new in any log, as at a replica that lags."""
        self.happened: Counter[Mishap] = Counter()
        self.num_refused = 0
        """Calls that failed, in whichever mode."""
        self.num_withheld = 0
        """Calls that would have found something new, and did not."""
        self._kept: dict[WorkerLife, _Kept] = {}
        self._serial = 0
        self._arrived = asyncio.Event()

    def empty(self) -> int:
        """Forget everything, as after a restart without a disk; returns how many lives that was."""
        num_lives = len(self._kept)
        self._kept.clear()
        return num_lives

    def log_of(self, life: WorkerLife) -> list[tuple[str, bytes]]:
        """Return a life's log itself, to be read or damaged."""
        return self._of(life).log

    def forge(self, life: WorkerLife, entry: bytes) -> None:
        """Add what no worker wrote to a log."""
        self._add(life, self._position(), entry)

    async def append(
        self, life: WorkerLife, batches: Sequence[bytes], ttl_s: float, after: str = START
    ) -> str:
        """See `PrefixStore`."""
        await self._call()
        kept = self._touch(life, ttl_s)
        has_before = after == START or _is_in(kept.log, after)
        has_answer = True
        position = START
        for batch in batches:
            position = self._position()
            held = kept.held
            kept.held = []
            if self._befalls(Mishap.LOST):
                pass
            elif self._befalls(Mishap.SWAPPED):
                kept.held.append(batch)
            else:
                self._add(life, position, batch)
                if self._befalls(Mishap.REPEATED):
                    self._add(life, self._position(), batch)
            for late in held:
                self._add(life, self._position(), late)
                self.happened[Mishap.SWAPPED] += 1
            has_answer = not self._befalls(Mishap.ANSWER_LOST) and has_answer
        if not has_answer:
            raise StoreFailed("the answer was lost")
        if not has_before:
            raise StoreFailed("the log has lost what was added last")
        return position

    async def write_whole(
        self, life: WorkerLife, number: int, head: bytes, segments: Sequence[bytes], ttl_s: float
    ) -> None:
        """See `PrefixStore`."""
        await self._call()
        kept = self._touch(life, ttl_s)
        kept.segments[number] = list(segments)
        await self._call()
        kept.head = head

    async def renew(self, life: WorkerLife, number: int, ttl_s: float, after: str = START) -> bool:
        """See `PrefixStore`."""
        await self._call()
        kept = self._of(life)
        is_there = bool(kept.log) and kept.head is not None and number in kept.segments
        if is_there:
            self._touch(life, ttl_s)
        return is_there and (after == START or _is_in(kept.log, after))

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
        if found and NODE.get() in self.behind:
            self.num_withheld += 1
            await asyncio.sleep(wait_s)
            return {}
        return found

    async def close(self) -> None:
        """See `PrefixStore`."""

    def _befalls(self, mishap: Mishap) -> bool:
        has_come = self.mishaps[mishap] > 0
        self.mishaps[mishap] -= has_come
        if mishap is not Mishap.SWAPPED:  # that has happened when it comes behind another
            self.happened[mishap] += has_come
        return has_come

    def _after(
        self, positions: Mapping[WorkerLife, str]
    ) -> dict[WorkerLife, list[tuple[str, bytes]]]:
        found = {}
        for life, position in positions.items():
            log = self._of(life).log
            # From the end: a log is long, and its readers have most of it.
            start = len(log)
            while start and log[start - 1][0] > position:
                start -= 1
            if start < len(log):
                found[life] = log[start:]
        return found

    def _position(self) -> str:
        self._serial += 1
        return f"{self._serial:016d}"

    def _add(self, life: WorkerLife, position: str, entry: bytes) -> None:
        kept = self._kept.setdefault(life, _Kept())
        kept.log.append((position, entry))
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
            self.num_refused += 1
            raise StoreFailed(f"the store is {self.mode}")


def _is_in(log: Sequence[tuple[str, bytes]], position: str) -> bool:
    return any(at == position for at, _ in reversed(log))
