"""A whole block as one payload: gathered out of a pool, scattered into it, and its checksum.

Owns the order of a block's fragments in a payload and the checksum over them. Does not know slots,
files or threads.

The fragments are those of transfers, in the grid of the pool's own shape: by layer, then by shard;
shards that are copies of one another are stored once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.kv_layout import KVLayout
from core.stored_block import StoredBlock
from kv_transfer.copying import Array, bind
from kv_transfer.frames import ENTRY
from kv_transfer.resharding import Grid, PoolView


class BlockBytes:
    """Payloads of the blocks of one layout."""

    def __init__(self, layout: KVLayout) -> None:
        """Work out the fragments of a block."""
        self._layout = layout
        self._grid = Grid(layout.num_distinct_shards, layout.block_size_tokens)
        one = np.zeros(layout.num_layers * layout.num_distinct_shards, ENTRY)
        one["layer"] = np.repeat(np.arange(layout.num_layers), layout.num_distinct_shards)
        one["shard"] = np.tile(np.arange(layout.num_distinct_shards), layout.num_layers)
        one["num_valid_tokens"] = layout.block_size_tokens
        self._one = one
        self.payload_bytes = len(one) * layout.layer_block_bytes
        """Of a block."""

    def view(self, segments: list[memoryview]) -> PoolView:
        """Address the segments of a pool, or what is arranged like one.

        Raises:
            LayoutMismatch: They cannot be a pool of this layout.
        """
        return PoolView(segments, self._layout, self._grid)

    def fragments(self, block_ids: Sequence[int]) -> Array:
        """Entries of whole blocks, ENTRY [blocks x fragments], block after block."""
        entries = np.tile(self._one, len(block_ids))
        entries["source"] = np.repeat(np.asarray(block_ids, np.uint32), len(self._one))
        return entries

    def targets(self, block_ids: Sequence[int]) -> Array:
        """Block of each fragment of whole blocks, uint32 [blocks x fragments]."""
        return np.repeat(np.asarray(block_ids, np.uint32), len(self._one))

    def checksums(self, tallies: Array, blocks: Sequence[StoredBlock]) -> list[int]:
        """Bind the tallies of whole blocks to their places and to what the blocks are."""
        owners = [int.from_bytes(block.digest[:8], "little") for block in blocks]
        owner = np.repeat(np.asarray(owners, np.uint64), len(self._one))
        layers = np.tile(self._one["layer"], len(blocks))
        shards = np.tile(self._one["shard"], len(blocks))
        bound = bind(tallies, 0, owner, layers, shards).reshape(len(blocks), len(self._one))
        return [int(checksum) for checksum in np.bitwise_xor.reduce(bound, axis=1)]
