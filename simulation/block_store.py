"""A store of blocks in memory that can fail: the simulation's side of the `BlockStore` port.

Owns the bytes of its slots and the faults that are asked of it. Does not know which blocks are
kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from core.kv_layout import KVLayout
from core.ports import BlockCopy, KVBytes
from core.stored_block import StorageFault, StoredBlock


@dataclass(slots=True)
class MemoryBlockStore:
    """`BlockStore` whose contents outlive the worker that wrote them, as files do."""

    layout: KVLayout
    copy_s: float = 0.0
    """What a block takes."""
    write_fault: Callable[[], StorageFault | None] = lambda: None
    """Asked before each block is written."""
    read_fault: Callable[[], StorageFault | None] = lambda: None
    """Asked before each block is read."""
    slots: dict[int, tuple[StoredBlock, bytes, bytes]] = field(default_factory=dict)
    """By slot: what lies there, and what was written, to compare it with."""
    num_read: int = 0

    async def write(
        self, copies: Sequence[BlockCopy], pool: KVBytes, is_still: Callable[[BlockCopy], bool]
    ) -> Sequence[StorageFault | None]:
        """See `BlockStore`; half of a block's time passes between its first and second half."""
        faults: list[StorageFault | None] = []
        for copy in copies:
            fault = self.write_fault()
            if fault is None:
                self.slots.pop(copy.slot, None)
                views = self._views(copy.block_id, pool)
                half = len(views) // 2
                taken = b"".join(map(bytes, views[:half]))
                await asyncio.sleep(self.copy_s)
                taken += b"".join(map(bytes, views[half:]))
                if not is_still(copy):
                    faults.append(StorageFault.REPLACED)
                    continue
                self.slots[copy.slot] = (copy.block, taken, taken)
            faults.append(fault)
        return faults

    async def read(
        self, copies: Sequence[BlockCopy], pool: KVBytes
    ) -> Sequence[StorageFault | None]:
        """See `BlockStore`."""
        faults: list[StorageFault | None] = []
        for copy in copies:
            faults.append(await self._read(copy, pool))
            if faults[-1] is not None:
                break
        return faults

    async def _read(self, copy: BlockCopy, pool: KVBytes) -> StorageFault | None:
        fault = self.read_fault()
        if fault is not None:
            return fault
        block, taken, written = self.slots.get(copy.slot, (None, b"", b""))
        if block is None or not block.is_same(copy.block):
            return StorageFault.FOREIGN
        if len(taken) < self.layout.block_bytes:
            return StorageFault.TRUNCATED
        views = self._views(copy.block_id, pool)
        size = self.layout.layer_block_bytes
        half = len(views) // 2
        for index, view in enumerate(views):
            # Time passes in the middle: memory that is replaced meanwhile gets half of the block.
            if index == half:
                await asyncio.sleep(self.copy_s)
            view[:] = taken[index * size : (index + 1) * size]
        self.num_read += 1
        return None if taken == written else StorageFault.DAMAGED

    def _views(self, block_id: int, pool: KVBytes) -> list[memoryview]:
        return [
            pool.view(layer, block_id, shard)
            for layer in range(self.layout.num_layers)
            for shard in range(self.layout.num_shards)
        ]

    def damage(self, slot: int, change: Callable[[bytes], bytes]) -> None:
        """Change what lies in a slot, as a disk or a stranger may."""
        block, taken, written = self.slots[slot]
        self.slots[slot] = (block, change(taken), written)

    async def find(self) -> Sequence[tuple[int, StoredBlock]]:
        """See `BlockStore`."""
        return [(slot, block) for slot, (block, _, _) in self.slots.items()]

    async def close(self) -> None:
        """See `BlockStore`: nothing to let go of."""
