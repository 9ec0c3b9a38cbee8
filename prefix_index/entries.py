"""The bytes in which workers publish what they cache.

Owns the format of batches, segments and heads, their authentication, and every check of what is
read. Does not know where they are kept.

    batch    tag │ version, tier, number, how many stored, how many evicted │ names
    segment  tag │ version, tier, number, index                             │ names
    head     tag │ version, number, how many segments                          │ position in the log

A tag is a keyed hash over the worker's life, the kind and all that follows, so that nothing counts
that no worker of the cluster wrote, nor under another worker's name.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from core.block_hash import DIGEST_BYTES, BlockHash
from core.ids import WorkerLife
from core.prefix_changes import PrefixChange, StorageTier

VERSION = 1
TAG_BYTES = 16
MAX_BATCH_BLOCKS = 2_048
SEGMENT_BLOCKS = 4_096
MAX_SEGMENTS = 16_384
MAX_POSITION_BYTES = 64
_BATCH = struct.Struct("<BBQII")
_SEGMENT = struct.Struct("<BBQI")
_HEAD = struct.Struct("<BQI")


class BadEntry(Exception):
    """Bytes that do not count; `reason` is one of few words."""

    def __init__(self, reason: str) -> None:
        """Keep why."""
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Batch:
    """One numbered change of one life."""

    number: int
    change: PrefixChange


@dataclass(frozen=True, slots=True)
class Head:
    """What a whole content is: its number, which is that of the last batch it covers."""

    number: int
    num_segments: int
    position: str
    """In the log, after that batch."""


def entry_key(cluster_key: str) -> bytes:
    """Derive the key of the tags from the secret that a cluster shares."""
    secret = cluster_key.encode()
    return hashlib.blake2b(secret, digest_size=32, person=b"baton.kv.index").digest()


def namespace_of(cluster_key: str) -> str:
    """Name a cluster's keys in the store: clusters may share a Redis and see nothing of another."""
    secret = cluster_key.encode()
    return hashlib.blake2b(secret, digest_size=8, person=b"baton.kv.space").hexdigest()


class EntryCodec:
    """Writes and reads entries with one cluster's key."""

    def __init__(self, key: bytes) -> None:
        """Keep the key, from `entry_key`."""
        self._key = key

    def batch(self, life: WorkerLife, batch: Batch) -> bytes:
        """Write a batch of at most `MAX_BATCH_BLOCKS`."""
        change = batch.change
        body = _BATCH.pack(
            VERSION, change.tier, batch.number, len(change.stored), len(change.evicted)
        )
        return self._sealed(b"b", life, b"".join((body, *change.stored, *change.evicted)))

    def read_batch(self, life: WorkerLife, entry: bytes) -> Batch:
        """Read a batch.

        Raises:
            BadEntry: It is none, or not of this life.
        """
        body = self._opened(b"b", life, entry, _BATCH.size)
        version, tier, number, num_stored, num_evicted = _BATCH.unpack_from(body)
        _check(version)
        names = _names(body[_BATCH.size :])
        if len(names) != num_stored + num_evicted or len(names) > MAX_BATCH_BLOCKS:
            raise BadEntry("malformed")
        return Batch(number, PrefixChange(names[:num_stored], names[num_stored:], _tier_of(tier)))

    def segment(
        self, life: WorkerLife, number: int, index: int, tier: StorageTier, names: Sequence[bytes]
    ) -> bytes:
        """Write a segment of a whole content, of at most `SEGMENT_BLOCKS`."""
        body = _SEGMENT.pack(VERSION, tier, number, index)
        return self._sealed(b"p", life, b"".join((body, *names)))

    def read_segment(self, life: WorkerLife, number: int, index: int, entry: bytes) -> PrefixChange:
        """Read a segment, as blocks that are stored.

        Raises:
            BadEntry: It is not this segment of this whole content.
        """
        body = self._opened(b"p", life, entry, _SEGMENT.size)
        version, tier, its_number, its_index = _SEGMENT.unpack_from(body)
        _check(version)
        names = _names(body[_SEGMENT.size :])
        if (its_number, its_index) != (number, index) or len(names) > SEGMENT_BLOCKS:
            raise BadEntry("malformed")
        return PrefixChange(names, (), _tier_of(tier))

    def head(self, life: WorkerLife, head: Head) -> bytes:
        """Write a head."""
        body = _HEAD.pack(VERSION, head.number, head.num_segments)
        return self._sealed(b"h", life, body + head.position.encode())

    def read_head(self, life: WorkerLife, entry: bytes) -> Head:
        """Read a head.

        Raises:
            BadEntry: It is none, or not of this life.
        """
        body = self._opened(b"h", life, entry, _HEAD.size)
        version, number, num_segments = _HEAD.unpack_from(body)
        _check(version)
        position = body[_HEAD.size :]
        if (
            num_segments > MAX_SEGMENTS
            or len(position) > MAX_POSITION_BYTES
            or not position.isascii()
        ):
            raise BadEntry("malformed")
        return Head(number, num_segments, position.decode())

    def _tag(self, kind: bytes, life: WorkerLife, body: bytes) -> bytes:
        worker, incarnation = life
        name = worker.encode()
        hashed = hashlib.blake2b(key=self._key, digest_size=TAG_BYTES)
        hashed.update(kind + struct.pack("<IQ", len(name), incarnation) + name)
        hashed.update(body)
        return hashed.digest()

    def _sealed(self, kind: bytes, life: WorkerLife, body: bytes) -> bytes:
        return self._tag(kind, life, body) + body

    def _opened(self, kind: bytes, life: WorkerLife, entry: bytes, min_bytes: int) -> bytes:
        if len(entry) < TAG_BYTES + min_bytes:
            raise BadEntry("malformed")
        body = entry[TAG_BYTES:]
        if not hmac.compare_digest(entry[:TAG_BYTES], self._tag(kind, life, body)):
            raise BadEntry("forged")
        return body


def _check(version: int) -> None:
    if version != VERSION:
        raise BadEntry("version")


def _tier_of(number: int) -> StorageTier:
    try:
        return StorageTier(number)
    except ValueError as error:
        raise BadEntry("malformed") from error


def _names(joined: bytes) -> list[BlockHash]:
    if len(joined) % DIGEST_BYTES:
        raise BadEntry("malformed")
    return [BlockHash(joined[at : at + DIGEST_BYTES]) for at in range(0, len(joined), DIGEST_BYTES)]
