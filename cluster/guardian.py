"""Ends every process of a Ray cluster that `baton up` started, however `baton up` itself ends.

Owns a marker that all descendants inherit in their environment, and the killing of whoever still
carries it once the parent is gone. Ray cleans up after itself in most cases, but after a SIGKILL of
its driver some of its agents live on for a minute. Does not know Ray. Called by `cluster.up` and
`cluster.demo`; the child half runs as `python -m cluster.guardian MARKER`.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

VARIABLE = "CLUSTER_OF_BATON"
SWEEPS = 50
SWEEP_S = 0.1


class Guardian:
    """The parent's half: holds the pipe."""

    def __init__(self) -> None:
        """Start the watcher, then mark this process's environment for all later children."""
        marker = secrets.token_hex(16)
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "cluster.guardian", marker], stdin=subprocess.PIPE, start_new_session=True
        )
        os.environ[VARIABLE] = marker

    def release(self) -> None:
        """Everything is shut down: let the watcher sweep what is left, and wait for it."""
        os.environ.pop(VARIABLE, None)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=SWEEPS * SWEEP_S + 5)


def carriers(marker: str) -> list[int]:
    """Processes that inherited the marker."""
    needle = f"{VARIABLE}={marker}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if needle in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue  # ended meanwhile, or another user's
    return found


def _watch(marker: str) -> None:
    sys.stdin.buffer.read()  # returns when the parent lets go, dead or alive
    for _ in range(SWEEPS):
        pids = carriers(marker)
        if not pids:
            return
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(SWEEP_S)  # the killed ones need a moment to be gone; bounded by SWEEPS


if __name__ == "__main__":
    _watch(sys.argv[1])
