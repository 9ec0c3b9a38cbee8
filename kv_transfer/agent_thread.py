"""A thread with a loop of its own for a transfer agent.

Owns the thread. Does not know what runs on its loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from kv_transfer.copying import warm

T = TypeVar("T")


class AgentThread:
    """Runs an agent's loop in a thread, so that payload copies never delay a step."""

    def __init__(self) -> None:
        """Start the thread; calls that are made before its loop runs wait for it."""
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="transfer-agent", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # Here, so that the first transfer does not wait for the kernel.
        warm()
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    async def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the agent's loop and wait for it here."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    def stop(self) -> None:
        """End the loop and the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        # A copy under way ends first. One that hangs must not keep the worker: it is a daemon.
        self._thread.join(timeout=5)
        self.loop.close()
