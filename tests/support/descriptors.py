"""What a process has open, as /proc shows it."""

import contextlib
import os
from pathlib import Path


def opened(pid="self"):
    """Names of all that is open; what is closed while we look is left out."""
    names = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(descriptor))
    return names


def sockets_of(pid):
    """Inodes of a process's sockets."""
    return {name[8:-1] for name in opened(pid) if name.startswith("socket:")}


def listeners(pids):
    """(address, port) of every TCP socket that these processes listen on, IPv6 included."""
    inodes = set()
    for pid in pids:
        inodes |= sockets_of(pid)
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}
"""127.0.0.1 as the kernel prints it, and the same through an IPv6 socket."""


def descendants(pid):
    out = {pid}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                out |= descendants(int(child))
    return out
