"""The clocks that stand behind the port `Clock`.

Owns where production and simulation read the time. Does not know what is timed.
"""

from __future__ import annotations

import asyncio
import time


class LoopClock:
    """The running event loop's clock: system time in production, virtual time in simulation."""

    def now_s(self) -> float:
        """Return `loop.time()`."""
        return asyncio.get_running_loop().time()


class SystemClock:
    """The system's monotonic clock: the base of `loop.time()`, at full resolution.

    uvloop's own `loop.time()` counts whole milliseconds, too coarse to measure a hand-over.
    """

    def now_s(self) -> float:
        """Return `time.monotonic()`."""
        return time.monotonic()
