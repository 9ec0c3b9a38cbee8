"""Block tables of sequences: prefix hits, allocation, pins, identities of full blocks.

Owns how a sequence's blocks are taken from the pool and given back. Does not know queues or steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import PoolExhausted, PromptTooLong
from core.scopes import PUBLIC_SCOPE, split_scope, tenant_of
from core.types import GenerateRequest
from engine.scheduling.block_origins import BlockOrigins
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine may do at once."""

    block_size_tokens: int
    max_step_tokens: int
    max_sequences: int
    max_model_len: int
    is_prefix_cache_on: bool = True


class BlockTables:
    """Arithmetic and book-keeping over one pool."""

    def __init__(
        self, pool: BlockPool, limits: Limits, origins: BlockOrigins | None = None
    ) -> None:
        """Keep the pool; `origins` notes what tiers below it have to know of its blocks."""
        self._pool = pool
        self._origins = origins
        self._limits = limits

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self._limits.block_size_tokens)

    def check_fits(self, request: GenerateRequest) -> None:
        """Refuse what can never be served here.

        Raises:
            PromptTooLong: States the numbers; nothing was changed.
        """
        total = request.max_total_tokens
        if total > self._limits.max_model_len:
            raise PromptTooLong(
                f"prompt of {len(request.token_ids)} tokens plus max_tokens "
                f"{request.sampling.max_tokens} is {total}, the context window is "
                f"{self._limits.max_model_len}; shorten one of them"
            )
        # Every choice could own all its blocks, plus one for growth while the prompt is shared.
        needed = self.blocks_for(total) + request.sampling.n
        if needed > self._pool.num_blocks:
            raise PromptTooLong(
                f"prompt plus max_tokens is {total} tokens and needs {needed} blocks, the pool "
                f"holds {self._pool.num_blocks}; lower max_tokens or raise engine.num_blocks"
            )

    def may_hit(self, sequence: Sequence) -> bool:
        """False for a prompt that is computed whole, whatever is cached."""
        return self._limits.is_prefix_cache_on and not sequence.needs_prompt_scores

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the longest known prefix; the last token is always left to compute."""
        hits: list[int] = []
        if not self.may_hit(sequence):
            return hits
        parent = self._pool.root(_first_scope(sequence))
        for index in range((sequence.num_tokens - 1) // self._limits.block_size_tokens):
            if index and index == sequence.naming.num_public_blocks:
                parent = self._pool.root(_scope_after(sequence, parent))
            block_id = self._pool.find(
                parent, sequence.full_block_hash(index), sequence.block_tokens(index)
            )
            if block_id is None:
                break
            hits.append(block_id)
            parent = self._pool.identity(block_id)
        return hits

    def allocate(self, sequence: Sequence, hits: list[int], num_new: int, num_spare: int) -> None:
        """Give a sequence its table: `hits` shared, `num_new` fresh, and spare blocks to grow into.

        Raises:
            PoolExhausted: Not enough blocks; nothing was changed.
        """
        # Shared before anything is allocated, which might evict them.
        for block_id in hits:
            self._pool.share(block_id)
        try:
            fresh = self._pool.allocate(num_new + num_spare)
        except PoolExhausted:
            self._pool.free(hits)
            raise
        sequence.block_table = [*hits, *fresh[:num_new]]
        sequence.spare_blocks = fresh[num_new:]
        # Renewed with each use, so that the roots of busy scopes are not forgotten.
        sequence.parents = [self._pool.remember_root(_first_scope(sequence))]
        for block_id in hits:
            self._add_parent(sequence, sequence.parents, self._pool.identity(block_id))
            if self._origins is not None:
                self._origins.use(block_id, sequence)

    def _add_parent(self, sequence: Sequence, parents: list[int], identity: int) -> None:
        """Note what comes before the next block: after the last public one its scope's own root."""
        if len(parents) == sequence.naming.num_public_blocks:
            identity = self._pool.remember_root(_scope_after(sequence, identity))
        parents.append(identity)

    def register_loaded(self, sequence: Sequence, hits: list[int], block_ids: list[int]) -> None:
        """Give held blocks their identities: those behind `hits`, of a sequence anywhere."""
        parents = [self._pool.remember_root(_first_scope(sequence))]
        for block_id in hits:
            self._add_parent(sequence, parents, self._pool.identity(block_id))
        for index, block_id in enumerate(block_ids, len(hits)):
            self._add_parent(sequence, parents, self._register(sequence, index, block_id, parents))

    def _register(self, sequence: Sequence, index: int, block_id: int, parents: list[int]) -> int:
        identity = self._pool.register(
            block_id,
            parents[index],
            sequence.full_block_hash(index),
            sequence.block_tokens(index),
        )
        # A second copy of what another block is stays anonymous: nobody will look for it.
        if self._origins is not None and self._pool.identity(block_id) == identity:
            self._origins.note(block_id, sequence, index)
        return identity

    def pin(self, sequence: Sequence) -> list[int]:
        """Take a reference of a transfer's own on a sequence's blocks; `unpin` drops it."""
        blocks = [*sequence.block_table, *sequence.spare_blocks]
        for block_id in blocks:
            self._pool.share(block_id)
        return blocks

    def unpin(self, blocks: list[int]) -> None:
        """The transfer neither reads nor writes these blocks any more."""
        self._pool.free(blocks)

    def free(self, sequence: Sequence) -> None:
        """Drop a sequence's own references."""
        request = sequence.request
        keeper = tenant_of(request.scope) if request.keeps_prefix else None
        self._pool.free([*sequence.block_table, *sequence.spare_blocks], keeper)
        sequence.block_table = []
        sequence.spare_blocks = []
        sequence.parents = []

    def register(self, sequence: Sequence) -> None:
        """Give identities to the full, computed blocks that have none yet."""
        if not self._limits.is_prefix_cache_on:
            return
        num_full = sequence.num_computed_tokens // self._limits.block_size_tokens
        # There is one parent more than registered blocks: the root.
        for index in range(len(sequence.parents) - 1, num_full):
            block_id = sequence.block_table[index]
            identity = self._register(sequence, index, block_id, sequence.parents)
            self._add_parent(sequence, sequence.parents, identity)


def _first_scope(sequence: Sequence) -> str:
    """Name the root of a sequence's first block in its pool."""
    if sequence.naming.num_public_blocks:
        return PUBLIC_SCOPE
    return split_scope(sequence.request.scope)[1]


def _scope_after(sequence: Sequence, identity: int) -> str:
    """Name the root of the first block after public ones: by exactly them, and by its own scope.

    The number of the last public block stands for all of them, as a parent's does; no scope of a
    request looks like this.
    """
    own = split_scope(sequence.request.scope)[1]
    return f"{PUBLIC_SCOPE}after {identity}{PUBLIC_SCOPE}{own}"
