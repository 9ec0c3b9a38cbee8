"""The parts that two differently split pools have in common, and where each lies in a pool.

Owns the arithmetic of moving KV between any two splits: by KV heads (tensor parallelism) and by
tokens (block size). Does not know streams or transfers' states. Called by `kv_transfer.sender` and
`kv_transfer.receiver`.

Both ends derive one grid from their two shapes: a wire shard holds as many heads as fit whole into a
shard of either side, a wire block as many tokens as the smaller block. So a part lies in one place of
one shard on each side (and in its copies), and nobody needs the whole.

    prefill, 2 ranks          wire            decode, 4 ranks
    [ h0 h1 | h2 h3 ]   h0 · h1 · h2 · h3   [ h0 | h1 | h2 | h3 ]
    blocks of 16        wire blocks of 8    blocks of 8
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import LayoutMismatch
from core.kv_layout import DTYPE_BYTES, KVLayout
from core.ports import KVBytes

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Grid:
    """What travels as one part: a wire shard of a wire block of a layer."""

    num_shards: int
    block_size_tokens: int

    def blocks_for(self, num_tokens: int) -> int:
        """Wire blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size_tokens)


@dataclass(frozen=True, slots=True)
class WirePart:
    """One part in the sender's pool. `block` counts wire blocks from the sequence's start."""

    layer: int
    shard: int
    block: int
    block_id: int
    num_valid_tokens: int


def common_grid(mine: KVLayout, num_shards: int, block_size_tokens: int) -> Grid:
    """Find the grid of this pool and a peer's.

    Args:
        mine: This side's layout; `num_kv_heads` must be the peer's too.
        num_shards: The peer's shards.
        block_size_tokens: The peer's block size.

    Raises:
        LayoutMismatch: The peer's numbers cannot be those of a pool like this, or block sizes do not divide.
    """
    heads, (small, large) = mine.num_kv_heads, sorted((mine.block_size_tokens, block_size_tokens))
    if num_shards < 1 or (heads % num_shards and num_shards % heads):
        raise LayoutMismatch(f"the peer claims {num_shards} shards of {heads} KV heads, which do not divide")
    if small < 1 or large % small:
        raise LayoutMismatch(
            f"blocks of {mine.block_size_tokens} tokens here and of {block_size_tokens} there do not divide one "
            "another; make one engine.block_size_tokens a multiple of the other"
        )
    return Grid(math.lcm(mine.num_distinct_shards, min(num_shards, heads)), small)


class PoolParts:
    """One side's pool, addressed by parts of a grid."""

    def __init__(self, kv: KVBytes, layout: KVLayout, grid: Grid) -> None:
        """Work out where parts lie."""
        self.grid = grid
        self._kv, self._layout = kv, layout
        self._heads = layout.num_kv_heads // grid.num_shards
        self._head_bytes = layout.head_size * DTYPE_BYTES[layout.dtype]
        self._blocks = layout.block_size_tokens // grid.block_size_tokens
        self._is_whole = self._blocks == 1 and self._heads == layout.heads_per_shard
        self.part_bytes = 2 * grid.block_size_tokens * self._heads * self._head_bytes

    def split(self, layer: int, block: int, block_id: int, num_valid_tokens: int) -> list[WirePart]:
        """Cut one layer of one block of this pool into the grid's parts."""
        size = self.grid.block_size_tokens
        return [
            WirePart(layer, shard, block * self._blocks + at, block_id, min(size, num_valid_tokens - at * size))
            for shard in range(self.grid.num_shards)
            for at in range(self.grid.blocks_for(num_valid_tokens))
        ]

    def read(self, part: WirePart) -> memoryview:
        """Return a part's bytes, uint8 [part_bytes]: the pool's own where it lies in one piece, else a copy."""
        shard, head, slot = self._place(part.shard, part.block)
        view = self._kv.view(part.layer, part.block_id, shard)
        if self._is_whole:
            return view
        piece = np.ascontiguousarray(self._within(view, head, slot))
        return memoryview(piece.data).cast("B")

    def write(self, layer: int, shard: int, block: int, block_ids: tuple[int, ...], payload: memoryview) -> None:
        """Put a part where it belongs, in every copy of its heads."""
        first, head, slot = self._place(shard, block)
        block_id = self.block_of(block, block_ids)
        for copy in range(self._layout.num_copies):
            view = self._kv.view(layer, block_id, first + copy)
            if self._is_whole:
                view[:] = payload
            else:
                target = self._within(view, head, slot)
                target[:] = np.frombuffer(payload, np.uint8).reshape(target.shape)

    def block_of(self, block: int, block_ids: tuple[int, ...]) -> int:
        """Pool block in which a wire block lies."""
        return block_ids[block // self._blocks]

    def _place(self, shard: int, block: int) -> tuple[int, int, int]:
        """First shard that holds a wire shard, and where in its block: (shard, first head, first slot)."""
        distinct, head = divmod(shard * self._heads, self._layout.heads_per_shard)
        return distinct * self._layout.num_copies, head, block % self._blocks * self.grid.block_size_tokens

    def _within(self, view: memoryview, head: int, slot: int) -> Bytes:
        """A part inside one layer of a block, uint8 [2, slots, heads, head bytes], not copied."""
        layout = self._layout
        shape = (2, layout.block_size_tokens, layout.heads_per_shard, self._head_bytes)
        block: Bytes = np.frombuffer(view, np.uint8).reshape(shape)
        return block[:, slot : slot + self.grid.block_size_tokens, head : head + self._heads]
