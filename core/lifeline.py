"""A child process that cannot outlive its parent.

Owns the two strings it hangs on: a pipe whose other end only the parent holds, and, on Linux, the
parent-death signal. Does not know what the child does. Called first thing by every process that
this project spawns itself: ranks, local workers and routers, the tokenizer.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1


def hang_on(life_fd: int) -> None:
    """End this process at once when the parent is gone.

    Args:
        life_fd: Read end of a pipe; end of file means that the parent has died or let go.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_wait_for_end, args=(life_fd,), name="lifeline", daemon=True).start()


def _wait_for_end(life_fd: int) -> None:
    while os.read(life_fd, 1):
        pass
    os._exit(1)
