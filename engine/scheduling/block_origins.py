"""What storage tiers below the pool have to know of its blocks: what they come after, their worth.

Owns, for each block, the digest of its parent, its place in a prompt, how often it was used and for
whom, and whether its keeping was decided. Does not know who holds a block, or tiers.

Integer arrays again, 50 bytes a block: a pool without tiers below it has none of this.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping

from core.stored_block import CHAIN_BYTES, ChainDigest, chain_digests, root_chain
from engine.scheduling.sequence import Sequence

MAX_USES = 65_535


class BlockOrigins:
    """Of the blocks of one pool; of one that is not registered, they mean nothing."""

    def __init__(
        self,
        num_blocks: int,
        content_digest: str,
        hash_key: bytes = b"",
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Start with nothing known.

        Args:
            num_blocks: Of the pool.
            content_digest: `KVLayout.content_digest`.
            hash_key: The cluster's, as in `root_hash`.
            weights: Of classes of tenants (`GenerateRequest.tier`); 1 unless given.
        """
        self._content_digest = content_digest
        self._hash_key = hash_key
        self._weights = dict(weights or {})
        self._parents = bytearray(num_blocks * CHAIN_BYTES)
        self._depths = array("i", [0]) * num_blocks
        self._chain_blocks = array("i", [0]) * num_blocks
        self._uses = array("H", [0]) * num_blocks
        self._block_weights = array("f", [0.0]) * num_blocks
        self._is_decided = bytearray(num_blocks)

    def weight_of(self, sequence: Sequence) -> float:
        """What the class of a sequence's tenant counts."""
        return self._weights.get(sequence.request.tier, 1.0)

    def chain(self, sequence: Sequence, num_blocks: int) -> list[ChainDigest]:
        """Digests of a sequence's leading blocks, that of its root first; each is made once."""
        chain = sequence.chain
        if not chain:
            scope = sequence.request.scope
            chain.append(root_chain(self._content_digest, scope, self._hash_key))
        if len(chain) <= num_blocks:
            size = sequence.block_size_tokens
            fresh = sequence.token_ids[(len(chain) - 1) * size : num_blocks * size]
            chain += chain_digests(chain[-1], fresh, size)
        return chain

    def note(self, block_id: int, sequence: Sequence, index: int) -> None:
        """A block is block `index` of a sequence, and can be found from now on."""
        start = block_id * CHAIN_BYTES
        self._parents[start : start + CHAIN_BYTES] = self.chain(sequence, index)[index]
        self._depths[block_id] = index
        self._chain_blocks[block_id] = 0
        self._uses[block_id] = 0
        self._block_weights[block_id] = 0.0
        self.use(block_id, sequence)

    def use(self, block_id: int, sequence: Sequence) -> None:
        """A sequence has the block; whether it is worth keeping is open again."""
        num_blocks = sequence.num_tokens // sequence.block_size_tokens
        self._chain_blocks[block_id] = max(self._chain_blocks[block_id], num_blocks)
        self._uses[block_id] = min(self._uses[block_id] + 1, MAX_USES)
        weight = max(self._block_weights[block_id], self.weight_of(sequence))
        self._block_weights[block_id] = weight
        self._is_decided[block_id] = False

    def undecided(self, block_ids: Iterable[int]) -> list[int]:
        """Leave out the blocks whose keeping was decided since they were used last."""
        return [block_id for block_id in block_ids if not self._is_decided[block_id]]

    def decide(self, block_id: int) -> None:
        """Note that it is decided now whether to keep the block."""
        self._is_decided[block_id] = True

    def parent(self, block_id: int) -> ChainDigest:
        """Digest of what comes before the block."""
        start = block_id * CHAIN_BYTES
        return ChainDigest(bytes(self._parents[start : start + CHAIN_BYTES]))

    def depth(self, block_id: int) -> int:
        """Blocks before it."""
        return self._depths[block_id]

    def num_chain_blocks(self, block_id: int) -> int:
        """Full blocks of the longest sequence that had it, as it began."""
        return self._chain_blocks[block_id]

    def num_uses(self, block_id: int) -> int:
        """Sequences that had it."""
        return self._uses[block_id]

    def weight(self, block_id: int) -> float:
        """Highest weight among the classes of their tenants."""
        return self._block_weights[block_id]
