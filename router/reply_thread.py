"""The thread that makes large replies, off the event loop.

Owns the thread. Does not know what is made in it. There is only one, so that the loop shares the
GIL with one other at most and waits some milliseconds for it; no single call made here may hold the
GIL for long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Made = TypeVar("Made")
_thread = ThreadPoolExecutor(1, "replies")


async def in_reply_thread(make: Callable[..., Made], *arguments: Any) -> Made:  # noqa: ANN401
    """Call `make` in the thread; the loop serves others meanwhile."""
    return await asyncio.get_running_loop().run_in_executor(_thread, make, *arguments)
