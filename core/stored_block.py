"""What a block of KV is while it lies outside a pool, and why its bytes could not be kept or read.

Owns the identity that outlives a pool and a process. Does not know where blocks lie.

In a pool a serial number stands for all that came before a block (ADR 12). Serial numbers end with
the pool, so outside it a digest of 32 bytes stands for the parent: too long to be met by chance or
on purpose, unlike a name, which only leads to a block. What is compared is the parent's digest and
the block's own tokens, whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType, cast

from core.block_hash import BlockHash, hash_chain, hash_root

CHAIN_BYTES = 32
ChainDigest = NewType("ChainDigest", bytes)
"""Stands for a block and everything before it."""


def root_chain(content_digest: str, scope: str, key: bytes = b"") -> ChainDigest:
    """Digest before the first block of a scope; arguments as `root_hash`."""
    return ChainDigest(hash_root(content_digest, scope, key, "", CHAIN_BYTES))


def chain_digests(
    parent: ChainDigest, token_ids: Sequence[int], block_size_tokens: int
) -> list[ChainDigest]:
    """Digest the full blocks of some tokens, each after the one before it."""
    return cast("list[ChainDigest]", hash_chain(parent, token_ids, block_size_tokens, CHAIN_BYTES))


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A full block, wherever it lies: its own tokens after its parent."""

    parent: ChainDigest
    tokens: bytes
    """As `core.block_hash.pack_tokens` writes them."""
    name: BlockHash
    """In the prefix index; a hint."""
    depth: int
    """Blocks before it."""
    digest: ChainDigest = field(init=False)

    def __post_init__(self) -> None:
        """Work out the digest: it cannot say anything else than the record does."""
        digest = hashlib.blake2b(self.parent + self.tokens, digest_size=CHAIN_BYTES).digest()
        object.__setattr__(self, "digest", ChainDigest(digest))

    def is_same(self, other: StoredBlock) -> bool:
        """Compare content, whole: names and digests only lead to a block."""
        return self.parent == other.parent and self.tokens == other.tokens


class StorageFault(StrEnum):
    """Why a block could not be written or read; costs a hit and nothing else."""

    NO_SPACE = "no_space"
    """The disk is full."""
    UNREACHABLE = "unreachable"
    """The system refuses: a folder that cannot be written, a disk that fails."""
    TRUNCATED = "truncated"
    """The file is shorter than it was."""
    FOREIGN = "foreign"
    """Another block lies there, or a file that is not ours."""
    DAMAGED = "damaged"
    """The bytes are not those that were written."""
    REPLACED = "replaced"
    """The pool's block or memory has been given to others meanwhile."""
