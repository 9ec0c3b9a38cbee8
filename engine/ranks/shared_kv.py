"""Memory that processes share: a rank's KV pool, and what the ranks of a group have in common.

Owns anonymous shared-memory files, never linked into a file system, so nothing can be left behind,
what lies where in the common one, and the refusal of a pool that does not fit. Does not know
tensors: the worker side is bytes, the rank side wraps the same mapping.
"""

from __future__ import annotations

import os
import platform
import secrets
import sys

from core.errors import ModelLoadError
from core.kv_layout import KVLayout
from core.ports import SharedPool
from process.shared_memory import PAGE_BYTES, map_segment

POOL_NAME_BYTES = 16

HEARTBEAT = slice(0, PAGE_BYTES)
"""First page of what a group shares: rank r counts finished layers in its r-th uint64."""
WORDS = slice(PAGE_BYTES, 2 * PAGE_BYTES)
"""Second page: the words of `engine.ranks.shared_group`. Its slots follow."""
SLOTS_AT = 2 * PAGE_BYTES


def common_bytes(size: int, max_rows: int, hidden_size: int) -> int:
    """Bytes of the segment that all ranks of a group share.

    Args:
        size: Ranks of the group; one alone needs no slots.
        max_rows: The longest message (rows of fp32).
        hidden_size: Columns of a row.
    """
    # At least 1 MiB, so that a rank's share of one row of logits fits.
    slot_bytes = -(-max(max_rows * hidden_size * 4, 1 << 20) // PAGE_BYTES) * PAGE_BYTES
    return SLOTS_AT + (2 * size * slot_bytes if size > 1 else 0)


def can_share_sums() -> bool:
    """True where `shared_group` may rely on the order of stores and on its system call."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def check_fits(block_bytes: int, num_blocks: int, left_bytes: int | None, where: str) -> None:
    """Refuse a pool that is larger than the memory left for it.

    Args:
        block_bytes: What a block takes there, with all layers and with every shard that lies there.
        num_blocks: Of the pool.
        left_bytes: Memory that is left; None: not known.
        where: Whose memory it is, for the message.

    Raises:
        ModelLoadError: States how much there is, and how many blocks fit.
    """
    wanted_bytes = num_blocks * block_bytes
    if left_bytes is not None and wanted_bytes > left_bytes:
        raise ModelLoadError(
            f"the KV pool of {num_blocks} blocks takes {wanted_bytes} bytes, and {where} has "
            f"{left_bytes} bytes of memory left; lower engine.num_blocks to at most "
            f"{left_bytes // block_bytes}"
        )


class SharedKV:
    """The worker's side of the `KVBytes` port; one segment per shard."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        """Nothing is mapped until `use`."""
        self._layout = layout
        self._num_blocks = num_blocks
        self.generation = 0
        self._shards: list[memoryview] = []
        self._shared: SharedPool | None = None

    def use(self, fds: list[int]) -> None:
        """Switch to a fresh rank group's segments, whose descriptors are this object's from now on.

        Views into the old ones stay valid memory, so a new generation marks them as void.
        Other threads read it: it changes first, and what is read before it is of the old one.
        """
        self.close()
        self.generation += 1
        sizes = [os.fstat(fd).st_size for fd in fds]
        self._shards = [map_segment(fd, size) for fd, size in zip(fds, sizes, strict=True)]
        self._shared = SharedPool(secrets.token_bytes(POOL_NAME_BYTES), tuple(fds), tuple(sizes))

    def close(self) -> None:
        """Let go of the descriptors; nobody new can map the segments."""
        shared, self._shared = self._shared, None
        for fd in shared.fds if shared else ():
            os.close(fd)

    def segments(self) -> list[memoryview]:
        """See `KVBytes`."""
        return self._shards

    def shared(self) -> SharedPool | None:
        """See `KVBytes`."""
        return self._shared

    def view(self, layer: int, block_id: int, shard: int) -> memoryview:
        """Return one layer of one block, uint8 [layer_block_bytes], not copied."""
        start = self._layout.offset_bytes(layer, block_id, self._num_blocks)
        return self._shards[shard][start : start + self._layout.layer_block_bytes]
