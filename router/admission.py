"""Permits: how many requests run at once, how many may wait, and for how long.

Owns how a request comes to its permits: granting them counts them at once, and their holder gives
them back. Does not know workers; leaves to `router.permits` who may have how many, to
`router.tier_queues` who goes next and who makes room, and to `router.load_shedding` what would come
too late.

A request arrives from its head until it could run: while its body comes, is tokenized, and is
charged to its key. It will want a permit, so newcomers are refused for it as for one that waits.
Otherwise a burst would pass as long as the queue looks empty, and be refused only after all the
work that early refusal is to save. Who takes long to arrive is not waited for, and whoever is whole
goes before those whose bodies still come: they may come slowly, or never, while permits are free.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from core.clocks import LoopClock
from core.config import TierConfig, default_tiers
from core.errors import Draining, InvalidRequest, Overloaded, QueueFull, QueueTimeout
from core.ids import Ids
from core.types import CANARY_TIER, MAX_CHOICES, GenerateRequest
from router.expected_wait import Ahead
from router.load_shedding import LoadShedding, OnExpected, Shortage
from router.permits import Permits
from router.tier_queues import QueuedAhead, TierQueues, Waiter
from router.token_use import TokenUse

MAX_ARRIVAL_S = 2.0
"""Half-sent bodies must not keep others out."""
NO_QUEUE_LIMITS = {"max_queued": None, "max_queued_tokens": None}


@dataclass(eq=False, slots=True)
class _Waiter(Waiter):
    """A request that waits for its permits."""

    granted: asyncio.Future[None]


class Admission:
    """Tiers in their order, tenants in turn; bounded in number, tokens and time."""

    def __init__(
        self,
        max_running: int,
        max_queued: int,
        queue_wait_s: float,
        max_queued_tokens: int = 1 << 22,
        tiers: Mapping[str, TierConfig] | None = None,
        shedding: LoadShedding | None = None,
    ) -> None:
        """Start with all permits free; the limits are those of all tiers together."""
        self._tiers = default_tiers() if tiers is None else tiers
        self._shedding = shedding or LoadShedding(LoopClock(), Ids(), self._tiers, queue_wait_s)
        self._permits = Permits(max_running, self._tiers)
        self._max_queued = max_queued
        self._queue_wait_s = queue_wait_s
        self._waiting: TierQueues[_Waiter] = TierQueues(self._tiers, max_queued, max_queued_tokens)
        # As many may arrive as could run or wait, however few of its own tier may wait.
        unlimited = {n: t.model_copy(update=NO_QUEUE_LIMITS) for n, t in self._tiers.items()}
        max_arriving = max_running + max_queued
        self._arriving: TierQueues[Waiter] = TierQueues(unlimited, max_arriving, max_queued_tokens)
        self._whole: TierQueues[Waiter] = TierQueues(unlimited, max_arriving, max_queued_tokens)
        """Those among the arriving whose bodies have come."""
        self._token_use = {name: TokenUse() for name in self._tiers}
        self.num_refused: Counter[str] = Counter(dict.fromkeys(self._tiers, 0))
        """Requests for which there was no room or no time, by tier."""
        self.num_overflowed: Counter[str] = Counter(dict.fromkeys(self._tiers, 0))
        """Requests for which there was none, and that another tier took, by the first tier."""
        self.is_draining = False

    @property
    def num_running(self) -> int:
        """Permits that are taken."""
        return self._permits.num_taken

    @property
    def num_queued(self) -> int:
        """Requests waiting for a permit."""
        return len(self._waiting)

    def running_by_tier(self) -> dict[str, int]:
        """Count the permits that are taken."""
        return self._permits.taken_by_tier()

    def queued_by_tier(self) -> dict[str, int]:
        """Count the requests that wait for a permit."""
        return {name: len(queue.waiters) for name, queue in self._waiting.by_tier.items()}

    @asynccontextmanager
    async def permit(
        self,
        request: GenerateRequest,
        on_expected: OnExpected | None = None,
        count_output: Callable[[], int] = int,
    ) -> AsyncIterator[None]:
        """Hold a permit for the length of the block.

        Args:
            request: Takes a permit for each of its choices.
            on_expected: Hears of the predicted wait.
            count_output: Counts its output tokens, at its end.

        Raises:
            Overloaded: The queue is full, no permit came in time or none will; nothing is held.
            Draining: The router is shutting down.
        """
        if request.tier == CANARY_TIER:  # a full router is still ready
            yield
            return
        tier = request.tier
        num_tokens = len(request.token_ids)
        self._check_draining()
        ahead = self._ahead_of(tier, request.tenant)
        shortage = self._shedding.too_late(
            tier, ahead, num_tokens, request.deadline_at, on_expected
        )
        if shortage is not None:
            raise self._refusal(tier, shortage)
        num_permits = self._permits.num_for(tier, request.sampling.n)
        await self._acquire(tier, request.tenant, num_permits, num_tokens)
        try:
            yield
        finally:
            self._token_use[tier].ended(request.tenant, num_tokens, count_output())
            self._release(tier, request.tenant, num_permits)

    def arrive(
        self, tier: str, tenant: str, others: Sequence[str] = (), *, is_whole: bool = False
    ) -> Callable[[], None]:
        """Count a newcomer as arriving, unless it is refused.

        Returns:
            Leaves its place; calling it again is harmless.

        Raises:
            Overloaded: As `check_open`.
            Draining: As `check_open`.
        """
        self.check_open(tier, tenant, others, is_whole=is_whole)
        now_s = asyncio.get_running_loop().time()
        newcomer = Waiter(tier, tenant, num_permits=1, num_tokens=0, joined_at=now_s)
        places = (self._arriving, self._whole) if is_whole else (self._arriving,)
        for queues in places:
            # Whoever leaves its place to it is counted no more, and finds its room or not.
            if queues.has_place_for(tier, tenant):
                queues.join(newcomer)

        def leave() -> None:
            for queues in places:
                queues.leave(newcomer)

        return leave

    def check_open(
        self, tier: str, tenant: str, others: Sequence[str] = (), *, is_whole: bool = False
    ) -> str:
        """Refuse early, before any work, what would find no place in the queue, or wait too long.

        Args:
            tier: The request's, which counts its refusal.
            tenant: Whose it is.
            others: Tiers that it may turn out to ask for: it is only refused if there is room in
                none of them either.
            is_whole: Its body is here, so that those whose bodies still come are behind it.

        Returns:
            The first of the tiers in which there is room.

        Raises:
            QueueFull: Nobody has to make room.
            TooLate: It would wait too long.
            Draining: The router is shutting down.
        """
        self._check_draining()
        self._forget_late_arrivals()
        arriving = self._whole if is_whole else self._arriving
        shortages = []
        for name in dict.fromkeys((tier, *others)):
            shortage = self._shortage(name, tenant, arriving)
            if shortage is None:
                return name
            shortages.append(shortage)
        raise self._refusal(tier, min(shortages, key=lambda one: one.room_in_s))

    def first_open(self, tier: str, tenant: str, others: Sequence[str]) -> str:
        """Return the first of `tier` and `others` that has room for a request whose body is here.

        Raises:
            Overloaded: As `check_open`.
            Draining: As `check_open`.
        """
        found = self.check_open(tier, tenant, others, is_whole=True)
        self.num_overflowed[tier] += found != tier
        return found

    def _check_draining(self) -> None:
        if self.is_draining:
            raise Draining("the router is shutting down; try another one")

    def _ahead_of(self, tier: str, tenant: str) -> Ahead:
        """Foresee what goes before a request that is made."""
        queued = self._waiting.ahead_of(tier, tenant, asyncio.get_running_loop().time())
        return self._ahead(tier, queued, self._may_run_now(tier, tenant, 1))

    def _ahead_of_newcomer(self, tier: str, tenant: str, among: TierQueues[Waiter]) -> Ahead:
        """Foresee what goes before one that is still to be made: those who arrive, too."""
        now_s = asyncio.get_running_loop().time()
        queued = self._waiting.ahead_of(tier, tenant, now_s)
        arriving = among.ahead_of(tier, tenant, now_s)
        num_ahead = QueuedAhead(
            queued.num_requests + arriving.num_requests,
            queued.num_own + arriving.num_own,
            queued.num_tokens,
        )
        is_free = (
            self._may_run_now(tier, tenant, arriving.num_own + 1)
            and arriving.num_requests < self._permits.num_free
        )
        return self._ahead(tier, num_ahead, is_free)

    def _forget_late_arrivals(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for arriving in (self._arriving, self._whole):
            for queue in arriving.by_tier.values():
                while (first := queue.waiters.oldest) and first.joined_at < now_s - MAX_ARRIVAL_S:
                    arriving.leave(first)

    def _ahead(self, tier: str, queued: QueuedAhead, is_free: bool) -> Ahead:
        share = self._permits.share_of(tier)
        num_left = share - self.running_by_tier()[tier]
        is_limited = share < self._permits.num_permits
        return Ahead(
            num_running=self.num_running,
            num_requests=queued.num_requests,
            num_tokens=queued.num_tokens,
            is_free=is_free,
            num_own_releases=max(0, queued.num_own + 1 - num_left) if is_limited else 0,
        )

    def _shortage(self, tier: str, tenant: str, arriving: TierQueues[Waiter]) -> Shortage | None:
        """Say why a newcomer would be refused; None: it is let in."""
        ahead = self._ahead_of_newcomer(tier, tenant, arriving)
        has_place = arriving.has_place_for(tier, tenant) and (
            ahead.is_free or self._waiting.has_place_for(tier, tenant)
        )
        return self._shedding.too_late(tier, ahead) if has_place else self._full(tier, tenant)

    def _full(self, tier: str, tenant: str) -> Shortage:
        queue = self._waiting.by_tier[tier]
        message = (
            f"{self.num_running} requests run and {self.num_queued} wait, {len(self._arriving)} "
            f"arrive; the limits are {self._permits.num_permits} and {self._max_queued} (of tier "
            f"{tier} {self.running_by_tier()[tier]} and {len(queue.waiters)}, "
            f"{self._permits.share_of(tier)} and {queue.max_queued}); try again later"
        )
        return self._no_room(tier, tenant, QueueFull, message)

    def _no_room(self, tier: str, tenant: str, kind: type[Overloaded], message: str) -> Shortage:
        return Shortage(kind, message, self._shedding.room_in_s(tier, self._ahead_of(tier, tenant)))

    def _refusal(self, tier: str, shortage: Shortage) -> Overloaded:
        self.num_refused[tier] += 1
        return self._shedding.refusal(shortage)

    def check_share(self, num_prompts: int, num_choices: int) -> None:
        """Refuse a reply that would need more than half of all permits.

        Raises:
            InvalidRequest: Names how many outputs it may have.
        """
        # A reply of one prompt with the most choices is always allowed, however few may run.
        share = max(MAX_CHOICES, self._permits.num_permits // 2)
        if num_prompts * num_choices > share:
            raise InvalidRequest(
                "prompt",
                f"asks for {num_prompts} prompts x n = {num_choices}, which is "
                f"{num_prompts * num_choices} outputs at once, the limit is {share}; "
                "send fewer prompts in one request or raise router.max_running",
            )

    # --- waiting ----------------------------------------------------------------------------------

    async def _acquire(self, tier: str, tenant: str, num_permits: int, num_tokens: int) -> None:
        if self._may_run_now(tier, tenant, num_permits):
            self._permits.take(tier, tenant, num_permits)
            return
        loop = asyncio.get_running_loop()
        granted: asyncio.Future[None] = loop.create_future()
        waiter = _Waiter(tier, tenant, num_permits, num_tokens, loop.time(), granted)
        self._join(waiter)
        # A timer and not `asyncio.timeout`: a grant and the time's end may meet in one turn of the
        # loop, and the future says which was first.
        wait_s = self._tiers[tier].queue_wait_s or self._queue_wait_s
        timer = loop.call_later(wait_s, self._refuse, waiter, wait_s)
        try:
            await granted
        except asyncio.CancelledError:
            if _is_granted(granted):  # in the same turn of the loop in which the waiter left
                self._release(tier, tenant, num_permits)
            raise
        finally:
            timer.cancel()
            self._waiting.leave(waiter)
            self._grant_next()  # others may have waited behind a request that needed more

    def _join(self, waiter: _Waiter) -> None:
        """Queue a waiter; whoever has to leave for it is refused."""
        tier = waiter.tier
        over = self._waiting.token_limit(tier, waiter.num_tokens)
        if over is not None:
            message = (
                f"requests with {over[0]} prompt tokens wait, this one has {waiter.num_tokens}, "
                f"the limit is {over[1]}; try again later"
            )
            raise self._refusal(tier, self._no_room(tier, waiter.tenant, QueueFull, message))
        if not self._waiting.has_place_for(tier, waiter.tenant):
            raise self._refusal(tier, self._full(tier, waiter.tenant))
        for evicted in self._waiting.join(waiter):
            if not evicted.granted.done():
                error = self._refusal(evicted.tier, self._full(evicted.tier, evicted.tenant))
                evicted.granted.set_exception(error)

    def _refuse(self, waiter: _Waiter, wait_s: float) -> None:
        """End a wait that took too long, unless the permit came first."""
        if not waiter.granted.done():
            self._waiting.leave(waiter)
            message = f"no permit within {wait_s:g} s; try again later"
            shortage = self._no_room(waiter.tier, waiter.tenant, QueueTimeout, message)
            waiter.granted.set_exception(self._refusal(waiter.tier, shortage))

    # --- granting ---------------------------------------------------------------------------------

    def _release(self, tier: str, tenant: str, num_permits: int) -> None:
        """Give permits back."""
        self._permits.give_back(tier, tenant, num_permits)
        self._grant_next()
        awaited = {name for name, queue in self._waiting.by_tier.items() if queue.waiters}
        in_share = {name for name in awaited if self._permits.is_within_share(name, 1)}
        self._shedding.released(
            tier, is_awaited=bool(in_share), is_share_awaited=tier in awaited - in_share
        )

    def _may_run_now(self, tier: str, tenant: str, num_permits: int) -> bool:
        """True if a newcomer needs not wait: there are permits, and nobody goes before it."""
        permits = self._permits
        if (
            num_permits > permits.num_free
            or not permits.is_within_share(tier, num_permits)
            or not permits.is_within_part(tier, tenant, num_permits)
        ):
            return False
        first = self._next()
        if self._waiting.by_tier[tier].waiters.peek(self._is_within_part) is not None:
            return False
        due_at = asyncio.get_running_loop().time() + self._tiers[tier].delay_s
        return first is None or self._waiting.by_tier[first.tier].due_at > due_at

    def _next(self) -> _Waiter | None:
        """Return whose turn it is. A tenant that has its part is passed by the others.

        A tier that has its share waits for permits of its own.
        """
        for queue in self._waiting.in_turn():
            while (waiter := queue.waiters.peek(self._is_within_part)) is not None:
                if not waiter.granted.done():
                    break
                # Cancelled, and not yet gone from the queue: its task has not run since.
                self._waiting.leave(waiter)
            if waiter and self._permits.is_within_share(waiter.tier, waiter.num_permits):
                return waiter
        return None

    def _is_within_part(self, waiter: _Waiter) -> bool:
        return self._permits.is_within_part(waiter.tier, waiter.tenant, waiter.num_permits)

    def _grant_next(self) -> None:
        """Grant free permits in the queue's order: small requests do not overtake a large one."""
        while (waiter := self._next()) is not None:
            if waiter.num_permits > self._permits.num_free:
                return
            use = self._token_use[waiter.tier]
            self._waiting.take(waiter, use.turns(waiter.tenant, waiter.num_tokens))
            self._permits.take(waiter.tier, waiter.tenant, waiter.num_permits)
            waiter.granted.set_result(None)


def _is_granted(settled: asyncio.Future[None]) -> bool:
    return not settled.cancelled() and settled.exception() is None
