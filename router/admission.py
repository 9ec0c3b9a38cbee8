"""Permits: how many requests run at once, how many may wait, and for how long.

Owns the queue at the door. Does not know workers. Called by the orchestrator, once per request.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from core.errors import Draining, Overloaded
from core.types import GenerateRequest

CANARY_TIER = "canary"
"""Tier of the requests behind `/ready`; they take no permit."""


class Admission:
    """First come, first served, bounded in number, in prompt tokens and in waiting time."""

    def __init__(
        self,
        max_running: int,
        max_queued: int,
        queue_wait_s: float,
        max_queued_tokens: int = 1 << 22,
    ) -> None:
        """Start with all permits free."""
        self._max_queued_tokens, self._num_queued_tokens = max_queued_tokens, 0
        self._max_running, self._max_queued, self._queue_wait_s = (
            max_running,
            max_queued,
            queue_wait_s,
        )
        self._waiting: OrderedDict[int, asyncio.Future[None]] = OrderedDict()
        self._next_ticket = 0
        self.num_running = 0
        self.is_draining = False

    @property
    def num_queued(self) -> int:
        """Requests waiting for a permit."""
        return len(self._waiting)

    @asynccontextmanager
    async def permit(self, request: GenerateRequest) -> AsyncIterator[None]:
        """Hold a permit for the length of the block.

        Raises:
            Overloaded: The queue is full, or no permit came in time; nothing is held.
            Draining: The router is shutting down.
        """
        if request.tier == CANARY_TIER:  # a full router is still able to get a request through
            yield
            return
        await self._acquire(len(request.token_ids))
        try:
            yield
        finally:
            self.num_running -= 1
            self._let_next_in()

    async def _acquire(self, num_tokens: int) -> None:
        if self.is_draining:
            raise Draining("the router is shutting down; try another one")
        if self.num_running < self._max_running and not self._waiting:
            self.num_running += 1
            return
        if len(self._waiting) >= self._max_queued:
            raise Overloaded(
                f"{self.num_running} requests run and {len(self._waiting)} wait, the limits are {self._max_running} and "
                f"{self._max_queued}; try again later"
            )
        if self._num_queued_tokens + num_tokens > self._max_queued_tokens:
            raise Overloaded(
                f"requests with {self._num_queued_tokens} prompt tokens wait, this one has {num_tokens}, the limit is "
                f"{self._max_queued_tokens}; try again later"
            )
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        future = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = future
        self._num_queued_tokens += num_tokens
        try:
            async with asyncio.timeout(self._queue_wait_s):
                await future
        except TimeoutError as error:
            raise Overloaded(
                f"no permit within {self._queue_wait_s:g} s; try again later"
            ) from error
        finally:
            self._waiting.pop(ticket, None)
            self._num_queued_tokens -= num_tokens
            # A permit granted in the very moment the waiter gave up goes on to the next one.
            if future.done() and not future.cancelled() and _is_giving_up():
                self.num_running -= 1
                self._let_next_in()

    def _let_next_in(self) -> None:
        while self._waiting and self.num_running < self._max_running:
            _, future = self._waiting.popitem(last=False)
            if not future.done():
                self.num_running += 1
                future.set_result(None)


def _is_giving_up() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
