"""Ends every process of a Ray cluster that `baton up` started, however `baton up` itself ends.

Owns two marks of the cluster's processes that remain when the parent is gone: a variable that all
descendants inherit in their environment, and open files under Ray's session folder (Ray's agents
rename themselves, which overwrites their environment). Ray cleans up after itself in most cases,
but after a SIGKILL of its driver some of its agents live on for a minute. Does not know Ray. The
child half runs as `python -m process.orphan_reaper MARKER`.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

from core import events, logs

VARIABLE = "CLUSTER_OF_BATON"
SWEEPS = 50
SWEEP_S = 0.1
CLEAN_SWEEPS = 3
"""In a row: a process in the middle of exec shows no mark for a moment."""


class OrphanReaper:
    """The parent's half, which holds the pipe."""

    def __init__(self) -> None:
        """Start the watcher, then mark this process's environment for all later children."""
        marker = secrets.token_hex(16)
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "process.orphan_reaper", marker],
            stdin=subprocess.PIPE,
            start_new_session=True,  # it must outlive a signal to the parent's whole group
        )
        os.environ[VARIABLE] = marker

    def watch_folder(self, folder: str) -> None:
        """Count processes with open files under this folder among the cluster's."""
        if self._process.stdin is not None:
            self._process.stdin.write(folder.encode() + b"\n")
            self._process.stdin.flush()

    def release(self) -> None:
        """After an orderly shutdown: let the watcher end what is left, and wait for it."""
        os.environ.pop(VARIABLE, None)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=SWEEPS * SWEEP_S + 5)


def cluster_processes(marker: str, folders: list[str], spared: set[int]) -> list[int]:
    """List live processes that inherited the marker or have files open under one of the folders.

    Without `spared`: this process, and the parent, which has Ray's logs open and may still be
    shutting down in order.
    """
    needle = f"{VARIABLE}={marker}".encode()
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) not in spared:
            try:
                is_ours = needle in (process / "environ").read_bytes().split(b"\0")
                if is_ours or _has_open_file(process, folders):
                    found.append(int(process.name))
            except OSError:
                continue  # ended meanwhile, or another user's
    return found


def _has_open_file(process: Path, folders: list[str]) -> bool:
    paths = (str(fd.readlink()) for fd in (process / "fd").iterdir())
    return any(path.startswith(folder + "/") for path in paths for folder in folders)


def _watch(marker: str, parent: int) -> None:
    # Ends when the parent closes the pipe or dies; until then it may name folders.
    folders = [line.strip() for line in sys.stdin]
    num_clean = 0
    killed: set[int] = set()
    for _ in range(SWEEPS):
        pids = cluster_processes(marker, folders, {os.getpid(), parent})
        num_clean = 0 if pids else num_clean + 1
        if num_clean == CLEAN_SWEEPS:
            break
        killed.update(pids)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(SWEEP_S)  # killed processes need a moment to end; bounded by SWEEPS
    if killed:
        events.LEFTOVERS_KILLED.log(pids=sorted(killed))


if __name__ == "__main__":
    logs.configure("orphan-reaper")
    _watch(sys.argv[1], os.getppid())
