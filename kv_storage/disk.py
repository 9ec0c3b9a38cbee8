"""Blocks on a local disk: segments of slots in a folder, which outlive the process.

Owns the folder of one worker, its segments, and a thread that copies. Does not know which blocks
are kept.

    FOLDER/FINGERPRINT/0/lock, 00000.kv, 00001.kv, …      one numbered folder for each worker

The fingerprint is of the model, its KV layout, the cluster key, and the versions of the blocks'
names and of the files: a worker that differs in one of them finds nothing, and harms nothing. A
worker takes the first numbered folder that nobody has locked, so that one that starts again finds
what it wrote. Segments that nobody has had open for a week, of whatever fingerprint, are removed by
the next worker that starts: a model or a key that is gone would take its room for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from core.block_hash import NAMING_VERSION
from core.kv_layout import KVLayout
from core.ports import BlockCopy, KVBytes
from core.stored_block import StorageFault, StoredBlock
from kv_storage.batches import copy_in_batches
from kv_storage.block_bytes import BlockBytes
from kv_storage.segment_file import (
    FORMAT,
    SegmentFile,
    StorageRefused,
    bytes_of_slot,
    fault_of,
)

SEGMENT_BYTES = 64 << 20
"""About as large is a segment; a slot may be larger."""
MAX_FOLDERS = 1_024
PAUSE_S = 5.0
"""After the disk was full or refused, nothing is written for so long."""
UNUSED_S = 7 * 86_400.0
"""After so long the segments of a folder that no worker has locked are removed."""
CLOSE_TIMEOUT_S = 5.0
"""For copies under way when a worker ends; a disk that hangs takes no longer."""
BATCH_BLOCKS = 8
"""Copied in one go: they lie in memory together."""


def fingerprint_of(layout: KVLayout, hash_key: bytes, slots_per_segment: int) -> bytes:
    """Digest of all on which the meaning of stored bytes depends, 32 bytes."""
    words = (
        f"{layout.identity} shape={layout.shape} naming={NAMING_VERSION} format={FORMAT} "
        f"slots={slots_per_segment}"
    )
    return hashlib.blake2b(words.encode(), key=hash_key, digest_size=32).digest()


def disk_block_bytes(layout: KVLayout) -> int:
    """What a block takes of the disk at most."""
    return bytes_of_slot(BlockBytes(layout).payload_bytes, layout.block_size_tokens)


def check_writable(folder: Path) -> None:
    """Try to make a file where a folder is or would be made, and leave nothing behind.

    Raises:
        OSError: It cannot be made.
    """
    there = next(each for each in (folder, *folder.parents) if each.exists())
    with tempfile.TemporaryFile(dir=there):
        pass


class DiskStore:
    """`BlockStore` in files."""

    def __init__(
        self,
        layout: KVLayout,
        num_slots: int,
        folder: Path,
        hash_key: bytes,
        now_s: Callable[[], float],
    ) -> None:
        """Touch nothing yet.

        Args:
            layout: Of the pool.
            num_slots: Blocks at most.
            folder: Where; several workers may share it.
            hash_key: Of the cluster, from `core.block_hash.hash_key`.
            now_s: A monotonic clock.
        """
        self._bytes = BlockBytes(layout)
        self._num_tokens = layout.block_size_tokens
        self._num_slots = num_slots
        self._own: Path | None = None
        self._lock_fd: int | None = None
        self._now_s = now_s
        payload_bytes = self._bytes.payload_bytes
        self._slots_per_segment = min(max(1, SEGMENT_BYTES // payload_bytes), num_slots)
        self._fingerprint = fingerprint_of(layout, hash_key, self._slots_per_segment)
        self._folder = folder / self._fingerprint[:8].hex()
        self._segments: dict[int, SegmentFile] = {}
        self._paused_until = 0.0
        self._pause_fault = StorageFault.UNREACHABLE
        # Two, so that a prompt does not wait for what another left behind.
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="disk-tier-read")
        self._writers = ThreadPoolExecutor(1, thread_name_prefix="disk-tier-write")

    # --- from an earlier life -----------------------------------------------------------------

    async def find(self) -> Sequence[tuple[int, StoredBlock]]:
        """See `BlockStore`: reads the tables of the segments, not the payloads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._writers, self._find)

    def _find(self) -> list[tuple[int, StoredBlock]]:
        found: list[tuple[int, StoredBlock]] = []
        try:
            self._take_folder()
        except OSError as error:
            self._pause(fault_of(error))
            return found
        num_segments = -(-self._num_slots // self._slots_per_segment)
        for path in sorted(self._own.glob("*.kv") if self._own else ()):
            number = int(path.stem) if path.stem.isdecimal() else num_segments
            # From a life with more room.
            if path.stem.isdecimal() and number >= num_segments:
                with contextlib.suppress(OSError):
                    path.unlink()
            if number >= num_segments:
                continue
            first = number * self._slots_per_segment
            with contextlib.suppress(StorageRefused):
                blocks = self._segment(number).blocks()
                found += [(first + slot, block) for slot, block in blocks]
        return [(slot, block) for slot, block in found if slot < self._num_slots]

    def _take_folder(self) -> None:
        """Lock the first folder that no other worker has; the lock ends with the process."""
        for number in range(MAX_FOLDERS):
            folder = self._folder / str(number)
            _make_private(folder)
            fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                continue
            self._own = folder
            self._lock_fd = fd
            os.utime(fd)
            # By the clock that dates files: a disk may be another machine's.
            _remove_unused(self._folder.parent, before_s=os.fstat(fd).st_mtime - UNUSED_S)
            return

    def _path(self, number: int) -> Path:
        return (self._own or self._folder) / f"{number:05}.kv"

    def _segment(self, number: int) -> SegmentFile:
        """Open or make a segment.

        Raises:
            StorageRefused: See `SegmentFile`.
        """
        segment = self._segments.get(number)
        if segment is None:
            segment = self._segments[number] = SegmentFile(
                self._path(number),
                self._slots_per_segment,
                self._bytes.payload_bytes,
                self._num_tokens,
                self._fingerprint,
            )
        return segment

    def _opened(self, number: int) -> SegmentFile:
        """Look a segment up that is open already: reading makes no files.

        Raises:
            StorageRefused: It is not.
        """
        segment = self._segments.get(number)
        if segment is None:
            raise StorageRefused(StorageFault.FOREIGN)
        return segment

    # --- copies -------------------------------------------------------------------------------

    async def write(
        self, copies: Sequence[BlockCopy], pool: KVBytes, is_still: Callable[[BlockCopy], bool]
    ) -> Sequence[StorageFault | None]:
        """See `BlockStore`."""
        write = functools.partial(self._write, pool=pool, is_still=is_still)
        return await copy_in_batches(self._writers, write, copies, BATCH_BLOCKS)

    def _write(
        self, copies: Sequence[BlockCopy], pool: KVBytes, is_still: Callable[[BlockCopy], bool]
    ) -> list[StorageFault | None]:
        if self._own is None or self._now_s() < self._paused_until:
            return [self._pause_fault] * len(copies)
        source = self._bytes.view(pool.segments())
        payload, tallies = source.gather(self._bytes.fragments([c.block_id for c in copies]))
        checksums = self._bytes.checksums(tallies, [copy.block for copy in copies])
        size = self._bytes.payload_bytes
        faults: list[StorageFault | None] = []
        for index, (copy, checksum) in enumerate(zip(copies, checksums, strict=True)):
            # Before its record says what it is: the next life would trust that.
            if not is_still(copy):
                faults.append(StorageFault.REPLACED)
                continue
            number, slot = divmod(copy.slot, self._slots_per_segment)
            one = payload[index * size : (index + 1) * size]
            try:
                self._segment(number).write(slot, copy.block, one, checksum)
            except StorageRefused as error:
                # A foreign file keeps its slots; the others are as good as before.
                if error.fault is not StorageFault.FOREIGN:
                    self._pause(error.fault)
                faults.append(error.fault)
            else:
                faults.append(None)
        return faults

    def _pause(self, fault: StorageFault) -> None:
        """Leave a disk alone that is full or fails: trying again costs time, and fills the log."""
        self._pause_fault = fault
        self._paused_until = self._now_s() + PAUSE_S

    async def read(
        self, copies: Sequence[BlockCopy], pool: KVBytes
    ) -> Sequence[StorageFault | None]:
        """See `BlockStore`."""
        read = functools.partial(self._read, pool=pool)
        return await copy_in_batches(self._readers, read, copies, BATCH_BLOCKS, stops_at_fault=True)

    def _read(self, copies: Sequence[BlockCopy], pool: KVBytes) -> list[StorageFault | None]:
        size = self._bytes.payload_bytes
        payload = memoryview(np.empty(len(copies) * size, np.uint8).data)
        expected: list[int] = []
        faults: list[StorageFault | None] = []
        for index, copy in enumerate(copies):
            number, slot = divmod(copy.slot, self._slots_per_segment)
            one = payload[index * size : (index + 1) * size]
            try:
                expected.append(self._opened(number).read(slot, copy.block, one))
            except StorageRefused as error:
                faults.append(error.fault)
                break
        read = copies[: len(expected)]
        if not read:
            return faults
        target = self._bytes.view(pool.segments())
        block_ids = [copy.block_id for copy in read]
        tallies = target.scatter(
            self._bytes.fragments(block_ids),
            self._bytes.targets(block_ids),
            payload[: len(read) * size],
        )
        checksums = self._bytes.checksums(tallies, [copy.block for copy in read])
        for index, (is_, should_be) in enumerate(zip(checksums, expected, strict=True)):
            if is_ != should_be:
                return [*[None] * index, StorageFault.DAMAGED]
        return [*[None] * len(read), *faults]

    async def close(self) -> None:
        """See `BlockStore`; what a disk that hangs still uses stays open until the process ends."""
        loop = asyncio.get_running_loop()
        both = (self._readers, self._writers)
        # Each is one thread: this comes behind all that it has to copy.
        ends = [loop.run_in_executor(threads, int) for threads in both]
        for threads in both:
            threads.shutdown(wait=False)
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.gather(*ends)
        except TimeoutError:
            return
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
        if self._lock_fd is not None:
            with contextlib.suppress(OSError):
                os.utime(self._lock_fd)
            os.close(self._lock_fd)
            self._lock_fd = None
        self._own = None


def _make_private(folder: Path) -> None:
    """Make a folder and those above it that are missing, for this user alone.

    `mkdir(parents=True)` gives its mode to the last one only.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)


def _remove_unused(folder: Path, before_s: float) -> None:
    """Remove segments that no worker has locked, and none has had since `before_s`.

    The folders stay, with their locks: another worker may take one at this moment.
    """
    for lock in folder.glob("*/*/lock"):
        with contextlib.suppress(OSError):
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                segments = [path for path in lock.parent.glob("*.kv") if path.stem.isdecimal()]
                if max(path.stat().st_mtime for path in (lock, *segments)) < before_s:
                    for path in segments:
                        path.unlink()
            finally:
                os.close(fd)
