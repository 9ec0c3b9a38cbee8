"""Memory that processes share, as files that no file system knows.

Owns making and mapping them, and how much memory is left for them; nothing can be left behind by
whoever is killed. Does not know what lies in them.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import tempfile
from pathlib import Path

PAGE_BYTES = 4096
CHUNK_BYTES = 32 << 20
"""Touched at once; between two chunks other threads of the interpreter get their turn."""


def create_segment(num_bytes: int) -> int:
    """Make an unlinked shared-memory file; returns its descriptor, which is the caller's.

    On Linux its size is sealed: whoever maps it can rely on every byte being there.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(
            fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
        return fd
    with tempfile.TemporaryFile() as file:
        fd = os.dup(file.fileno())
    os.ftruncate(fd, num_bytes)
    return fd


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that is left for new segments, by the machine and by the container; None: not known.

    A segment takes memory as it is touched, so making one larger than this succeeds, and touching
    it ends some process.
    """
    left = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = (root / "proc/meminfo").read_text().partition("MemAvailable:")[2].split()
        left.append(int(words[0]) << 10)
    group = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError, ValueError):  # "max": the container has no limit
        most = int((group / "memory.max").read_text())
        left.append(max(0, most - int((group / "memory.current").read_text())))
    return min(left, default=None)


def map_segment(fd: int, num_bytes: int) -> memoryview:
    """Map a segment; writable uint8 [num_bytes]."""
    return memoryview(mmap.mmap(fd, num_bytes))


def touch(memory: memoryview) -> None:
    """Make every page of a mapping present in this process, uint8 [any]; from a thread, it is slow.

    Whoever touches a page first waits for the system: in the middle of a transfer that is a third
    of its time, and the first decode step after it meets each page of the prompt again.
    """
    for at in range(0, len(memory), CHUNK_BYTES):
        bytes(memory[at : at + CHUNK_BYTES : PAGE_BYTES])
