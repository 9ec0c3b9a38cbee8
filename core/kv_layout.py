"""What a block of KV looks like in bytes, and the fingerprint two workers compare.

Owns the arithmetic of the pool: layer-major, `[layer][block][2 (K, V)][slot][kv_head][head_size]`.
Does not know tensors.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

LAYOUT_VERSION = 2
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of one worker's KV pool, split over its ranks by KV heads.

    With more shards than heads, several shards hold the same head: `num_copies` of each.
    """

    model_digest: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size_tokens: int
    num_shards: int = 1
    tokenizer_digest: str = ""

    @property
    def heads_per_shard(self) -> int:
        """KV heads that one shard holds."""
        return max(1, self.num_kv_heads // self.num_shards)

    @property
    def num_distinct_shards(self) -> int:
        """Shards that hold different heads; the others are copies."""
        return min(self.num_shards, self.num_kv_heads)

    @property
    def num_copies(self) -> int:
        """Shards that hold the same heads; they are neighbours."""
        return self.num_shards // self.num_distinct_shards

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's K and V in one layer of one shard."""
        return 2 * self.heads_per_shard * self.head_size * DTYPE_BYTES[self.dtype]

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one block in one layer of one shard."""
        return self.block_size_tokens * self.slot_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers and shards, copies included."""
        return self.layer_block_bytes * self.num_layers * self.num_shards

    def pool_bytes(self, num_blocks: int) -> int:
        """Bytes of a pool of `num_blocks` in one shard."""
        return self.layer_block_bytes * self.num_layers * num_blocks

    def offset_bytes(self, layer: int, block_id: int, num_blocks: int) -> int:
        """Where a block of a layer begins in the pool of one shard."""
        # Layers outside: one that is finished can leave while the next is computed.
        return (layer * num_blocks + block_id) * self.layer_block_bytes

    @property
    def identity(self) -> str:
        """What must be equal on both sides of a transfer, as `name=value` words."""
        # Not block size and shards: those are negotiated, and KV is reshaped on its way.
        words = {
            "protocol": LAYOUT_VERSION,
            "model": self.model_digest,
            "tokenizer": self.tokenizer_digest or "none",
            "dtype": self.dtype,
            "layers": self.num_layers,
            "kv_heads": self.num_kv_heads,
            "head_size": self.head_size,
        }
        return " ".join(f"{name}={value}" for name, value in words.items())

    @property
    def content_digest(self) -> str:
        """Fingerprint of `identity`: what routers compare."""
        return hashlib.blake2b(self.identity.encode(), digest_size=8).hexdigest()

    def differences(self, identity: str) -> list[str]:
        """Name what a peer has otherwise; empty if nothing."""
        mine, theirs = (
            dict(word.partition("=")[::2] for word in text.split())
            for text in (self.identity, identity)
        )
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return [
            f"{name} is {mine.get(name, 'unknown')} here and {theirs.get(name, 'unknown')} there"
            for name in names
        ]

    @property
    def shape(self) -> tuple[int, int]:
        """What is negotiated: (shards, tokens per block)."""
        return self.num_shards, self.block_size_tokens

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size_tokens)
