"""Blocks in host memory: one arena of slots, arranged like a pool.

Owns the arena, what was written to each slot, and a thread that copies. Does not know which blocks
are kept.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from core.kv_layout import KVLayout
from core.ports import BlockCopy, KVBytes
from core.stored_block import StorageFault, StoredBlock
from kv_storage.batches import copy_in_batches
from kv_storage.block_bytes import BlockBytes

BATCH_BLOCKS = 16
"""Copied in one go; between two batches the interpreter is free for the worker's loop."""


class HostStore:
    """`BlockStore` in this process's memory; it takes what is written to, and starts empty."""

    def __init__(self, layout: KVLayout, num_slots: int) -> None:
        """Map the arena; a page takes memory when a block is first written to it."""
        self._bytes = BlockBytes(layout)
        sizes = [layout.pool_bytes(num_slots)] * layout.num_shards
        self._view = self._bytes.view([_arena(size) for size in sizes])
        self._written: dict[int, tuple[StoredBlock, int]] = {}
        """By slot: the block and its checksum."""
        # One thread: reads come in between two writes, and neither takes a core from the ranks.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="host-tier")

    async def write(
        self, copies: Sequence[BlockCopy], pool: KVBytes, is_still: Callable[[BlockCopy], bool]
    ) -> Sequence[StorageFault | None]:
        """See `BlockStore`."""
        write = functools.partial(self._write, pool=pool, is_still=is_still)
        return await copy_in_batches(self._threads, write, copies, BATCH_BLOCKS)

    def _write(
        self, copies: Sequence[BlockCopy], pool: KVBytes, is_still: Callable[[BlockCopy], bool]
    ) -> list[StorageFault | None]:
        for copy in copies:
            self._written.pop(copy.slot, None)
        source = self._bytes.view(pool.segments())
        entries = self._bytes.fragments([copy.block_id for copy in copies])
        targets = self._bytes.targets([copy.slot for copy in copies])
        tallies = self._view.pull(source, entries, targets)
        blocks = [copy.block for copy in copies]
        faults: list[StorageFault | None] = []
        for copy, checksum in zip(copies, self._bytes.checksums(tallies, blocks), strict=True):
            if is_still(copy):
                self._written[copy.slot] = (copy.block, checksum)
                faults.append(None)
            else:
                faults.append(StorageFault.REPLACED)
        return faults

    async def read(
        self, copies: Sequence[BlockCopy], pool: KVBytes
    ) -> Sequence[StorageFault | None]:
        """See `BlockStore`."""
        read = functools.partial(self._read, pool=pool)
        return await copy_in_batches(self._threads, read, copies, BATCH_BLOCKS, stops_at_fault=True)

    def _read(self, copies: Sequence[BlockCopy], pool: KVBytes) -> list[StorageFault | None]:
        target = self._bytes.view(pool.segments())
        entries = self._bytes.fragments([copy.slot for copy in copies])
        targets = self._bytes.targets([copy.block_id for copy in copies])
        tallies = target.pull(self._view, entries, targets)
        blocks = [copy.block for copy in copies]
        faults: list[StorageFault | None] = []
        for copy, checksum in zip(copies, self._bytes.checksums(tallies, blocks), strict=True):
            known = self._written.get(copy.slot)
            if known is None or not known[0].is_same(copy.block):
                faults.append(StorageFault.FOREIGN)
            elif known[1] != checksum:
                faults.append(StorageFault.DAMAGED)
            else:
                faults.append(None)
                continue
            break
        return faults

    async def find(self) -> Sequence[tuple[int, StoredBlock]]:
        """See `BlockStore`: memory has no earlier life."""
        return []

    async def close(self) -> None:
        """See `BlockStore`."""
        self._threads.shutdown()


def _arena(num_bytes: int) -> memoryview:
    # Anonymous: nobody else maps it, and it goes with the process.
    return memoryview(mmap.mmap(-1, num_bytes))
