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

from core.clocks import LoopClock
from core.errors import Draining, InvalidRequest, QueueFull, QueueTimeout
from core.ids import Ids
from core.types import MAX_CHOICES, GenerateRequest
from router.expected_wait import Ahead
from router.fair_queue import FairQueue
from router.load_shedding import LoadShedding

CANARY_TIER = "canary"
"""Tier of the requests behind `/ready`; they take no permit."""


@dataclass(eq=False, slots=True)
class _Waiter:
    """A request that waits for its permits."""

    tenant: str
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
        shedding: LoadShedding | None = None,
    ) -> None:
        """Start with all permits free."""
        self._shedding = shedding or LoadShedding(LoopClock(), Ids(), queue_wait_s)
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
            Overloaded: The queue is full, no permit came in time or none will; nothing is held.
            Draining: The router is shutting down.
        """
        if request.tier == CANARY_TIER:  # a full router is still ready
            yield
            return
        num_permits = self._num_permits(request.sampling.n)
        num_tokens = len(request.token_ids)
        self._check_draining()
        self._shedding.check(self._ahead_of(request.tenant), num_tokens, request.deadline_at)
        await self._acquire(num_tokens, request.tenant, num_permits)
        try:
            yield
        finally:
            self._release(num_permits)

    def check_open(self, tenant: str) -> None:
        """Refuse early, before any work, what would find no place in the queue.

        Raises:
            QueueFull: No other tenant has to make room.
            TooLate: It would wait too long.
            Draining: The router is shutting down.
        """
        self._check_draining()
        ahead = self._ahead_of(tenant)
        if not ahead.is_free and not self._waiting.has_room_for(tenant):
            raise self._full(tenant)
        self._shedding.check(ahead)

    def _check_draining(self) -> None:
        if self.is_draining:
            raise Draining("the router is shutting down; try another one")

    def _ahead_of(self, tenant: str) -> Ahead:
        num_ahead = self._waiting.num_ahead(tenant)
        share = num_ahead / max(1, len(self._waiting))
        is_free = self.num_running < self._max_running and not self._waiting
        return Ahead(self.num_running, num_ahead, round(self._num_queued_tokens * share), is_free)

    def _full(self, tenant: str) -> QueueFull:
        return QueueFull(
            f"{self.num_running} requests run and {len(self._waiting)} wait, "
            f"the limits are {self._max_running} and {self._max_queued}; try again later",
            self._shedding.retry_when_free_s(self._ahead_of(tenant)),
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
        if self.num_running + num_permits <= self._max_running and not self._waiting:
            self.num_running += num_permits
            return
        self._check_room(num_tokens, tenant)
        loop = asyncio.get_running_loop()
        granted: asyncio.Future[None] = loop.create_future()
        waiter = _Waiter(tenant, granted, num_permits)
        self._join(tenant, waiter)
        self._num_queued_tokens += num_tokens
        # A timer and not `asyncio.timeout`: a grant and the time's end may meet in one turn of the
        # loop, and the future says which was first.
        timer = loop.call_later(self._queue_wait_s, self._refuse, waiter)
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
            raise self._full(tenant)
        if not evicted.granted.done():
            evicted.granted.set_exception(self._full(evicted.tenant))

    def _check_room(self, num_tokens: int, tenant: str) -> None:
        if self._num_queued_tokens + num_tokens > self._max_queued_tokens:
            raise QueueFull(
                f"requests with {self._num_queued_tokens} prompt tokens wait, this one has "
                f"{num_tokens}, the limit is {self._max_queued_tokens}; try again later",
                self._shedding.retry_when_free_s(self._ahead_of(tenant)),
            )

    def _refuse(self, waiter: _Waiter) -> None:
        """End a wait that took too long, unless the permit came first."""
        if not waiter.granted.done():
            waiter.granted.set_exception(
                QueueTimeout(
                    f"no permit within {self._queue_wait_s:g} s; try again later",
                    self._shedding.retry_when_free_s(self._ahead_of(waiter.tenant)),
                )
            )

    def _release(self, num_permits: int = 1) -> None:
        """Give permits back."""
        self.num_running -= num_permits
        self._grant_next()
        self._shedding.released(is_awaited=bool(self._waiting))

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
