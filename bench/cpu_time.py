"""CPU seconds of another process and of those that it started, as Linux counts them.

Owns the reading of `/proc/PID/stat`, which every Linux kernel has. Does not know what the processes
do.
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
        ConfigError: This is not Linux, or `/proc` is not mounted.
        WorkerLost: The process has ended.
    """
    if not (proc / "self").exists():
        raise ConfigError(f"the CPU time of other processes is read from {proc}: run this on Linux")
    # By pid: the parent's pid, and the CPU seconds.
    stats: dict[int, tuple[int, float]] = {}
    for folder in proc.iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it may end while this looks
                stats[int(folder.name)] = _read(folder / "stat")
    if pid not in stats:
        raise WorkerLost(f"process {pid} has ended, so its CPU time cannot be read")
    family = [pid]
    # It grows by each member's children.
    for member in family:
        family += [child for child, (parent, _) in stats.items() if parent == member]
    return stats[pid][1], sum(stats[member][1] for member in family[1:])


def _read(stat: Path) -> tuple[int, float]:
    # The name in brackets may hold spaces and brackets. Behind it come fields 3 and on of the
    # manual's count: 4 is the parent, 14 and 15 are ticks in user and in system mode.
    fields = stat.read_text().rpartition(")")[2].split()
    return int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
