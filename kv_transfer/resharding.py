"""The fragments that two differently split pools have in common, and where each lies in a pool.

Owns the arithmetic of moving KV between any two splits: by KV heads (tensor parallelism) and by
tokens (block size). Does not know streams or transfers' states.

Both ends derive one grid from their two shapes: a wire shard holds as many heads as fit whole into
a shard of either side, a wire block as many tokens as the smaller block. So a fragment lies in one
place of one shard on each side (and in its copies), and nobody needs the whole.

    prefill, 2 ranks          wire            decode, 4 ranks
    [ h0 h1 | h2 h3 ]   h0 · h1 · h2 · h3   [ h0 | h1 | h2 | h3 ]
    blocks of 16        wire blocks of 8    blocks of 8
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from core.errors import LayoutMismatch
from core.kv_layout import DTYPE_BYTES, KVLayout
from kv_transfer.copying import Array, move
from kv_transfer.frames import ENTRY

WORD_BYTES = 8


@dataclass(frozen=True, slots=True)
class Grid:
    """What travels as one fragment: a wire shard of a wire block of a layer."""

    num_shards: int
    block_size_tokens: int

    def blocks_for(self, num_tokens: int) -> int:
        """Wire blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size_tokens)


def common_grid(mine: KVLayout, num_shards: int, block_size_tokens: int) -> Grid:
    """Find the grid of this pool and a peer's.

    Args:
        mine: This side's layout; `num_kv_heads` must be the peer's too.
        num_shards: The peer's shards.
        block_size_tokens: The peer's block size.

    Raises:
        LayoutMismatch: The peer's numbers cannot be those of a pool like this, or block sizes do
            not divide.
    """
    # More shards than heads means copies of heads, fewer means several heads a shard: both must
    # come out whole.
    heads, (small, large) = mine.num_kv_heads, sorted((mine.block_size_tokens, block_size_tokens))
    if num_shards < 1 or (heads % num_shards and num_shards % heads):
        raise LayoutMismatch(
            f"the peer claims {num_shards} shards of {heads} KV heads, which do not divide"
        )
    if small < 1 or large % small:
        raise LayoutMismatch(
            f"blocks of {mine.block_size_tokens} tokens here and of {block_size_tokens} there do "
            "not divide one another; make one engine.block_size_tokens a multiple of the other"
        )
    return Grid(math.lcm(mine.num_distinct_shards, min(num_shards, heads)), small)


@dataclass(frozen=True, slots=True)
class _Addresses:
    """Where fragments lie: an array of words per shard; for each its shard and first word."""

    arrays: list[Array]
    shards: Array
    at: Array
    steps: tuple[int, int]


class PoolView:
    """One side's pool through a grid; its fragments are rows of `frames.ENTRY`."""

    def __init__(
        self, segments: list[memoryview], layout: KVLayout, grid: Grid, threads: int = 1
    ) -> None:
        """Work out where fragments lie.

        Args:
            segments: One per shard, uint8 [pool bytes].
            layout: Of this pool.
            grid: What travels.
            threads: Cores that copy what is put into this pool.

        Raises:
            LayoutMismatch: The segments cannot be a pool of this layout.
        """
        # A pool is [layer][block] in each segment, so its size tells the number of blocks.
        row = layout.layer_block_bytes * layout.num_layers
        if len(segments) != layout.num_shards or any(
            len(s) % row or len(s) != len(segments[0]) for s in segments
        ):
            raise LayoutMismatch(
                f"{len(segments)} segments are no pool of {layout.num_shards} shards in this layout"
            )
        self._num_blocks = len(segments[0]) // row
        self.grid = grid
        self.layout = layout
        self._threads = threads
        self._heads = layout.num_kv_heads // grid.num_shards
        self.blocks_per_block = layout.block_size_tokens // grid.block_size_tokens
        row_bytes = self._heads * layout.head_size * DTYPE_BYTES[layout.dtype]
        self.fragment_bytes = 2 * grid.block_size_tokens * row_bytes
        # The same on both sides, for it depends on the grid alone: rows of odd sizes go byte by
        # byte. Sums over words and over bytes differ, so both ends must choose alike.
        self._unit_bytes = WORD_BYTES if row_bytes % WORD_BYTES == 0 else 1
        self._unit = np.dtype(np.uint64 if self._unit_bytes == WORD_BYTES else np.uint8)
        self._row = row_bytes // self._unit_bytes
        self._arrays = [np.frombuffer(segment, self._unit) for segment in segments]

    def entries(
        self, layer: int, first_block: int, block_ids: tuple[int, ...], num_tokens: int
    ) -> Array:
        """Cut consecutive blocks of one layer, which hold `num_tokens`, into fragments.

        Returns:
            Entries without checksum, ENTRY [n], by wire shard, then block.
        """
        size = self.grid.block_size_tokens
        per_block = self.blocks_per_block
        count = self.grid.blocks_for(num_tokens)
        one = np.zeros(count, ENTRY)
        one["layer"] = layer
        one["block"] = first_block * per_block + np.arange(count)
        one["source"] = np.repeat(np.asarray(block_ids, np.uint32), per_block)[:count]
        one["num_valid_tokens"] = np.minimum(size, num_tokens - size * np.arange(count))
        # By shard first: neighbours in a frame are neighbours in memory, on both sides.
        every = np.tile(one, self.grid.num_shards)
        every["shard"] = np.repeat(np.arange(self.grid.num_shards), count)
        return every

    def gather(self, entries: Array) -> tuple[memoryview, Array]:
        """Copy fragments out of the entries' source blocks; returns payload and tallies."""
        payload = np.empty(len(entries) * self.fragment_bytes // self._unit_bytes, self._unit)
        tallies = self._move(
            self._addresses(entries, entries["source"]), self._in_a_row(payload, len(entries))
        )
        return memoryview(payload.data).cast("B"), tallies

    def checksum(self, entries: Array) -> Array:
        """Sum fragments up where they lie; returns tallies."""
        return self._move(self._addresses(entries, entries["source"]), None)

    def scatter(self, entries: Array, block_ids: Array, payload: memoryview) -> Array:
        """Copy a payload into its places, in every copy of its heads; returns tallies."""
        source = self._in_a_row(np.frombuffer(payload, self._unit), len(entries))
        return self._put(source, entries, block_ids)

    def pull(self, other: PoolView, entries: Array, block_ids: Array) -> Array:
        """Copy fragments from another pool that is mapped here into this one; returns tallies."""
        return self._put(other._addresses(entries, entries["source"]), entries, block_ids)

    def is_inside(self, entries: Array) -> bool:
        """True if every source block is one of this pool's."""
        return bool((entries["source"] < self._num_blocks).all())

    def _put(self, source: _Addresses, entries: Array, block_ids: Array) -> Array:
        # With fewer KV heads than ranks, several ranks hold the same head: each copy is written.
        tallies = np.empty(0, np.uint64)
        for copy in range(self.layout.num_copies):
            tallies = self._move(source, self._addresses(entries, block_ids, copy))
        return tallies

    def _addresses(self, entries: Array, block_ids: Array, copy: int = 0) -> _Addresses:
        layout, unit = self.layout, self._unit_bytes
        head_bytes = layout.head_size * DTYPE_BYTES[layout.dtype]
        distinct, head = np.divmod(
            entries["shard"].astype(np.int64) * self._heads, layout.heads_per_shard
        )
        slot = (
            entries["block"].astype(np.int64) % self.blocks_per_block * self.grid.block_size_tokens
        )
        blocks = entries["layer"].astype(np.int64) * self._num_blocks + block_ids
        # A block holds all its keys, then all its values; in each half, slot by slot, all heads.
        half_slot_bytes = layout.heads_per_shard * head_bytes
        at = blocks * layout.layer_block_bytes + slot * half_slot_bytes + head * head_bytes
        steps = layout.block_size_tokens * half_slot_bytes // unit, half_slot_bytes // unit
        return _Addresses(self._arrays, distinct * layout.num_copies + copy, at // unit, steps)

    def _in_a_row(self, payload: Array, count: int) -> _Addresses:
        size = self.fragment_bytes // self._unit_bytes
        return _Addresses(
            [payload], np.zeros(count, np.int64), np.arange(count) * size, (size // 2, self._row)
        )

    def _move(self, source: _Addresses, target: _Addresses | None) -> Array:
        rows, size = (2, self.grid.block_size_tokens), self._row
        whole = (rows[1] * size, size)
        if source.steps == whole and (target is None or target.steps == whole):
            # In one piece on both sides: one long row is summed and copied by cache lines.
            rows, size = (1, 1), 2 * rows[1] * size
        target_arrays, target_at, target_steps = (
            ([None], source.at, source.steps)
            if target is None
            else (target.arrays, target.at, target.steps)
        )
        if len(source.arrays) == len(target_arrays) == 1:
            return move(
                source.arrays[0],
                source.at,
                source.steps,
                target_arrays[0],
                target_at,
                target_steps,
                rows,
                size,
                self._threads,
            )
        tallies = np.empty(len(source.at), np.uint64)
        # The kernel takes one array a side, so fragments are grouped by the pair they go between.
        pairs = (
            source.shards if target is None else source.shards * len(target_arrays) + target.shards
        )
        for pair in np.unique(pairs):
            mine = np.nonzero(pairs == pair)[0]
            from_array = source.arrays[source.shards[mine[0]]]
            to_array = None if target is None else target_arrays[target.shards[mine[0]]]
            tallies[mine] = move(
                from_array,
                source.at[mine],
                source.steps,
                to_array,
                target_at[mine],
                target_steps,
                rows,
                size,
                self._threads,
            )
        return tallies
