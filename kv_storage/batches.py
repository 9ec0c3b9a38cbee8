"""Blocks are copied in batches on a thread: between two of them others have their turn.

Owns the order of the batches, and where a reading ends. Does not know slots, files or memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from core.ports import BlockCopy
from core.stored_block import StorageFault

CopyBatch = Callable[[Sequence[BlockCopy]], Sequence[StorageFault | None]]
"""Copies some blocks; returns one result for each that was tried."""


async def copy_in_batches(
    thread: Executor,
    copy_batch: CopyBatch,
    copies: Sequence[BlockCopy],
    batch_blocks: int,
    *,
    stops_at_fault: bool = False,
) -> list[StorageFault | None]:
    """Copy blocks, so many at a time; returns one result for each that was tried.

    Args:
        thread: Where `copy_batch` runs.
        copy_batch: Copies one batch.
        copies: All of them, in order.
        batch_blocks: Of a batch.
        stops_at_fault: What comes after a block that failed is of no use.
    """
    loop = asyncio.get_running_loop()
    faults: list[StorageFault | None] = []
    for start in range(0, len(copies), batch_blocks):
        batch = copies[start : start + batch_blocks]
        faults += await loop.run_in_executor(thread, copy_batch, batch)
        if stops_at_fault and faults[-1] is not None:
            break
    return faults
