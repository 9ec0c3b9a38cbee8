"""A child process that cannot outlive its parent.

Owns the two mechanisms: a pipe whose other end only the parent holds, and, on Linux, the
parent-death signal. Does not know what the child does. Third-party programs get the signal alone,
from a helper process (`hanging`): setting it between fork and exec would run gRPC's fork handlers,
which are not safe beside its threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def exit_with_parent(life_fd: int) -> None:
    """End this process at once when the parent is gone.

    Args:
        life_fd: Read end of a pipe; end of file means that the parent has died or closed it.
    """
    _die_with_parent()
    threading.Thread(
        target=_wait_for_end, args=(life_fd,), name="parent-death-pipe", daemon=True
    ).start()


def hanging(command: Sequence[str]) -> list[str]:
    """Return the command line that runs a program so that it dies with this process."""
    return [sys.executable, "-m", "process.parent_death", str(os.getpid()), *command]


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _become(parent_pid: int, command: list[str]) -> None:
    """Replace this process by a program, which keeps the signal and the process id."""
    _die_with_parent()
    if os.getppid() != parent_pid:
        raise SystemExit(1)  # the parent died before the signal was set
    os.execv(command[0], command)  # noqa: S606 - the caller's own command


def _wait_for_end(life_fd: int) -> None:
    # Nothing is ever sent: the read returns when the last write end is closed.
    while os.read(life_fd, 1):
        pass
    os._exit(1)  # from a thread, nothing less ends the process


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
