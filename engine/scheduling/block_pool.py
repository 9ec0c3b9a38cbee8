"""Block ids of one worker's KV pool: allocate, share, free, evict.

Owns which block is free, cached (registered, unreferenced, evictable) or held (referenced), and
each block's generation. Does not know tensors or sequences.

    allocate            free               free (registered)      evict on allocate
    free ──────▶ held ────────▶ free   held ────────────▶ cached ──────────────────▶ held
                  ▲                                          │
                  └───────────────── share ──────────────────┘

Of the cached blocks those that are kept for somebody (`KeptBlocks`) are evicted last.

All books are integer arrays, so that a pool of a million blocks costs what its numbers take and
every operation is constant in the pool's size; dropping the cache too, but for clearing a table.

Source: PagedAttention, arXiv:2309.06180; chained block hashes as in vLLM; ADR 12.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from core.block_hash import BlockHash
from core.errors import InvariantViolation, PoolExhausted
from engine.scheduling.block_changes import BlockChanges
from engine.scheduling.block_identities import BlockIdentities
from engine.scheduling.block_lists import BlockLists
from engine.scheduling.kept_blocks import KeptBlocks


class BlockPool:
    """Books of one pool. free + cached + held = total, always."""

    def __init__(self, num_blocks: int, changes: BlockChanges | None = None) -> None:
        """Start with every block free, generation 0; `changes` notes what can be found."""
        self.num_blocks = num_blocks
        self._changes = changes
        self._references = array("i", [0]) * num_blocks
        self._generations = array("q", [0]) * num_blocks
        self._identities = BlockIdentities(num_blocks)
        self._lists = BlockLists(num_blocks, num_lists=2)
        self._free = num_blocks
        self._cached = num_blocks + 1
        self._lists.extend(self._free, range(num_blocks))
        self._num_free = num_blocks
        self._num_cached = 0
        """In the order of use alone; kept ones are beside them."""
        self._kept = KeptBlocks(num_blocks)
        self.num_drops = 0
        """How often the whole cache was dropped: what was read for an earlier one is void."""

    @property
    def num_free(self) -> int:
        """Blocks with no content worth keeping."""
        return self._num_free

    @property
    def num_cached(self) -> int:
        """Unreferenced blocks with content for a prefix hit."""
        return self._num_cached + self._kept.num_kept

    @property
    def num_held(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - self.num_available

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could grant now."""
        return self._num_free + self.num_cached

    def generation(self, block_id: int) -> int:
        """How often the block has been allocated; fences writes meant for an earlier owner."""
        return self._generations[block_id]

    def references(self, block_id: int) -> int:
        """Current number of references."""
        return self._references[block_id]

    # --- references ---------------------------------------------------------------------------

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks with one reference each; evicts the least recently used cached ones.

        Raises:
            PoolExhausted: Fewer are available; nothing was changed.
        """
        if num_blocks > self.num_available:
            raise PoolExhausted(
                f"needed {num_blocks} blocks, {self.num_available} of {self.num_blocks} are "
                "available; lower max_tokens or raise engine.num_blocks"
            )
        # Free ones first: every block that is evicted may have been the next prefix hit.
        num_from_free = min(num_blocks, self._num_free)
        block_ids = self._lists.take(self._free, num_from_free)
        self._num_free -= num_from_free
        if num_from_free < num_blocks:
            block_ids += self._evict(num_blocks - num_from_free)
        references = self._references
        generations = self._generations
        for block_id in block_ids:
            references[block_id] = 1
            generations[block_id] += 1
        return block_ids

    def _evict(self, num_blocks: int) -> list[int]:
        num_plain = min(num_blocks, self._num_cached)
        block_ids = self._lists.take(self._cached, num_plain)
        self._num_cached -= num_plain
        block_ids += self._kept.take(num_blocks - num_plain)
        for block_id in block_ids:
            block_hash = self._identities.hash_of(block_id)
            self._identities.forget(block_id)
            # Its like may be here a second time: computed anew after the block before it had gone.
            if self._changes is not None and not self._identities.is_known(block_hash):
                self._changes.evicted(block_hash)
        return block_ids

    def share(self, block_id: int) -> None:
        """Take one more reference; a cached block becomes held."""
        if self._references[block_id] == 0:
            if not self._identities.of(block_id):
                raise InvariantViolation(f"block {block_id} is free and cannot be shared")
            if self._kept.is_marked(block_id):
                self._kept.remove(block_id)
            else:
                self._lists.remove(block_id)
                self._num_cached -= 1
        self._references[block_id] += 1

    def free(self, block_ids: Iterable[int], keeper: str | None = None) -> None:
        """Drop one reference each. Later blocks are evicted first: a prefix outlives its tails.

        Args:
            block_ids: In the order of their content.
            keeper: For whom those with an identity are kept, as far as the share goes.

        Raises:
            InvariantViolation: A block has no reference left; those after it were freed.
        """
        references = self._references
        identity_of = self._identities.of
        freed: list[int] = []
        cached: list[int] = []
        kept: list[int] = []
        marks = self._kept
        try:
            for block_id in reversed(list(block_ids)):
                num_references = references[block_id] - 1
                if num_references < 0:
                    raise InvariantViolation(
                        f"block {block_id} was freed more often than referenced"
                    )
                references[block_id] = num_references
                is_found = bool(identity_of(block_id))
                # Marked even if others use it still: the last of them may keep nothing.
                if keeper is not None and is_found:
                    marks.mark(block_id, keeper)
                if num_references == 0 and is_found:
                    (kept if marks.is_marked(block_id) else cached).append(block_id)
                elif num_references == 0:
                    marks.unmark(block_id)
                    freed.append(block_id)
        # After an error too: what was dropped so far must stand in one of the lists.
        finally:
            self._lists.extend(self._free, freed)
            cached += marks.add(kept)
            self._lists.extend(self._cached, cached)
            self._num_free += len(freed)
            self._num_cached += len(cached)

    # --- identities ---------------------------------------------------------------------------

    def root(self, scope: str) -> int:
        """Identity that first blocks of a scope have as their parent; `NO_IDENTITY` if unknown."""
        return self._identities.root(scope)

    def remember_root(self, scope: str) -> int:
        """Make or renew the identity that first blocks of a scope have as their parent."""
        return self._identities.remember_root(scope)

    def identity(self, block_id: int) -> int:
        """Number of what a block is, given once and never again; `NO_IDENTITY` if anonymous."""
        return self._identities.of(block_id)

    def block_hash(self, block_id: int) -> BlockHash | None:
        """Hash of a registered block, the same in every worker of the cluster."""
        return self._identities.block_hash(block_id)

    def register(
        self, block_id: int, parent: int, block_hash: BlockHash, token_ids: Sequence[int]
    ) -> int:
        """Give a held, fully computed block its identity; a second copy stays anonymous.

        Args:
            block_id: Keeps the identity that it has already.
            parent: Identity of the block before it, or of the root.
            block_hash: Chained over everything before it too.
            token_ids: The block's own tokens; as many in each block of a pool.

        Returns:
            The identity of this content: the parent of what follows it.
        """
        if self._references[block_id] <= 0:
            raise InvariantViolation(f"block {block_id} is not held and cannot be registered")
        num_registered = self._identities.num_registered
        identity = self._identities.register(block_id, parent, block_hash, token_ids)
        if self._changes is not None and self._identities.num_registered > num_registered:
            self._changes.stored(block_hash)
        return identity

    def content(self, block_id: int) -> tuple[BlockHash, bytes]:
        """Hash and own tokens (32 bits each) of a registered block."""
        return self._identities.hash_of(block_id), self._identities.tokens_of(block_id)

    def evicted_next(self, num_blocks: int) -> list[int]:
        """Cached blocks that `allocate` would evict first, at most so many."""
        block_ids = self._lists.first(self._cached, num_blocks)
        # Kept ones go last, and go all the same once there are no others.
        return block_ids + self._kept.first(num_blocks - len(block_ids))

    def registered(self, block_ids: range) -> list[BlockHash]:
        """Return the hashes of those blocks that can be found."""
        hashes = map(self._identities.block_hash, block_ids)
        return [block_hash for block_hash in hashes if block_hash is not None]

    def find(self, parent: int, block_hash: BlockHash, token_ids: Sequence[int]) -> int | None:
        """Find the block that is these tokens after this parent, exactly; the hash only leads."""
        return self._identities.find(parent, block_hash, token_ids)

    def drop_cache(self) -> None:
        """Forget every identity, after the pool's memory was lost."""
        kept = self._kept.take(self._kept.num_kept)
        self._lists.extend(self._cached, kept)
        self._num_cached += len(kept)
        self._lists.splice(self._cached, self._free)
        self._num_free += self._num_cached
        self._num_cached = 0
        self.num_drops += 1
        self._identities.forget_all()
        if self._changes is not None:
            self._changes.dropped()

    # --- proof --------------------------------------------------------------------------------

    def check(self) -> None:
        """Compare the books.

        Raises:
            InvariantViolation: They do not balance; the message carries the counts.
        """
        free = self._lists.members(self._free)
        cached = self._lists.members(self._cached)
        is_plain_right = len(cached) == self._num_cached
        cached += self._kept.check()
        num_unreferenced = self._references.count(0)
        is_balanced = (
            len(free) == self._num_free
            and is_plain_right
            and len(free) + len(cached) == num_unreferenced
            and not any(map(self._references.__getitem__, (*free, *cached)))
            and self._identities.num_known(free) == 0
            and self._identities.num_known(cached) == len(cached)
        )
        if not is_balanced:
            raise InvariantViolation(
                f"pool of {self.num_blocks}: {len(free)} of {self._num_free} free, {len(cached)} "
                f"of {self.num_cached} cached, {num_unreferenced} unreferenced do not add up"
            )
        self._identities.check()
