"""What a worker does with the storage tiers below its pool: it writes blocks out and loads prompts.

Owns the copies under way and their deadlines. Does not know which blocks are worth it
(`StorageTiers`) nor where their bytes lie (`BlockStore`).

A prompt whose beginning is stored is loaded before it is submitted to the scheduler, so that it
finds the blocks in the pool like any other. Nobody else waits for it, and it waits no longer than
computing would take: whatever fails, or is late, is computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Coroutine, Mapping
from itertools import groupby
from typing import Any

from core import events
from core.containment import contained
from core.ports import BlockCopy
from core.prefix_changes import StorageTier
from core.session import StorageLoad
from core.stored_block import StorageFault
from engine.scheduling.block_origins import BlockOrigins
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.scheduling.storage_tiers import Loading, StorageTiers, Tier, Writing
from engine.scheduling.tier_book import TierBook
from worker.components import WorkerComponents

MAX_WRITE_BLOCKS = 64
"""Written at a time; the next are chosen when these are done."""
READ_AT_ONCE_BLOCKS = 8
"""Between two reads a load ends that nobody waits for any more."""
MIN_LOAD_WAIT_S = 0.02
MAX_LOAD_WAIT_S = 2.0
"""A prompt waits at least and at most so long for its blocks."""
STOP_S = 5.0
"""For copies under way when the worker stops."""


def make_origins(components: WorkerComponents) -> BlockOrigins:
    """Make the notes on the pool's blocks that tiers below it need."""
    return BlockOrigins(
        components.engine.num_blocks,
        components.layout.content_digest,
        components.hash_key,
        {name: tier.cache_weight for name, tier in components.tiers.items()},
    )


def make_tiers(
    components: WorkerComponents, scheduler: Scheduler, origins: BlockOrigins
) -> StorageTiers:
    """Make the books of the tiers."""
    tiers = {}
    for one in components.stores:
        book = TierBook(
            one.num_slots,
            components.engine.block_size_tokens,
            pin_uses=one.pin_uses,
            max_pinned=one.max_pinned,
            changes=one.changes,
        )
        block_s = components.layout.block_bytes / one.bytes_per_s
        tiers[one.tier] = Tier(book, block_s, one.min_uses)
    return StorageTiers(scheduler.pool, scheduler.tables, origins, tiers)


class StoredPrefixes:
    """The tiers of one worker."""

    def __init__(
        self,
        tiers: StorageTiers,
        components: WorkerComponents,
        scheduler: Scheduler,
        wake: Callable[[], None],
    ) -> None:
        """Keep the collaborators; `start` looks for what an earlier life has left.

        Args:
            tiers: The books.
            components: The stores, one for each tier, and the pool's bytes.
            scheduler: The engine's.
            wake: Called when blocks of the pool came free.
        """
        self._tiers = tiers
        self._stores = {one.tier: one.store for one in components.stores}
        self._kv = components.kv
        self._scheduler = scheduler
        self._clock = components.clock
        self._wake = wake
        self._is_writing = False
        self._is_stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._reported: set[tuple[StorageTier, StorageFault]] = set()

    @property
    def tiers(self) -> StorageTiers:
        """The books, for reports."""
        return self._tiers

    @property
    def num_live(self) -> int:
        """Blocks of the pool that loads hold; zero at rest. Writing holds none."""
        return self._tiers.num_loading

    def loads(self) -> tuple[StorageLoad, ...]:
        """Report each tier, for operators."""
        counts = self._tiers.counts
        return tuple(
            StorageLoad(
                tier.label,
                len(one.book),
                counts.hit_blocks[tier],
                {fault.value: n for (its, fault), n in counts.faults.items() if its is tier},
            )
            for tier, one in self._tiers.tiers.items()
        )

    async def start(self) -> None:
        """Enter what lies in the stores from an earlier life; a store that fails has nothing."""
        for tier, store in self._stores.items():
            with contained("looking for stored blocks"):
                book = self._tiers.tiers[tier].book
                num_blocks = book.restore(await store.find())
                if num_blocks:
                    events.BLOCKS_FOUND.log(storage=tier.label, blocks=num_blocks)

    async def stop(self) -> None:
        """Wait for copies under way, then let the stores go."""
        self._is_stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await asyncio.gather(*self._tasks, return_exceptions=True)
        for store in self._stores.values():
            with contained("closing a store of blocks"):
                await store.close()

    # --- out of the pool --------------------------------------------------------------------------

    def write_back(self) -> None:
        """Copy blocks that the pool evicts soon, unless others are being copied."""
        if self._is_writing or self._is_stopping:
            return
        writings = self._tiers.pick_writes(MAX_WRITE_BLOCKS)
        if writings:
            self._is_writing = True
            self._spawn(self._write(writings))

    async def _write(self, writings: list[Writing]) -> None:
        try:
            for tier, store in self._stores.items():
                mine = [writing for writing in writings if writing.tier is tier]
                if not mine:
                    continue
                copies = [BlockCopy(w.entry.block, w.block_id, w.entry.slot) for w in mine]
                is_still = functools.partial(self._is_still, {w.block_id: w for w in mine})
                # Stands if the store raises: then none of these blocks is there.
                faults: list[StorageFault | None] = [StorageFault.UNREACHABLE] * len(mine)
                with contained("writing blocks to a storage tier"):
                    faults = list(await store.write(copies, self._kv, is_still))
                for writing, fault in zip(mine, faults, strict=True):
                    self._tiers.end_write(writing, fault)
                self._report(tier, faults)
        finally:
            self._is_writing = False
        # More may have come to its turn while these were copied.
        self.write_back()

    def _is_still(self, writings: Mapping[int, Writing], copy: BlockCopy) -> bool:
        return self._tiers.is_still(writings[copy.block_id])

    # --- into the pool ----------------------------------------------------------------------------

    def load(self, sequence: Sequence, submit: Callable[[], None]) -> None:
        """Submit a new sequence, at once or when its stored blocks are in the pool.

        Args:
            sequence: Waits nowhere yet; it may be cancelled meanwhile.
            submit: Called once, in this call or later on this loop.
        """
        loading = None
        if self._scheduler.may_grant_blocks:
            with contained("looking for a stored prefix"):
                loading = self._tiers.begin_load(sequence, self._scheduler.budget.token_s)
        if loading is None:
            submit()
            return
        late = _Deadline(submit)
        # Longer than computing them would take, loading has lost.
        wait_s = min(loading.compute_s or MAX_LOAD_WAIT_S, MAX_LOAD_WAIT_S)
        late.start(max(wait_s, MIN_LOAD_WAIT_S))
        self._spawn(self._load(loading, late))

    async def _load(self, loading: Loading, late: _Deadline) -> None:
        faults: list[StorageFault | None] = []
        generation = self._kv.generation
        try:
            with contained("loading blocks from a storage tier"):
                await self._read(loading, faults, late)
        finally:
            # What was read before the memory was replaced lies in none.
            if generation != self._kv.generation:
                faults = [StorageFault.REPLACED] if faults else []
            num_read = self._tiers.end_load(loading, faults)
            self._scheduler.note_arrived(loading.block_ids[:num_read])
            # Reading stops at the first fault: only the last result can be one.
            for tier, _ in loading.sources[len(faults) - 1 : len(faults)] if faults else ():
                self._report(tier, faults[-1:])
            self._tiers.counts.num_late += late.is_over
            late.submit()
            self._wake()

    async def _read(
        self, loading: Loading, faults: list[StorageFault | None], late: _Deadline
    ) -> None:
        """Read runs of one tier, one after the other, until something fails or it is too late."""
        pairs = zip(loading.block_ids, loading.sources, strict=True)
        for tier, run in groupby(pairs, key=lambda pair: pair[1][0]):
            copies = [BlockCopy(entry.block, block_id, entry.slot) for block_id, (_, entry) in run]
            for at in range(0, len(copies), READ_AT_ONCE_BLOCKS):
                # The prompt computes the others itself, and the pool has need of their blocks.
                if late.is_over:
                    return
                some = copies[at : at + READ_AT_ONCE_BLOCKS]
                began_at = self._clock.now_s()
                results = await self._stores[tier].read(some, self._kv)
                faults += results
                if results[-1] is not None:
                    return
                self._tiers.learn(tier, len(some), self._clock.now_s() - began_at)

    # --- tasks ------------------------------------------------------------------------------------

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _report(self, tier: StorageTier, faults: list[StorageFault | None]) -> None:
        """Log the first fault of each kind; the counts have the others."""
        for fault in faults:
            if fault in (None, StorageFault.REPLACED) or (tier, fault) in self._reported:
                continue
            self._reported.add((tier, fault))
            events.STORAGE_FAILED.log(storage=tier.label, reason=fault.value)


class _Deadline:
    """Calls `submit` once: when the blocks are there, or when it is too late for them."""

    def __init__(self, submit: Callable[[], None]) -> None:
        self._submit: Callable[[], None] | None = submit
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_over(self) -> bool:
        """True once it was submitted."""
        return self._submit is None

    def start(self, wait_s: float) -> None:
        """Wait no longer than so many seconds."""
        self._timer = asyncio.get_running_loop().call_later(wait_s, self.submit)

    def submit(self) -> None:
        """Submit now, unless it was done."""
        submit, self._submit = self._submit, None
        if self._timer is not None:
            self._timer.cancel()
        if submit is not None:
            submit()
