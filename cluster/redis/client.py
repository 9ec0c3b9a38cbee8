"""The Redis client behind every store, and the bound on each of its calls.

Owns the timeouts, and which failures are a store's. Does not know keys or values.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import TypeVar

from redis import asyncio as redis_asyncio
from redis.exceptions import RedisError

from core.ports import StoreFailed

CALL_TIMEOUT_S = 0.05
"""For a connection, and for an answer."""
Answer = TypeVar("Answer")


def new_client(url: str, timeout_s: float = CALL_TIMEOUT_S) -> redis_asyncio.Redis:
    """Prepare a client that waits `timeout_s` for an answer; nothing is sent yet."""
    return redis_asyncio.Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=CALL_TIMEOUT_S,
        retry_on_timeout=False,
    )


async def bounded(call: Awaitable[Answer], wait_s: float = 0.0) -> Answer:
    """Await an answer, which may take `wait_s` and what a connection and an answer may take.

    Raises:
        StoreFailed: Says why there is none.
    """
    limit_s = wait_s + 2 * CALL_TIMEOUT_S
    task = asyncio.current_task()
    num_cancels = task.cancelling() if task is not None else 0
    try:
        async with asyncio.timeout(limit_s):
            return await call
    except TimeoutError as error:  # has no words of its own
        raise StoreFailed(f"Redis did not answer within {limit_s:g} s") from error
    except (RedisError, OSError, ValueError) as error:
        raise StoreFailed(str(error) or type(error).__name__) from error
    finally:
        # In Python 3.11 the client's `asyncio.wait_for` loses a cancellation that comes as it ends.
        if task is not None and task.cancelling() > num_cancels:
            raise asyncio.CancelledError


async def close(client: redis_asyncio.Redis) -> None:
    """Let go of a client's connections; a server that is frozen keeps nobody waiting."""
    with contextlib.suppress(StoreFailed):
        await bounded(client.aclose())
