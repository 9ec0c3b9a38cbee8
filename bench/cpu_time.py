"""CPU seconds of another process and of those that it started, as Linux counts them.

Owns the reading of `/proc`. Does not know what the processes do.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from core.errors import ConfigError, WorkerLost

PROC = Path("/proc")


def cpu_s(pid: int, proc: Path = PROC) -> tuple[float, float]:
    """Return the CPU seconds of a process, and of all its living descendants together.

    Raises:
        ConfigError: There is no `/proc`.
        WorkerLost: The process has ended.
    """
    if not proc.exists():
        raise ConfigError(f"CPU time of other processes is read from {proc}: this needs Linux")
    try:
        return _of_one(pid, proc), _of_children(pid, proc)
    except OSError as error:
        raise WorkerLost(f"process {pid} has ended, so its CPU time cannot be read") from error


def _of_one(pid: int, proc: Path) -> float:
    # After the name, which may hold spaces and brackets: fields 14 and 15 of the manual's count.
    fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _of_children(pid: int, proc: Path) -> float:
    total_s = 0.0
    for thread in (proc / str(pid) / "task").iterdir():
        for child in map(int, (thread / "children").read_text().split()):
            # It may end while this looks.
            with contextlib.suppress(OSError):
                total_s += _of_one(child, proc) + _of_children(child, proc)
    return total_s
