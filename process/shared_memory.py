"""Memory that processes share, as files without a name.

Owns making and mapping them, and how much memory is left for them. A killed process leaves nothing
behind. Does not know what they hold.
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
"""Touched in one call; between two chunks other threads can run."""


def create_segment(num_bytes: int) -> int:
    """Make an unlinked shared-memory file, and return its descriptor, which the caller closes.

    On Linux its size is sealed: every mapping can rely on all its bytes.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(
            fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
        return fd
    # Without memfd (macOS): a file that has lost its name, kept alive by a second descriptor.
    with tempfile.TemporaryFile() as file:
        fd = os.dup(file.fileno())
    os.ftruncate(fd, num_bytes)
    return fd


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory left for new segments in the machine and its container; None: unknown.

    A segment takes memory only when it is touched: one larger than this can be made, and touching
    it gets some process killed.
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
    """Fault in every page of a mapping, uint8 [any]. Slow: call it from a thread.

    The first access to a page waits for the kernel. During a transfer that would be a third of its
    time, and the first decode step after it would wait for every page of the prompt again.
    """
    for at in range(0, len(memory), CHUNK_BYTES):
        bytes(memory[at : at + CHUNK_BYTES : PAGE_BYTES])
