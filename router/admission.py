"""Permits: how many requests run at once, how many may wait, and for how long.

Owns the queue at the door and every permit: what is granted is counted at once, whoever was granted
it gives it back. Does not know workers. Called by the orchestrator, once per request.
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
        self._max_running = max_running
        self._max_queued = max_queued
        self._queue_wait_s = queue_wait_s
        self._max_queued_tokens = max_queued_tokens
        self._num_queued_tokens = 0
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
            self._release()

    async def _acquire(self, num_tokens: int) -> None:
        if self.is_draining:
            raise Draining("the router is shutting down; try another one")
        if self.num_running < self._max_running and not self._waiting:
            self.num_running += 1
            return
        self._check_room(num_tokens)
        loop = asyncio.get_running_loop()
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        granted: asyncio.Future[None] = loop.create_future()
        self._waiting[ticket] = granted
        self._num_queued_tokens += num_tokens
        timer = loop.call_later(self._queue_wait_s, self._refuse, granted)
        try:
            await granted
        except asyncio.CancelledError:
            if _is_granted(granted):  # in the very turn in which its waiter left
                self._release()
            raise
        finally:
            timer.cancel()
            self._waiting.pop(ticket, None)
            self._num_queued_tokens -= num_tokens

    def _check_room(self, num_tokens: int) -> None:
        if len(self._waiting) >= self._max_queued:
            raise Overloaded(
                f"{self.num_running} requests run and {len(self._waiting)} wait, "
                f"the limits are {self._max_running} and {self._max_queued}; try again later"
            )
        if self._num_queued_tokens + num_tokens > self._max_queued_tokens:
            raise Overloaded(
                f"requests with {self._num_queued_tokens} prompt tokens wait, this one has "
                f"{num_tokens}, the limit is {self._max_queued_tokens}; try again later"
            )

    def _refuse(self, granted: asyncio.Future[None]) -> None:
        """The waiter's time is over; the future is settled once, so a permit that came before stands."""
        if not granted.done():
            granted.set_exception(
                Overloaded(f"no permit within {self._queue_wait_s:g} s; try again later")
            )

    def _release(self) -> None:
        """Give one permit back, to whoever is next."""
        self.num_running -= 1
        while self._waiting and self.num_running < self._max_running:
            _, granted = self._waiting.popitem(last=False)
            if not granted.done():
                self.num_running += 1
                granted.set_result(None)


def _is_granted(future: asyncio.Future[None]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
