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
