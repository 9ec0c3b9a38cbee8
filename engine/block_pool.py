"""Block ids of one worker's KV pool: allocate, share, free, evict.

Owns which block is free, cached (hashed, unreferenced, evictable) or held (referenced), and each
block's generation. Does not know tensors or sequences. Called by `engine.scheduler` only, from the
worker's event loop only.

    allocate            free               free (hashed)          evict on allocate
    free ──────▶ held ────────▶ free   held ────────────▶ cached ──────────────────▶ held
                  ▲                                          │
                  └───────────────── share ──────────────────┘

Source: PagedAttention, arXiv:2309.06180; chained block hashes as in vLLM.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

from core.block_hash import BlockHash
from core.errors import InvariantViolation, PoolExhausted


class BlockPool:
    """Books of one pool. free + cached + held = total, always."""

    def __init__(self, num_blocks: int) -> None:
        """Start with every block free, generation 0."""
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._generations = [0] * num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._identity: dict[int, tuple[BlockHash, tuple[int, ...]]] = {}
        self._block_by_hash: dict[BlockHash, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks with no content worth keeping."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Unreferenced blocks kept for a prefix hit."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._cached)

    def generation(self, block_id: int) -> int:
        """How often the block has been handed out; fences writes meant for an earlier owner."""
        return self._generations[block_id]

    def references(self, block_id: int) -> int:
        """Current number of references."""
        return self._references[block_id]

    def allocate(self, num_blocks: int) -> list[int]:
        """Hand out blocks with one reference each; evicts the least recently used cached ones.

        Raises:
            PoolExhausted: Fewer are available; nothing was changed.
        """
        if num_blocks > self.num_available:
            raise PoolExhausted(
                f"needed {num_blocks} blocks, {self.num_available} of {self.num_blocks} are available; "
                "lower max_tokens or raise engine.num_blocks"
            )
        return [self._take_one() for _ in range(num_blocks)]

    def _take_one(self) -> int:
        if self._free:
            block_id = self._free.popleft()
        else:
            block_id, _ = self._cached.popitem(last=False)
            self._forget(block_id)
        self._references[block_id] = 1
        self._generations[block_id] += 1
        return block_id

    def _forget(self, block_id: int) -> None:
        block_hash, _ = self._identity.pop(block_id)
        del self._block_by_hash[block_hash]

    def share(self, block_id: int) -> None:
        """Take one more reference; a cached block becomes held."""
        if self._references[block_id] == 0:
            if block_id not in self._cached:
                raise InvariantViolation(f"block {block_id} is free and cannot be shared")
            del self._cached[block_id]
        self._references[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Drop one reference each. Later blocks are evicted first: a prefix outlives its tails."""
        for block_id in reversed(list(block_ids)):
            if self._references[block_id] <= 0:
                raise InvariantViolation(f"block {block_id} was freed more often than referenced")
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                if block_id in self._identity:
                    self._cached[block_id] = None
                else:
                    self._free.append(block_id)

    def register(self, block_id: int, block_hash: BlockHash, token_ids: Sequence[int]) -> None:
        """Give a held, fully computed block its identity; a second copy of a known one stays anonymous."""
        if self._references[block_id] <= 0:
            raise InvariantViolation(f"block {block_id} is not held and cannot be registered")
        if block_hash not in self._block_by_hash and block_id not in self._identity:
            self._identity[block_id] = (block_hash, tuple(token_ids))
            self._block_by_hash[block_hash] = block_id

    def find(self, block_hash: BlockHash, token_ids: Sequence[int]) -> int | None:
        """Find the block with this hash; the tokens are compared too, so a collision is a miss."""
        block_id = self._block_by_hash.get(block_hash)
        if block_id is None or self._identity[block_id][1] != tuple(token_ids):
            return None
        return block_id

    def drop_cache(self) -> None:
        """Forget every identity, after the pool's memory was lost."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._identity.clear()
        self._block_by_hash.clear()

    def check(self) -> None:
        """Compare the books.

        Raises:
            InvariantViolation: They do not balance; the message carries the counts.
        """
        free, cached = set(self._free), set(self._cached)
        held = {b for b in range(self.num_blocks) if self._references[b] > 0}
        whole = (
            len(free) == len(self._free) and len(free) + len(cached) + len(held) == self.num_blocks
        )
        if (
            not whole
            or free & cached
            or free & held
            or cached & held
            or not cached <= set(self._identity)
        ):
            raise InvariantViolation(
                f"pool of {self.num_blocks}: {len(self._free)} free, {len(cached)} cached, {len(held)} held do not add up"
            )
