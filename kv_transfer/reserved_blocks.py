"""The blocks that one incoming transfer may write, and the fragments that are in them.

Owns the checks of a frame's claims (range, owner, generation of the pool), the copy into the blocks
and the comparison of checksums. Does not know streams, or the states of a transfer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from core.errors import KVTransferError
from core.ids import TransferId
from kv_transfer import frames
from kv_transfer.copying import Array
from kv_transfer.fenced_pool import FIRST_GENERATION, FencedPool
from kv_transfer.resharding import PoolView


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks that await KV, by position in the sequence; generations are those at the time."""

    block_ids: tuple[int, ...]
    generations: tuple[int, ...]
    have_blocks: int
    pool_generation: int = FIRST_GENERATION


class ReservedBlocks:
    """A reservation, and what of it has arrived."""

    def __init__(
        self,
        transfer_id: TransferId,
        reservation: Reservation,
        num_tokens: int,
        fence: FencedPool,
        pool: PoolView,
        source: PoolView | None,
        generation_of: Callable[[int], int],
    ) -> None:
        """Nothing has arrived.

        Args:
            transfer_id: Binds the checksums.
            reservation: Which blocks.
            num_tokens: The whole sequence, with what is here already.
            fence: This worker's pool, in the generation that was reserved.
            pool: The same, through the grid agreed on with the sender.
            source: The sender's pool, if it is mapped here.
            generation_of: Current generation of a block.
        """
        layout, grid = pool.layout, pool.grid
        self.reservation = reservation
        self._transfer_id = transfer_id
        self._fence = fence
        self._pool = pool
        self._source = source
        self._generation_of = generation_of
        self._num_layers = layout.num_layers
        # As an array: a frame looks some hundreds of them up at once.
        self._block_ids = np.asarray(reservation.block_ids, np.int64)
        self._first = grid.blocks_for(reservation.have_blocks * layout.block_size_tokens)
        self._end = grid.blocks_for(num_tokens)
        shape = layout.num_layers, grid.num_shards, self._end
        self._checksums = np.zeros(shape, np.uint64)
        # Beside the checksums, of which 0 is a value like any other.
        self._is_here = np.zeros(shape, bool)
        self.num_bytes = 0

    @property
    def num_here(self) -> int:
        """Fragments that arrived undamaged."""
        return int(self._is_here.sum())

    @property
    def num_expected(self) -> int:
        """Fragments that must arrive."""
        return (self._end - self._first) * self._num_layers * self._pool.grid.num_shards

    @property
    def checksum(self) -> int:
        """Combined checksum of what is here, to compare with the commit's."""
        return frames.combined_checksum(self._checksums)

    def check_pool(self) -> None:
        """Compare the pool's generation with the reservation's.

        Raises:
            KVTransferError: The memory was replaced since.
        """
        self._fence.check()

    def write(self, frame: frames.Frame) -> tuple[Array, Array]:
        """Check a frame's claims, then copy it into the blocks, fragment by fragment.

        Returns:
            Entries that arrived, and entries that came damaged.

        Raises:
            KVTransferError: It claims what is not in this transfer; nothing was written.
        """
        # In this order: first what costs nothing, and the copy only when every claim holds.
        entries = frame.entries
        self._fence.check()
        self._check_range(entries)
        at = entries["block"] // self._pool.blocks_per_block
        # All blocks between the first and the last: frames come in order, so they are few.
        self._check_owner(int(at.min()), int(at.max()) + 1)
        tallies = self._copy(frame, self._block_ids[at])
        checksums = frames.keyed_checksums(self._transfer_id, frame.sub_attempt, entries, tallies)
        # Summed in the pass that copies, so what is damaged lies in reserved blocks now. Nobody
        # reads those before everything is verified, and the resend writes over it.
        is_good = checksums == entries["checksum"]
        good = entries[is_good]
        where = good["layer"], good["shard"], good["block"]
        self._checksums[where] = good["checksum"]
        self._is_here[where] = True
        self.num_bytes += len(good) * self._pool.fragment_bytes
        return good, entries[~is_good]

    def forget(self) -> None:
        """Let everything come again: the sender starts over."""
        self._checksums[:] = 0
        self._is_here[:] = False

    def _copy(self, frame: frames.Frame, block_ids: Array) -> Array:
        entries = frame.entries
        pool = self._pool
        source = self._source
        if frame.payload is not None:
            if len(frame.payload) != pool.fragment_bytes * len(entries):
                raise KVTransferError(
                    f"a frame has {len(frame.payload)} bytes for {len(entries)} fragments"
                )
            return pool.scatter(entries, block_ids, frame.payload)
        if source is None or not source.is_inside(entries):
            raise KVTransferError(
                f"a frame of {len(entries)} fragments names blocks of no pool that is mapped here"
            )
        return pool.pull(source, entries, block_ids)

    def _check_range(self, entries: Array) -> None:
        grid = self._pool.grid
        # In one vector operation: entry by entry it would cost more than the copy.
        is_in_range = (
            (entries["layer"] < self._num_layers)
            & (entries["shard"] < grid.num_shards)
            & (entries["block"] >= self._first)
            & (entries["block"] < self._end)
            & (entries["num_valid_tokens"] > 0)
            & (entries["num_valid_tokens"] <= grid.block_size_tokens)
        )
        if not is_in_range.all():
            layer, shard, block = places_of(entries[~is_in_range])[0]
            raise KVTransferError(
                f"a frame names layer {layer}, shard {shard}, block {block}, which is not in "
                "this transfer"
            )

    def _check_owner(self, first: int, end: int) -> None:
        """Fence late writes: blocks that were allocated again belong to somebody else."""
        taken = zip(
            self.reservation.block_ids[first:end],
            self.reservation.generations[first:end],
            strict=True,
        )
        for block_id, generation in taken:
            if self._generation_of(block_id) != generation:
                raise KVTransferError(
                    f"block {block_id} has a new owner; the frame for the old one was refused"
                )


def places_of(entries: Array) -> list[frames.Place]:
    """Name fragments by layer, shard and block."""
    return list(zip(*(entries[name].tolist() for name in ("layer", "shard", "block")), strict=True))
