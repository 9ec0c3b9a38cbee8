"""Permits: how many requests run at once, how many may wait, and for how long.

Owns the queue of waiting requests, and every permit: granting one counts it at once, and its holder
gives it back. Does not know workers.

A request takes a permit for each of its choices. Tenants take turns, and a full queue makes room
for the tenant with fewer in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from core.errors import Draining, InvalidRequest, Overloaded
from core.types import CANARY_TIER, MAX_CHOICES, GenerateRequest
from router.fair_queue import FairQueue


@dataclass(eq=False, slots=True)
class _Waiter:
    """A request that waits for its permits."""

    granted: asyncio.Future[None]
    num_permits: int


class Admission:
    """Tenants take turns, each first come first served; bounded in number, tokens and time."""

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
        self._waiting: FairQueue[_Waiter] = FairQueue(max_queued)
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
        if request.tier == CANARY_TIER:  # a full router is still ready
            yield
            return
        num_permits = self._num_permits(request.sampling.n)
        await self._acquire(len(request.token_ids), request.tenant, num_permits)
        try:
            yield
        finally:
            self._release(num_permits)

    def check_open(self, tenant: str) -> None:
        """Refuse early, before any work, what would find no place in the queue.

        Raises:
            Overloaded: The queue is full, and no other tenant has to make room.
            Draining: The router is shutting down.
        """
        if self.is_draining:
            raise Draining("the router is shutting down; try another one")
        is_free = self.num_running < self._max_running and not self._waiting
        if not is_free and not self._waiting.has_room_for(tenant):
            raise self._full()

    def _full(self) -> Overloaded:
        return Overloaded(
            f"{self.num_running} requests run and {len(self._waiting)} wait, "
            f"the limits are {self._max_running} and {self._max_queued}; try again later"
        )

    def check_share(self, num_prompts: int, num_choices: int) -> None:
        """Refuse a reply that would need more than half of all permits.

        Raises:
            InvalidRequest: Names how many outputs it may have.
        """
        # A reply of one prompt with the most choices is always allowed, however few may run.
        share = max(MAX_CHOICES, self._max_running // 2)
        if num_prompts * num_choices > share:
            raise InvalidRequest(
                "prompt",
                f"asks for {num_prompts} prompts x n = {num_choices}, which is "
                f"{num_prompts * num_choices} outputs at once, the limit is {share}; "
                "send fewer prompts in one request or raise router.max_running",
            )

    def _num_permits(self, num_choices: int) -> int:
        # One with more choices than there are permits runs alone; otherwise it would never run.
        return max(1, min(num_choices, self._max_running))

    async def _acquire(self, num_tokens: int, tenant: str = "", num_permits: int = 1) -> None:
        if self.is_draining:
            raise Draining("the router is shutting down; try another one")
        if self.num_running + num_permits <= self._max_running and not self._waiting:
            self.num_running += num_permits
            return
        self._check_room(num_tokens)
        loop = asyncio.get_running_loop()
        granted: asyncio.Future[None] = loop.create_future()
        waiter = _Waiter(granted, num_permits)
        self._join(tenant, waiter)
        self._num_queued_tokens += num_tokens
        # A timer and not `asyncio.timeout`: a grant and the time's end may meet in one turn of the
        # loop, and the future says which was first.
        timer = loop.call_later(self._queue_wait_s, self._refuse, granted)
        try:
            await granted
        except asyncio.CancelledError:
            if _is_granted(granted):  # in the same turn of the loop in which the waiter left
                self._release(num_permits)
            raise
        finally:
            timer.cancel()
            self._waiting.leave(tenant, waiter)
            self._num_queued_tokens -= num_tokens
            self._grant_next()  # others may have waited behind a request that needed more

    def _join(self, tenant: str, waiter: _Waiter) -> None:
        """Queue a waiter; in a full queue it replaces another tenant's newest."""
        evicted = self._waiting.join(tenant, waiter)
        if evicted is None:
            return
        if evicted is waiter:
            raise self._full()
        if not evicted.granted.done():
            evicted.granted.set_exception(self._full())

    def _check_room(self, num_tokens: int) -> None:
        if self._num_queued_tokens + num_tokens > self._max_queued_tokens:
            raise Overloaded(
                f"requests with {self._num_queued_tokens} prompt tokens wait, this one has "
                f"{num_tokens}, the limit is {self._max_queued_tokens}; try again later"
            )

    def _refuse(self, granted: asyncio.Future[None]) -> None:
        """End a wait that took too long, unless the permit came first."""
        if not granted.done():
            granted.set_exception(
                Overloaded(f"no permit within {self._queue_wait_s:g} s; try again later")
            )

    def _release(self, num_permits: int = 1) -> None:
        """Give permits back."""
        self.num_running -= num_permits
        self._grant_next()

    def _grant_next(self) -> None:
        """Grant free permits in the queue's order: small requests do not overtake a large one."""
        while (waiter := self._waiting.peek()) is not None:
            # Refused or cancelled, and not yet gone from its queue: its task has not run since.
            if waiter.granted.done():
                self._waiting.take()
                continue
            if self.num_running + waiter.num_permits > self._max_running:
                return
            self._waiting.take()
            self.num_running += waiter.num_permits
            waiter.granted.set_result(None)


def _is_granted(settled: asyncio.Future[None]) -> bool:
    return not settled.cancelled() and settled.exception() is None
