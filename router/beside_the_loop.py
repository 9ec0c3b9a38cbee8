"""One thread for what is too long for the loop that carries every stream.

Owns the thread. Does not know what is made in it. Called by `router.event_stream`, `router.service`
and the doors. One, so that the loop waits for the interpreter behind one other at most, which is
some milliseconds; and what is made here must not be one long call into C that keeps it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Made = TypeVar("Made")
_thread = ThreadPoolExecutor(1, "replies")


async def beside_the_loop(make: Callable[..., Made], *arguments: Any) -> Made:  # noqa: ANN401
    """Make something in the thread, and wait for it while others go on."""
    return await asyncio.get_running_loop().run_in_executor(_thread, make, *arguments)
