"""Calls to a store over a real Redis, on a machine that may be busy."""

import asyncio

from core.ports import StoreFailed

ANSWER_S = 30


async def eventually(call):
    """Until the store answers in time."""
    async with asyncio.timeout(ANSWER_S):
        while True:
            try:
                return await call()
            except StoreFailed:
                await asyncio.sleep(0.05)
