"""A worker's cached blocks, published to the store.

Owns when changes are sent, their numbers, and when the whole content is published: at the start,
after a change was lost, when the store forgot it, and when the log has grown. Does not know the
pool behind the changes, what lies below it, nor Redis.

Nothing waits for the store: changes are kept within a bound while it fails, and are void beyond.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from core.block_hash import BlockHash
from core.containment import contained
from core.ids import WorkerLife
from core.ports import START, Clock, PrefixStore, StoreFailed
from core.prefix_changes import PrefixChange, StorageTier
from prefix_index.entries import MAX_BATCH_BLOCKS, SEGMENT_BLOCKS, Batch, EntryCodec, Head

BATCH_S = 0.02
"""Changes of this time go together."""
RENEW_S = 1.0
TTL_S = 10.0
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 2.0
"""Longest pause while the store fails: what it forgot is back within 5 s of its return."""
MAX_BATCHES_SINCE_WHOLE = 1_024
"""A quarter of what the log keeps: whoever reads a whole content finds all batches after it."""
READ_BLOCKS = 2_048
"""Blocks of a pool or another tier that are looked at in one go."""


class Changes(Protocol):
    """What came and went in a pool, as `engine.scheduling.block_changes` keeps it."""

    @property
    def is_whole_due(self) -> bool:
        """True if what was published before is void."""
        ...

    def __len__(self) -> int:
        """Changes not taken yet."""
        ...

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call `on_change` at the first change after nothing was left."""
        ...

    def begin_whole(self) -> None:
        """The caller reads the whole content from now on."""
        ...

    def void(self) -> None:
        """What was published is lost."""
        ...

    def take(self, max_changes: int) -> tuple[list[BlockHash], list[BlockHash]]:
        """Take the oldest changes: blocks stored, blocks evicted."""
        ...


@dataclass(frozen=True, slots=True)
class Content:
    """What one storage tier of a worker holds."""

    changes: Changes
    read_blocks: Callable[[range], Sequence[BlockHash]]
    """Names of those of some blocks that can be found."""
    num_blocks: int
    """Its size."""


class PrefixPublisher:
    """Publishes what one life of a worker caches, at most `BATCH_S` and a call late."""

    def __init__(
        self,
        store: PrefixStore,
        life: WorkerLife,
        contents: Mapping[StorageTier, Content],
        codec: EntryCodec,
        clock: Clock,
    ) -> None:
        """Keep the collaborators; nothing is sent until `run`.

        Args:
            store: Where to.
            life: Whose blocks.
            contents: What its pool holds, and the storage tiers below it.
            codec: Writes entries.
            clock: For renewals.
        """
        self._store = store
        self._life = life
        self._contents = dict(contents)
        self._codec = codec
        self._clock = clock
        self._number = 0
        self._whole_number = 0
        self._head = b""
        """As it was written last."""
        self._position = START
        self._renewed_at = 0.0
        self._wake = asyncio.Event()
        for content in self._contents.values():
            content.changes.watch(self._wake.set)
        self.num_failures = 0
        """Failures of the store in a row."""
        self.num_wholes = 0

    async def run(self) -> None:
        """Publish until cancelled."""
        try:
            while True:
                await asyncio.sleep(await self._turn())
                if not self._has_changes:
                    await self._wait()
        finally:
            await self._store.close()

    @property
    def _has_changes(self) -> bool:
        contents = self._contents.values()
        return self._is_whole_due or any(len(content.changes) > 0 for content in contents)

    @property
    def _is_whole_due(self) -> bool:
        # A whole content is that of all tiers: what was lost of one is read of every one.
        return any(content.changes.is_whole_due for content in self._contents.values())

    def _void(self) -> None:
        for content in self._contents.values():
            content.changes.void()

    async def _turn(self) -> float:
        """Publish what there is; returns how long to rest."""
        with contained("publishing cached blocks"):
            try:
                await self.publish()
            except StoreFailed:
                pass
            else:
                self.num_failures = 0
                return BATCH_S
        self._void()  # a batch may be there or not: no number is used again
        self.num_failures += 1
        return float(min(FIRST_PAUSE_S * 2 ** min(self.num_failures, 10), MAX_PAUSE_S))

    async def _wait(self) -> None:
        self._wake.clear()
        rest_s = self._renewed_at + RENEW_S - self._clock.now_s()
        # Looked at after the wake was cleared: a change in between would be slept over.
        if rest_s > 0 and not self._has_changes:
            try:
                async with asyncio.timeout(rest_s):
                    await self._wake.wait()
            except TimeoutError:
                return

    async def publish(self) -> None:
        """Bring the store up to date, once.

        Raises:
            StoreFailed: What was to be published may be lost: the whole content is due.
        """
        if not self._is_whole_due and self._is_renewal_due:
            if not await self._renew():
                self._void()
            self._renewed_at = self._clock.now_s()
        if self._is_whole_due:
            self._position = START
            # A number is left out, so that who follows the log notices and reads the whole.
            self._number += 1
            await self._publish_whole()
            await self._append(PrefixChange())
        for tier, content in self._contents.items():
            while len(content.changes) and not self._is_whole_due:
                stored, evicted = content.changes.take(MAX_BATCH_BLOCKS)
                await self._append(PrefixChange(stored, evicted, tier))
        # A router that starts reads the whole and every batch since: that must not grow for ever.
        if self._number - self._whole_number > MAX_BATCHES_SINCE_WHOLE:
            await self._publish_whole()

    async def _renew(self) -> bool:
        """Keep what is in the store; False if it is no longer what was written."""
        if not await self._store.renew(self._life, self._whole_number, TTL_S, self._position):
            return False
        # Behind a head that another has written, whoever comes new would find nothing.
        return await self._store.read_head(self._life) == self._head

    @property
    def _is_renewal_due(self) -> bool:
        return self._clock.now_s() >= self._renewed_at + RENEW_S

    async def _append(self, change: PrefixChange) -> None:
        self._number += 1
        entry = self._codec.batch(self._life, Batch(self._number, change))
        # Whoever reads a log with a hole knows of it, but can only wait for a whole content: it is
        # the writer who notices what a failover has lost, and writes one.
        self._position = await self._store.append(self._life, [entry], TTL_S, self._position)

    async def _publish_whole(self) -> None:
        number = self._number
        head = Head(number, 0, self._position)
        # Before the first slice is read: what changes meanwhile is published behind the whole.
        for content in self._contents.values():
            content.changes.begin_whole()
        segments: list[bytes] = []
        for tier, content in self._contents.items():
            names = await self._read(content)
            for at in range(0, len(names), SEGMENT_BLOCKS):
                some = names[at : at + SEGMENT_BLOCKS]
                entry = self._codec.segment(self._life, number, len(segments), tier, some)
                segments.append(entry)
        head = Head(number, len(segments), head.position)
        self._head = self._codec.head(self._life, head)
        await self._store.write_whole(self._life, number, self._head, segments, TTL_S)
        self._whole_number = number
        self._renewed_at = self._clock.now_s()
        self.num_wholes += 1

    async def _read(self, content: Content) -> list[BlockHash]:
        """Read what a tier holds, in slices between which others run."""
        names: list[BlockHash] = []
        for start in range(0, content.num_blocks, READ_BLOCKS):
            names += content.read_blocks(range(start, min(start + READ_BLOCKS, content.num_blocks)))
            await asyncio.sleep(0)
        return names
