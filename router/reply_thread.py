"""The thread that makes large replies, off the loop that carries every stream.

Owns the thread. Does not know what is made in it. It is one thread, so that the loop shares the
interpreter's lock with one other at most and waits some milliseconds for it; no single call made
here may hold the lock for long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Made = TypeVar("Made")
_thread = ThreadPoolExecutor(1, "replies")


async def in_reply_thread(make: Callable[..., Made], *arguments: Any) -> Made:  # noqa: ANN401
    """Make something in the thread, and wait for it while the loop serves others."""
    return await asyncio.get_running_loop().run_in_executor(_thread, make, *arguments)
