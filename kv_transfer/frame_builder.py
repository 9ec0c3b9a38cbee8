"""The frames of one outgoing transfer: what waits for one, what was sent, and how one is built.

Owns the grid agreed on with the receiver, the order and checksums of fragments, and the limit of
resends. Does not know streams, or the states of a transfer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from core.errors import KVTransferError, LayoutMismatch
from core.ids import TransferId
from core.kv_layout import KVLayout
from kv_transfer import frames
from kv_transfer.copying import Array
from kv_transfer.fenced_pool import FencedPool
from kv_transfer.frames import ENTRY, MAX_RESENDS, Place
from kv_transfer.resharding import common_grid


class FrameBuilder:
    """Fragments of one transfer, as rows of `frames.ENTRY`, on their way into frames."""

    def __init__(
        self,
        opened: frames.Open,
        mapped_pool: bytes | None,
        fence: FencedPool,
        layout: KVLayout,
        frame_bytes: int,
    ) -> None:
        """Agree with the receiver on the fragments that travel.

        Args:
            opened: The receiver's first message.
            mapped_pool: Name of the pool that it has mapped; None: bytes must travel.
            fence: This worker's pool, in the generation that was offered.
            layout: What a block of it looks like.
            frame_bytes: The longest frame.

        Raises:
            LayoutMismatch: KV cannot go between these workers; names every difference.
            KVTransferError: The pool is not the one that was offered, or that the peer has mapped.
        """
        differences = layout.differences(opened.identity)
        if differences:
            raise LayoutMismatch(f"KV cannot go between these workers: {'; '.join(differences)}")
        self._grid = common_grid(layout, opened.num_shards, opened.block_size_tokens)
        self._pool = fence.view(layout, self._grid)
        # The peer mapped when it dialled, and an early Open waits for its Submit: ranks may have
        # started again in between.
        fence.check_mapping(mapped_pool)
        fragment_bytes = self._pool.fragment_bytes
        longest = frames.MAX_MESSAGE_BYTES - frames.FRAME_HEAD_BYTES - ENTRY.itemsize
        if fragment_bytes > longest and mapped_pool is None:
            # Refused here: such a frame can never be encoded, however often it is tried.
            raise LayoutMismatch(
                f"a fragment of KV between these workers has {fragment_bytes} bytes, a message "
                f"carries {longest}; lower engine.block_size_tokens"
            )
        self._transfer_id: TransferId = opened.transfer_id
        self._fence = fence
        self._num_layers = layout.num_layers
        self._is_mapped = mapped_pool is not None
        self._fragments_per_frame = frames.fragments_per_frame(
            frame_bytes, fragment_bytes, is_mapped=self._is_mapped
        )
        self.num_bytes = 0
        self.num_waiting = 0
        self._waiting: deque[Array] = deque()
        self._sent: list[Array] = []
        self._first_block = 0
        self._checksums = np.zeros((0, 0, 0), np.uint64)
        self._num_resends = 0

    @property
    def is_full(self) -> bool:
        """True if a frame cannot take more than what waits."""
        return self.num_waiting >= self._fragments_per_frame

    def expect(self, num_tokens: int, have_tokens: int) -> None:
        """Make room for a transfer of `num_tokens`, of which the receiver has the first ones.

        Raises:
            KVTransferError: The receiver cannot have so many.
        """
        grid = self._grid
        # The last token is always computed here, and what decode has ends with a block of its own.
        if have_tokens >= num_tokens or have_tokens % grid.block_size_tokens:
            raise KVTransferError(
                f"the decode worker claims to have {have_tokens} tokens of this transfer"
            )
        self._first_block = grid.blocks_for(have_tokens)
        shape = self._num_layers, grid.num_shards, grid.blocks_for(num_tokens)
        self._checksums = np.zeros(shape, np.uint64)

    def add(
        self, layer: int, first_block: int, block_ids: tuple[int, ...], num_tokens: int
    ) -> None:
        """Let consecutive blocks of one layer wait for the next frame."""
        entries = self._pool.entries(layer, first_block, block_ids, num_tokens)
        # Blocks of this worker may be larger than decode's, which may have the beginning of one.
        self._queue(entries[entries["block"] >= self._first_block])

    def _queue(self, entries: Array) -> None:
        self._waiting.append(entries)
        self.num_waiting += len(entries)

    def build(self, sub_attempt: int) -> frames.Frame:
        """Copy up to a frame of waiting fragments out of the pool; at least one waits.

        If the receiver has mapped the pool, the frame only names where they lie.

        Raises:
            KVTransferError: The pool was replaced since the offer.
        """
        # For each frame: a pool can be replaced in mid-transfer, and its old views stay readable.
        self._fence.check()
        entries = self._take(self._fragments_per_frame)
        payload = None
        if self._is_mapped:
            # Summed although nothing is copied: the receiver compares with what it reads later, and
            # a block that was allocated again in between shows.
            tallies = self._pool.checksum(entries)
        else:
            payload, tallies = self._pool.gather(entries)
        checksums = frames.keyed_checksums(self._transfer_id, sub_attempt, entries, tallies)
        entries["checksum"] = checksums
        self._checksums[entries["layer"], entries["shard"], entries["block"]] = checksums
        self._sent.append(entries)  # descriptors only, for resends: 24 bytes a fragment
        self.num_bytes += len(entries) * self._pool.fragment_bytes
        return frames.Frame(sub_attempt, entries, payload)

    def _take(self, most: int) -> Array:
        taken: list[Array] = []
        while self._waiting and most > 0:
            batch = self._waiting.popleft()
            if len(batch) > most:
                # A batch is one layer of a chunk; what does not fit keeps its place in the order.
                self._waiting.appendleft(batch[most:])
                batch = batch[:most]
            taken.append(batch)
            most -= len(batch)
        entries = np.concatenate(taken)
        self.num_waiting -= len(entries)
        return entries

    def totals(self) -> tuple[int, int]:
        """Count the fragments that were sent; returns their number and their combined checksum."""
        # Of what was sent, not of what should have been: the receiver knows that by itself and
        # compares, so that a fragment which was left out here ends the attempt at once. So does
        # one whose checksum is 0, once in 2**64.
        return int(np.count_nonzero(self._checksums)), frames.combined_checksum(self._checksums)

    def resend(self, places: Sequence[Place]) -> None:
        """Queue fragments again that arrived damaged.

        Raises:
            KVTransferError: They were never sent, or the receiver asks for none or too many.
        """
        if not places:
            # It would cost a look at all that was sent, and count for nothing.
            raise KVTransferError("the decode worker asked for no fragment again")
        self._num_resends += len(places)
        # Built for each question: they are rare, and an index kept for all would cost every frame.
        sent = {
            (int(entry["layer"]), int(entry["shard"]), int(entry["block"])): entry
            for batch in self._sent
            for entry in batch
        }
        if any(place not in sent for place in places) or self._num_resends > MAX_RESENDS:
            raise KVTransferError(
                f"the decode worker asked for {self._num_resends} fragments again, the limit is "
                f"{MAX_RESENDS}, of what was sent"
            )
        self._queue(np.array([sent[place] for place in places], ENTRY))

    def drop_waiting(self) -> None:
        """Forget what was not sent."""
        self._waiting.clear()
        self.num_waiting = 0

    def start_over(self) -> None:
        """Forget everything of a sub-attempt; resends count over the whole transfer."""
        self.drop_waiting()
        self._sent.clear()
        self._checksums[:] = 0
