"""Leading blocks of prompts on their way between workers, apart from any sequence in the engine.

Owns the references on blocks that a peer reads, and on blocks that a peer's KV is written into
until they are cached; and how much of the pool either may take. Does not know transfers.

A prefix is a `Sequence` that is never queued: its tokens, with one more behind them, since the last
token of a prompt is never looked for in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from core.block_hash import BlockNaming
from core.ids import Epoch, RequestId
from core.types import GenerateRequest, SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_tables import BlockTables
from engine.scheduling.sequence import UNLIMITED_CREDIT, Sequence
from engine.scheduling.sequences import Sequences

LARGEST_SHARE = 2
"""Blocks that peers read, and blocks that peers fill, are each at most this part of the pool."""


class PrefixBlocks:
    """Blocks of one pool that serve peers, or are served by them."""

    def __init__(
        self,
        pool: BlockPool,
        tables: BlockTables,
        sequences: Sequences,
        naming_of: Callable[[GenerateRequest], BlockNaming],
        block_size_tokens: int,
        note_arrived: Callable[[Iterable[int]], None],
    ) -> None:
        """Hold nothing.

        Args:
            pool: The engine's.
            tables: Over the same pool.
            sequences: Those of the engine, who have the first claim on blocks.
            naming_of: How a prompt's blocks are named.
            block_size_tokens: Of the pool.
            note_arrived: Called with blocks that a transfer has written.
        """
        self._pool = pool
        self._tables = tables
        self._sequences = sequences
        self._naming_of = naming_of
        self._block_size_tokens = block_size_tokens
        self._note_arrived = note_arrived
        self._num_most = pool.num_blocks // LARGEST_SHARE
        self.num_read = 0
        """Blocks that peers may be reading; one counts for each of them."""
        self.num_reserved = 0
        """Blocks that await a peer's KV."""

    def prefix(self, token_ids: tuple[int, ...], scope: str) -> Sequence:
        """Make the prefix of a prompt; `token_ids` are its tokens and one more."""
        request = GenerateRequest(
            RequestId(""), "", token_ids, SamplingParams(), seed=0, deadline_at=0.0, scope=scope
        )
        return Sequence(
            key=0,
            request=request,
            epoch=Epoch(0),
            choices=(0,),
            token_ids=list(token_ids),
            naming=self._naming_of(request),
            block_size_tokens=self._block_size_tokens,
            credit=UNLIMITED_CREDIT,
            arrived_at=0.0,
        )

    def num_held(self, prefix: Sequence) -> int:
        """Count the leading blocks of a prefix that are cached here."""
        return len(self._tables.find_prefix(prefix))

    # --- blocks that a peer reads ---------------------------------------------------------------

    def pin(self, prefix: Sequence) -> list[int]:
        """Keep the leading blocks of a prefix that are cached here, by their tokens.

        Returns:
            Those blocks; none if peers read too many already.
        """
        hits = self._tables.find_prefix(prefix)
        # A peer that is slow or gone keeps them until its lease ends, and requests need blocks.
        if self.num_read + len(hits) > self._num_most:
            return []
        for block_id in hits:
            self._pool.share(block_id)
        self.num_read += len(hits)
        return hits

    def unpin(self, block_ids: list[int]) -> None:
        """The peer reads them no more."""
        self._pool.free(block_ids)
        self.num_read -= len(block_ids)

    # --- blocks that a peer's KV is written into ------------------------------------------------

    def reserve(self, prefix: Sequence) -> int | None:
        """Take blocks for a prefix, those that are here already among them.

        Returns:
            How many are here already; None: there is no room, and nothing was taken.
        """
        # The step that runs still reads from a free block, which nobody may be given.
        if self._sequences.copies_from_free:
            return None
        hits = self._tables.find_prefix(prefix)
        num_tokens = prefix.num_tokens - 1
        num_new = self._tables.blocks_for(num_tokens) - len(hits)
        first = self._sequences.waiting.ready.first
        # Whoever waits for blocks comes before one who could do without.
        num_kept = self._tables.blocks_for(first.num_tokens) if first is not None else 0
        num_taken = num_new + sum(self._pool.references(block_id) == 0 for block_id in hits)
        if num_taken + num_kept > self._pool.num_available:
            return None
        if self.num_reserved + num_new > self._num_most:
            return None
        self._tables.allocate(prefix, hits, num_new, num_spare=0)
        self.num_reserved += len(prefix.block_table)
        return len(hits)

    def attach(self, prefix: Sequence) -> None:
        """The KV is complete and verified: the full blocks become cache."""
        num_here = len(prefix.parents) - 1
        prefix.num_computed_tokens = prefix.num_tokens - 1
        self._tables.register(prefix)
        self._note_arrived(prefix.block_table[num_here:])
        self.release(prefix)

    def release(self, prefix: Sequence) -> None:
        """Nothing is written into a prefix's blocks any more: give them back. Idempotent."""
        self.num_reserved -= len(prefix.block_table)
        self._tables.free(prefix)
