"""What a block of KV looks like in bytes, and the fingerprint two workers compare.

Owns the arithmetic of the pool: layer-major, `[layer][block][2 (K, V)][slot][kv_head][head_size]`.
Does not know tensors. Called by `engine` (to make the pool) and `kv_transfer` (to address it).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

LAYOUT_VERSION = 1
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of one worker's KV pool. Heads are those of one shard."""

    model_digest: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size_tokens: int
    num_shards: int = 1

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's K and V in one layer of one shard."""
        return 2 * self.num_kv_heads * self.head_size * DTYPE_BYTES[self.dtype]

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one block in one layer of one shard: the smallest unit that is moved."""
        return self.block_size_tokens * self.slot_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers and shards."""
        return self.layer_block_bytes * self.num_layers * self.num_shards

    def pool_bytes(self, num_blocks: int) -> int:
        """Bytes of a pool of `num_blocks` in one shard."""
        return self.layer_block_bytes * self.num_layers * num_blocks

    def offset_bytes(self, layer: int, block_id: int, num_blocks: int) -> int:
        """Where a block of a layer begins in the pool of one shard."""
        return (layer * num_blocks + block_id) * self.layer_block_bytes

    @property
    def content_digest(self) -> str:
        """Equal on both sides of a transfer, or the pair is refused."""
        parts = (LAYOUT_VERSION, self.model_digest, self.dtype, self.num_layers, self.num_kv_heads, self.head_size)
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    @property
    def shape(self) -> tuple[int, int]:
        """What is negotiated: (shards, tokens per block)."""
        return self.num_shards, self.block_size_tokens

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size_tokens)
