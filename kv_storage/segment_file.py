"""One file of slots: a header, a table of records, then the payloads.

Owns the bytes of the file. Does not know which blocks are kept, nor threads.

    header, one page │ record of slot 0, 1, … │ payload of slot 0 │ payload of slot 1 │ …

The header says for which model, layout and cluster key the file was written, and in which form;
another's is foreign. A record says what its slot holds, with the payload's checksum and its own. It
is made void before its payload changes and written anew after it, so that what a crash leaves is a
slot with no record, or one whose checksum does not match.

Read and written through the descriptor and not through a mapping: of a mapped file that somebody
truncates, or that a full disk has no block for, the process learns by a deadly signal.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from pathlib import Path

from core.block_hash import BlockHash
from core.stored_block import CHAIN_BYTES, ChainDigest, StorageFault, StoredBlock

FORMAT = 1
MAGIC = b"BATONKV\0"
PAGE_BYTES = 4096
_HEAD = struct.Struct("<8sIII32s")
"""Magic, format, slots, bytes of a payload, fingerprint."""
_RECORD = struct.Struct(f"<{CHAIN_BYTES}sQIH")
"""Parent, checksum of the payload, depth, bytes of the name; then name, tokens, own checksum."""
NAME_BYTES = 16
SUM_BYTES = 8
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def _bytes_of_record(num_tokens: int) -> int:
    return _RECORD.size + NAME_BYTES + 4 * num_tokens + SUM_BYTES


def bytes_of_slot(payload_bytes: int, num_tokens: int) -> int:
    """What a slot takes of the disk at most, with its record and its share of a file's header."""
    return _whole_pages(payload_bytes) + _bytes_of_record(num_tokens) + 2 * PAGE_BYTES


class StorageRefused(Exception):
    """A file or a slot could not be used; `fault` says why."""

    def __init__(self, fault: StorageFault) -> None:
        super().__init__(fault.value)
        self.fault = fault


def fault_of(error: OSError) -> StorageFault:
    """Why the system refused."""
    return StorageFault.NO_SPACE if error.errno in _NO_SPACE else StorageFault.UNREACHABLE


class SegmentFile:
    """An open segment; its slots are numbered from 0."""

    def __init__(
        self, path: Path, num_slots: int, payload_bytes: int, num_tokens: int, fingerprint: bytes
    ) -> None:
        """Open a file that is there, or make one whose space is its own from now on.

        Args:
            path: Of the file.
            num_slots: Its slots.
            payload_bytes: Of a slot.
            num_tokens: Of a block.
            fingerprint: Of everything on which the meaning of its bytes depends, 32 bytes.

        Raises:
            StorageRefused: It is foreign, or the system refuses; a new file is gone again.
        """
        self._fingerprint = fingerprint
        self._payload_bytes = payload_bytes
        self._num_slots = num_slots
        self._record_bytes = _bytes_of_record(num_tokens)
        self._payloads_at = PAGE_BYTES + _whole_pages(num_slots * self._record_bytes)
        # Of whole pages, so that a payload shares none with its neighbour.
        self._slot_bytes = _whole_pages(payload_bytes)
        self.file_bytes = self._payloads_at + num_slots * self._slot_bytes
        head = _HEAD.pack(MAGIC, FORMAT, num_slots, payload_bytes, fingerprint)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StorageRefused(fault_of(error)) from error
        try:
            found = os.pread(self._fd, len(head), 0)
            # Without a header it is new, or was left half made: a disk was full, a worker killed.
            if not any(found):
                self._make(head)
            elif found != head:
                raise StorageRefused(StorageFault.FOREIGN)
        except OSError as error:
            self.close()
            path.unlink(missing_ok=True)
            raise StorageRefused(fault_of(error)) from error
        except StorageRefused:
            self.close()
            raise

    def _make(self, head: bytes) -> None:
        # Its whole space at once: a full disk shows here, and not at some later write.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._fd, 0, self.file_bytes)
        else:
            os.ftruncate(self._fd, self.file_bytes)
        os.pwrite(self._fd, head, 0)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def blocks(self) -> list[tuple[int, StoredBlock]]:
        """Read the table; records that are void or damaged are passed over.

        Raises:
            StorageRefused: The system refuses.
        """
        found = []
        size = self._record_bytes
        try:
            table = os.pread(self._fd, self._num_slots * size, PAGE_BYTES)
        except OSError as error:
            raise StorageRefused(fault_of(error)) from error
        for slot in range(len(table) // size):
            read = self._parse(slot, table[slot * size : (slot + 1) * size])
            if read is not None:
                found.append((slot, read[0]))
        return found

    def write(self, slot: int, block: StoredBlock, payload: memoryview, checksum: int) -> None:
        """Put a block into a slot, whatever it held.

        Raises:
            StorageRefused: The slot holds nothing, or what it held.
        """
        try:
            self._write(bytes(self._record_bytes), self._record_at(slot))
            self._write(payload, self._payload_at(slot))
            self._write(self._record(slot, block, checksum), self._record_at(slot))
        except OSError as error:
            raise StorageRefused(fault_of(error)) from error

    def read(self, slot: int, block: StoredBlock, payload: memoryview) -> int:
        """Read a slot that should hold this block into `payload`, uint8 [payload_bytes].

        Returns:
            The checksum that the payload must have.

        Raises:
            StorageRefused: It holds another block or none, is cut off, or the system refuses.
        """
        try:
            record = os.pread(self._fd, self._record_bytes, self._record_at(slot))
            num_bytes = os.preadv(self._fd, [payload], self._payload_at(slot))
        except OSError as error:
            raise StorageRefused(fault_of(error)) from error
        if len(record) < self._record_bytes or num_bytes < self._payload_bytes:
            raise StorageRefused(StorageFault.TRUNCATED)
        read = self._parse(slot, record)
        if read is None:
            raise StorageRefused(StorageFault.DAMAGED)
        if not read[0].is_same(block):
            raise StorageRefused(StorageFault.FOREIGN)
        return read[1]

    # --- bytes --------------------------------------------------------------------------------

    def _write(self, data: bytes | memoryview, at: int) -> None:
        if os.pwrite(self._fd, data, at) < len(data):
            raise OSError(errno.ENOSPC, "the rest of a slot has no room")

    def _record_at(self, slot: int) -> int:
        return PAGE_BYTES + slot * self._record_bytes

    def _payload_at(self, slot: int) -> int:
        return self._payloads_at + slot * self._slot_bytes

    def _record(self, slot: int, block: StoredBlock, checksum: int) -> bytes:
        name = block.name[:NAME_BYTES]
        content = _RECORD.pack(block.parent, checksum, block.depth, len(name))
        content += name.ljust(NAME_BYTES, b"\0") + block.tokens
        return content + self._sum(slot, content)

    def _sum(self, slot: int, content: bytes) -> bytes:
        """Bind a record to its slot and its file's fingerprint."""
        hashed = hashlib.blake2b(content, digest_size=SUM_BYTES, key=self._fingerprint)
        hashed.update(slot.to_bytes(4, "little"))
        return hashed.digest()

    def _parse(self, slot: int, record: bytes) -> tuple[StoredBlock, int] | None:
        """Read a record: the block and its payload's checksum; None: it is void or damaged."""
        content = record[:-SUM_BYTES]
        if self._sum(slot, content) != record[-SUM_BYTES:]:
            return None
        parent, checksum, depth, name_bytes = _RECORD.unpack_from(content)
        rest = content[_RECORD.size :]
        name = BlockHash(rest[:name_bytes])
        return StoredBlock(ChainDigest(parent), rest[NAME_BYTES:], name, depth), checksum
