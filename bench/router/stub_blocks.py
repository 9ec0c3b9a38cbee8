"""Which prompts a stub worker would have cached: names of blocks, without blocks.

Owns a ring of names, the oldest of which goes when a new one comes, and the log of changes that the
prefix index publishes. Does not know sessions or Redis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.block_hash import BlockHash, BlockNaming
from engine.scheduling.block_changes import BlockChanges

NO_BLOCK = BlockHash(b"")


class StubBlocks:
    """The cache of one stub worker."""

    def __init__(
        self, num_blocks: int, block_size_tokens: int, naming_of: Callable[[str], BlockNaming]
    ) -> None:
        """Start empty; `naming_of(scope)` names a tenant's blocks."""
        self.changes = BlockChanges()
        self.num_blocks = num_blocks
        self._block_size_tokens = block_size_tokens
        self._naming_of = naming_of
        self._slots = [NO_BLOCK] * num_blocks
        self._held: set[BlockHash] = set()
        self._next = 0

    def __len__(self) -> int:
        return len(self._held)

    def take(self, scope: str, token_ids: Sequence[int]) -> int:
        """Cache a prompt; returns how many of its leading tokens were cached before."""
        names: list[BlockHash] = []
        self._naming_of(scope).extend(names, token_ids, self._block_size_tokens)
        num_cached = next((i for i, name in enumerate(names) if name not in self._held), len(names))
        for name in names[num_cached:]:
            if name not in self._held:
                self._store(name)
        # As in a worker: the last token of a prompt is always computed.
        return min(num_cached * self._block_size_tokens, len(token_ids) - 1)

    def read(self, slots: range) -> list[BlockHash]:
        """Return the names in some slots, for a publisher that begins anew."""
        return [name for name in self._slots[slots.start : slots.stop] if name]

    def _store(self, name: BlockHash) -> None:
        oldest = self._slots[self._next]
        if oldest:
            self._held.discard(oldest)
            self.changes.evicted(oldest)
        self._slots[self._next] = name
        self._next = (self._next + 1) % self.num_blocks
        self._held.add(name)
        self.changes.stored(name)
