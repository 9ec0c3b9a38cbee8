"""Name of a full KV block: a chained, keyed hash over everything its content depends on.

Owns the hash and the derivation of its key; `docs/prefix-index.md` has the bytes and test vectors.
Does not know pools or tensors. Workers of one cluster give one content one name; without the key
nobody can work out names, or make two contents share one.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType, cast

from core.scopes import PUBLIC_SCOPE, split_scope

BlockHash = NewType("BlockHash", bytes)
DIGEST_BYTES = 16
NAMING_VERSION = 1
"""Raised when names are made otherwise, or mean something else."""
_TOKEN_BYTES = 4


def hash_key(cluster_key: str) -> bytes:
    """Derive the key of block names from the secret that all workers of a cluster share."""
    secret = cluster_key.encode()
    return hashlib.blake2b(secret, digest_size=32, person=b"baton.kv.blocks").digest()


def root_hash(content_digest: str, scope: str, key: bytes = b"", adapter: str = "") -> BlockHash:
    """Start a chain: the parent of a sequence's first block.

    Args:
        content_digest: `KVLayout.content_digest`; other models never share blocks.
        scope: Tenant scope, derived by the server from the credential; tenants never share.
        key: From `hash_key`; empty: names that anybody can work out, for tests and simulation.
        adapter: Of the model's weights, by a name that changes with its content; empty: none.
    """
    return BlockHash(hash_root(content_digest, scope, key, adapter, DIGEST_BYTES))


def hash_root(content_digest: str, scope: str, key: bytes, adapter: str, num_bytes: int) -> bytes:
    """Hash what all blocks of a chain depend on, to so many bytes; arguments as `root_hash`."""
    hashed = hashlib.blake2b(key=key, digest_size=num_bytes)
    hashed.update(NAMING_VERSION.to_bytes(4, "little"))
    for text in (content_digest, adapter, scope):  # each after its length: no two lists look alike
        field = text.encode()
        hashed.update(len(field).to_bytes(4, "little") + field)
    return hashed.digest()


def branch_hash(block: BlockHash, root: BlockHash) -> BlockHash:
    """Name what comes before a tenant's first block after public ones: the last of them, branched.

    Args:
        block: The last public one.
        root: Of the tenant's scope.
    """
    person = b"baton.kv.branch"
    hashed = hashlib.blake2b(block + root, digest_size=DIGEST_BYTES, person=person)
    return BlockHash(hashed.digest())


@dataclass(frozen=True, slots=True)
class BlockNaming:
    """Where the names of a prompt's blocks begin, and where its scope does."""

    root: BlockHash
    """Of the request's own scope."""
    num_public_blocks: int = 0
    """Leading blocks that any tenant may have computed."""
    public_root: BlockHash = BlockHash(b"")

    def extend(
        self, hashes: list[BlockHash], token_ids: Sequence[int], block_size_tokens: int
    ) -> None:
        """Append the names of the full blocks of some tokens, which follow those named already."""
        num_public = min(self.num_public_blocks - len(hashes), len(token_ids) // block_size_tokens)
        if num_public > 0:
            end = num_public * block_size_tokens
            parent = hashes[-1] if hashes else self.public_root
            hashes += block_hashes(parent, token_ids[:end], block_size_tokens)
            token_ids = token_ids[end:]
        if not hashes:
            parent = self.root
        elif len(hashes) == self.num_public_blocks:
            parent = branch_hash(hashes[-1], self.root)
        else:
            parent = hashes[-1]
        hashes += block_hashes(parent, token_ids, block_size_tokens)


def naming_of(
    content_digest: str, scope: str, block_size_tokens: int, key: bytes = b""
) -> BlockNaming:
    """Begin the chain of a request.

    Args:
        content_digest: `KVLayout.content_digest`.
        scope: Of the request, as `core.scopes` makes it.
        block_size_tokens: Of the pool; a block that is public in part is not public.
        key: From `hash_key`.
    """
    num_tokens, own = split_scope(scope)
    root = root_hash(content_digest, own, key)
    num_blocks = num_tokens // block_size_tokens
    if not num_blocks:
        return BlockNaming(root)
    return BlockNaming(root, num_blocks, root_hash(content_digest, PUBLIC_SCOPE, key))


def block_hashes(
    parent: BlockHash, token_ids: Sequence[int], block_size_tokens: int
) -> list[BlockHash]:
    """Hash the full blocks of some tokens, each after the one before it, in one pass.

    Args:
        parent: What comes before the first of them: a root, or a block.
        token_ids: Those of an unfinished last block are left out.
        block_size_tokens: Tokens of a block.

    Source: chained block hashes after PagedAttention, arXiv:2309.06180; keyed after
    GHSA-rm76-4mrf-v9r8 (predictable prefix hashes).
    """
    return cast("list[BlockHash]", hash_chain(parent, token_ids, block_size_tokens, DIGEST_BYTES))


def hash_chain(
    parent: bytes, token_ids: Sequence[int], block_size_tokens: int, digest_bytes: int
) -> list[bytes]:
    """Hash the full blocks of some tokens to so many bytes each; arguments as `block_hashes`."""
    packed = pack_tokens(token_ids)
    block_bytes = block_size_tokens * _TOKEN_BYTES
    blake2b = hashlib.blake2b
    hashes = []
    for start in range(0, len(packed) - block_bytes + 1, block_bytes):
        payload = parent + packed[start : start + block_bytes]
        parent = blake2b(payload, digest_size=digest_bytes).digest()
        hashes.append(parent)
    return hashes


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Write token ids as they are hashed and stored: 32 bits each, little-endian."""
    tokens = array("i", token_ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tobytes()


def block_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash one full block after its parent."""
    return block_hashes(parent, token_ids, len(token_ids))[0]
