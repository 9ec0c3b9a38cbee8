"""Name of a full KV block: a chained, keyed hash over everything its content depends on.

Owns the hash and the derivation of its key. Does not know pools or tensors. Workers of one cluster
give one content one name; without the key nobody can work out names, or make two contents share
one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NewType

BlockHash = NewType("BlockHash", bytes)
DIGEST_BYTES = 16


def hash_key(cluster_key: str) -> bytes:
    """Derive the key of block names from the secret that all workers of a cluster share."""
    secret = cluster_key.encode()
    return hashlib.blake2b(secret, digest_size=32, person=b"baton.kv.blocks").digest()


def root_hash(content_digest: str, scope: str, key: bytes = b"") -> BlockHash:
    """Start a chain: the parent of a sequence's first block.

    Args:
        content_digest: `KVLayout.content_digest`; other models never share blocks.
        scope: Tenant scope, derived by the server from the credential; tenants never share.
        key: From `hash_key`; empty: names that anybody can work out, for tests and simulation.
    """
    # A digest has no NUL, so two pairs never make one text.
    text = f"{content_digest}\x00{scope}".encode()
    return BlockHash(hashlib.blake2b(text, key=key, digest_size=DIGEST_BYTES).digest())


def block_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash one full block after its parent.

    Source: chained block hashes after PagedAttention, arXiv:2309.06180; keyed after
    GHSA-rm76-4mrf-v9r8 (predictable prefix hashes).
    """
    # Only the root is keyed: through the parents no name can be worked out without it.
    payload = parent + struct.pack(f"<{len(token_ids)}i", *token_ids)
    return BlockHash(hashlib.blake2b(payload, digest_size=DIGEST_BYTES).digest())
