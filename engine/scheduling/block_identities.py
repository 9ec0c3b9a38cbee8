"""What each registered block is, exactly, and the block that is it.

Owns the identities of one pool. Does not know references, eviction or tensors.

A block is its own tokens after a parent: the block before it, or the root of its chain. Each
identity, once registered, has a serial number that no other identity ever gets, so the number of
the parent and the block's own tokens stand for everything that the block's KV was computed from,
and two equal records are equal contents whatever the hash. The hash is the same in every worker of
a cluster, and the way into the table. Blocks whose hashes collide are chained in one bucket.

Within one engine the content digest is a constant, so the scope alone distinguishes roots. Scopes
come from outside, so only the most recently used roots are remembered. What is registered under a
forgotten root is not found again, and leaves with the least recently used blocks.

    records     hash │ parent's serial │ tokens      of each block, back to back
    chains      bucket ──▶ block ──▶ block           hashes that fall into the same bucket
"""

from __future__ import annotations

import struct
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from core.block_hash import BlockHash
from core.errors import InvariantViolation

NO_IDENTITY = 0
"""Serial number of nothing: an anonymous block, an unknown root."""
MAX_ROOTS = 65_536
_NOTHING = -1
_SERIAL_BYTES = 8
_HASH_BYTES_USED = 8
"""Of a hash, to choose its bucket."""


def _record(parent: int, block_hash: BlockHash, token_ids: Sequence[int]) -> bytes:
    return block_hash + struct.pack(f"<q{len(token_ids)}i", parent, *token_ids)


class BlockIdentities:
    """A hash table inside arrays: for blocks of 16 tokens, 104 bytes a block and 4 a bucket."""

    def __init__(self, num_blocks: int) -> None:
        """Start with every block anonymous. The first registration fixes the length of a record."""
        # A power of two no smaller than the pool: chains stay short, and a mask finds the bucket.
        num_buckets = 1 << max(num_blocks - 1, 1).bit_length()
        self._num_blocks = num_blocks
        self._mask = num_buckets - 1
        # Buckets behind the blocks in one array: the first of a chain is unlinked like any other.
        self._chains = array("i", [_NOTHING]) * (num_blocks + num_buckets)
        self._serials = array("q", [NO_IDENTITY]) * num_blocks
        self._records = bytearray()
        self._record_bytes = 0
        self._hash_bytes = 0
        self._next_serial = NO_IDENTITY + 1
        self._oldest_serial = self._next_serial
        self._num_registered = 0
        self._roots: OrderedDict[str, int] = OrderedDict()
        # Roots beyond the number of blocks could have none registered under them.
        self._max_roots = min(num_blocks, MAX_ROOTS)

    def of(self, block_id: int) -> int:
        """Serial number of a block's identity, or `NO_IDENTITY`."""
        serial = self._serials[block_id]
        # `forget_all` raises the oldest that counts, and need not clear a million serials.
        return serial if serial >= self._oldest_serial else NO_IDENTITY

    def num_known(self, block_ids: Iterable[int]) -> int:
        """Count those of some blocks that have an identity."""
        serials = map(self._serials.__getitem__, block_ids)
        return sum(map(self._oldest_serial.__le__, serials))

    def block_hash(self, block_id: int) -> BlockHash | None:
        """Hash under which a block is registered, if it is."""
        return self.hash_of(block_id) if self.of(block_id) else None

    @property
    def num_registered(self) -> int:
        """Blocks that have an identity."""
        return self._num_registered

    def hash_of(self, block_id: int) -> BlockHash:
        """Hash of a block that is registered; of another, it means nothing."""
        start = block_id * self._record_bytes
        return BlockHash(bytes(self._records[start : start + self._hash_bytes]))

    def tokens_of(self, block_id: int) -> bytes:
        """Tokens of a block that is registered, 32 bits each; of another, they mean nothing."""
        start = block_id * self._record_bytes
        tokens_at = start + self._hash_bytes + _SERIAL_BYTES
        return bytes(self._records[tokens_at : start + self._record_bytes])

    def is_known(self, block_hash: BlockHash) -> bool:
        """True if any block is registered under a hash."""
        block_id = self._chains[self._bucket(block_hash)]
        while block_id != _NOTHING:
            if self.hash_of(block_id) == block_hash:
                return True
            block_id = self._chains[block_id]
        return False

    def root(self, scope: str) -> int:
        """Serial number of a scope's root, or `NO_IDENTITY` if nothing was remembered of it."""
        return self._roots.get(scope, NO_IDENTITY)

    def remember_root(self, scope: str) -> int:
        """Use a scope's root: it gets a serial number, or keeps it. May forget an older root."""
        if scope in self._roots:
            self._roots.move_to_end(scope)
        else:
            self._roots[scope] = self._take_serial()
            if len(self._roots) > self._max_roots:
                self._roots.popitem(last=False)
        return self._roots[scope]

    def find(self, parent: int, block_hash: BlockHash, token_ids: Sequence[int]) -> int | None:
        """Find the block that is exactly these tokens after this parent."""
        return self._find(block_hash, _record(parent, block_hash, token_ids))

    def register(
        self, block_id: int, parent: int, block_hash: BlockHash, token_ids: Sequence[int]
    ) -> int:
        """Give a block its identity, unless it has one or another block is the same.

        Returns:
            Serial number of the identity, whichever block has it.

        Raises:
            InvariantViolation: No parent, or not as many tokens as the pool's other blocks hold.
        """
        if own := self.of(block_id):
            return own
        if parent == NO_IDENTITY:
            raise InvariantViolation(f"block {block_id} has no parent to be registered under")
        record = _record(parent, block_hash, token_ids)
        # Two prompts may have computed the same side by side: one of them is enough to be found.
        same = self._find(block_hash, record)
        if same is not None:
            return self._serials[same]
        self._keep(block_id, block_hash, record)
        serial = self._serials[block_id] = self._take_serial()
        bucket = self._bucket(block_hash)
        self._chains[block_id] = self._chains[bucket]
        self._chains[bucket] = block_id
        self._num_registered += 1
        return serial

    def forget(self, block_id: int) -> None:
        """Make a registered block anonymous.

        Raises:
            InvariantViolation: It is anonymous.
        """
        if not self.of(block_id):
            raise InvariantViolation(f"block {block_id} has no identity to forget")
        before = self._bucket(self.hash_of(block_id))
        while self._chains[before] != block_id:
            before = self._chains[before]
        self._chains[before] = self._chains[block_id]
        self._chains[block_id] = _NOTHING
        self._serials[block_id] = NO_IDENTITY
        self._num_registered -= 1

    def forget_all(self) -> None:
        """Make every block anonymous, at the cost of clearing the chains."""
        self._chains = array("i", [_NOTHING]) * len(self._chains)
        self._oldest_serial = self._next_serial
        self._num_registered = 0

    def check(self) -> None:
        """Compare the number of registered blocks with the number in chains.

        Raises:
            InvariantViolation: Some block cannot be found, or is found after it was forgotten.
        """
        num_chained = len(self._chains) - self._chains.count(_NOTHING)
        if num_chained != self._num_registered:
            raise InvariantViolation(
                f"{self._num_registered} blocks are registered, {num_chained} can be found"
            )

    def _take_serial(self) -> int:
        serial = self._next_serial
        self._next_serial += 1
        return serial

    def _find(self, block_hash: BlockHash, record: bytes) -> int | None:
        block_id = self._chains[self._bucket(block_hash)]
        while block_id != _NOTHING:
            start = block_id * self._record_bytes
            # The record and not the hash: a collision must never give one tenant another's KV.
            if self._records[start : start + self._record_bytes] == record:
                return block_id
            block_id = self._chains[block_id]
        return None

    def _keep(self, block_id: int, block_hash: BlockHash, record: bytes) -> None:
        if not self._records:
            self._records = bytearray(self._num_blocks * len(record))
            self._record_bytes = len(record)
            self._hash_bytes = len(block_hash)
        if len(record) != self._record_bytes:
            raise InvariantViolation(
                f"block {block_id} has a record of {len(record)} bytes, those of this pool have "
                f"{self._record_bytes}: all blocks of a pool hold equally many tokens"
            )
        start = block_id * self._record_bytes
        self._records[start : start + self._record_bytes] = record

    def _bucket(self, block_hash: BlockHash) -> int:
        number = int.from_bytes(block_hash[:_HASH_BYTES_USED], "little")
        return self._num_blocks + (number & self._mask)
