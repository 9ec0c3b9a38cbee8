"""What must hold of quotas, whatever happens to routers, their clocks and their store.

Owns the checks, by the trial's own record of asks, answers and ends:

    Q1 nobody is granted more than is left of a limit, by all that a router must know; without the
       store, no more than the router's share, or one request
    Q2 a further run of a request pays nothing that an earlier one has paid
    Q3 at rest what was used counts: nothing of an estimate is left, and nothing is forgotten
    Q4 who is below the limit is not refused, beyond what faults have left open; and a store that
       has been well for 4.5 s is asked

Does not know how routers count, nor what is refused for other reasons.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Sequence

from core.errors import RateLimited, ServingError
from core.types import SamplingParams
from simulation.cluster import SimCluster
from simulation.metering import MeteredCall, identity_of, limit_of
from simulation.observers import ClusterObserver
from simulation.plan import PlannedRequest
from simulation.quota_record import (
    CALL_S,
    FREE,
    LEAST_RUNS,
    LEAST_WINDOW_S,
    TOLD_S,
    WELL_S,
    QuotaAsk,
    QuotaCost,
    least,
    most,
)
from simulation.report import Report
from simulation.router_node import SimRouter

SHARES_S = 2.0
"""After a loss, routers grant their shares so long at least."""


class QuotaWatch(ClusterObserver):
    """Hears of every ask, and checks each answer."""

    def __init__(self, cluster: SimCluster, report: Report) -> None:
        """Look on from now; `look` is to be called a few times a second."""
        cluster.observers.join(self)
        self._cluster = cluster
        self._report = report
        self._asks: dict[str, list[QuotaAsk]] = {}
        self._troubles = cluster.quota_troubles
        self._known: dict[str, None] = {}
        self._limit = limit_of(cluster.shape)
        num_routers = cluster.shape.router.replicas
        self._share = QuotaCost(
            *(max(1, count // num_routers) if count else 0 for count in self._limit)
        )

    # --- what goes wrong --------------------------------------------------------------------------

    def look(self) -> None:
        """Note what is wrong now with routers or their store."""
        cluster = self._cluster
        now_s = cluster.clock.now_s()
        store = cluster.quota_store
        troubles = self._troubles
        names = [router.name for router in cluster.routers]
        alive = [router.name for router in cluster.routers if router.is_alive]
        for name in self._known:
            if name not in names:
                troubles.died.setdefault(name, now_s)
        self._known.update(dict.fromkeys(names))
        clocks = cluster.router_clocks.values()
        turned = sum(clock.gained_s for clock in clocks), sum(clock.missed_s for clock in clocks)
        is_turned = turned != (troubles.gained_s, troubles.missed_s)
        troubles.gained_s, troubles.missed_s = turned
        troubles.lost_at_s = store.lost_at_s
        is_gone = len(alive) < len(cluster.routers) or any(n in cluster.paused for n in alive)
        is_busy = cluster.loop.turn_s > 0
        if store.mode != "ok" or store.cut or is_gone or is_busy or is_turned:
            troubles.note(now_s)

    # --- Q1, Q2, Q4: with every answer ------------------------------------------------------------

    def charge_asked(self, ask: QuotaAsk) -> None:
        """Keep it: from now on it may count."""
        self.look()
        self._asks.setdefault(ask.key, []).append(ask)

    def charge_answered(self, ask: QuotaAsk, error: ServingError | None) -> None:
        """Check what became of it."""
        self.look()
        now_s = self._cluster.clock.now_s()
        self._report.charges += error is None
        self._report.over_quota += isinstance(error, RateLimited)
        self._report.local_charges += ask.is_local
        if ask.is_local and self._troubles.is_well(now_s):
            self._violated("Q4", ask, "was decided without a store that is well")
        others = [other for other in self._asks[ask.key] if other is not ask]
        if error is None:
            self._check_granted(ask, others, now_s)
        elif isinstance(error, RateLimited):
            self._check_refused(ask, others, now_s)
        else:
            self._violated("Q4", ask, f"was answered by {error!r}")

    def _check_granted(self, ask: QuotaAsk, others: list[QuotaAsk], now_s: float) -> None:
        earlier = [other for other in others if other.request_id == ask.request_id]
        if not ask.is_local and any(other.is_granted and not other.is_local for other in earlier):
            self._check_paid_once(ask, earlier, now_s)
            return
        if not ask.is_local:
            known = least(others, ask.router, ask.asked_s, now_s, self._troubles)
            if known.plus(ask.estimate).is_over(self._limit):
                self._violated("Q1", ask, f"was granted beside {known}, the limit is {self._limit}")
        if ask.is_local or self._has_only_shares(ask, now_s):
            own = [other for other in others if _is_of(other, ask.router, others)]
            used = least(own, ask.router, ask.asked_s, now_s, self._troubles)
            if used != FREE and used.plus(ask.estimate).is_over(self._share):
                self._violated("Q1", ask, f"was granted beside {used}, the share is {self._share}")

    def _has_only_shares(self, ask: QuotaAsk, now_s: float) -> bool:
        """True just after a loss that every router has to notice, if nothing else is wrong."""
        lost_s = self._troubles.lost_at_s
        return (
            self._cluster.shape.router.replicas > 1
            and lost_s < ask.asked_s
            and now_s < lost_s + SHARES_S
            and self._troubles.is_quiet(lost_s - WELL_S, lost_s - CALL_S)
            and self._troubles.is_quiet(math.nextafter(lost_s, math.inf))
        )

    def _check_paid_once(self, ask: QuotaAsk, earlier: list[QuotaAsk], now_s: float) -> None:
        if len(earlier) >= LEAST_RUNS:
            return
        paid = FREE
        for other in earlier:
            is_before = other.is_granted and not other.is_local
            is_before = is_before and (other.answered_s or math.inf) < ask.asked_s
            is_kept = self._troubles.lost_at_s < other.asked_s
            age_s = now_s - other.asked_s + self._troubles.gained_s
            if is_before and is_kept and age_s < LEAST_WINDOW_S:
                paid = paid.high(other.estimate if other.ended_s is None else other.settled)
        if ask.charged.less(ask.estimate.less(paid)) != FREE:
            self._violated("Q2", ask, f"pays {ask.charged}, of which {paid} is paid")

    def _check_refused(self, ask: QuotaAsk, others: list[QuotaAsk], now_s: float) -> None:
        counted = most(others, now_s, self._troubles)
        if counted.plus(ask.estimate).is_over(self._limit):
            return
        own = most([o for o in others if _is_of(o, ask.router, others)], now_s, self._troubles)
        is_over_share = own != FREE and own.plus(ask.estimate).is_over(self._share)
        if self._troubles.is_well(now_s) or not is_over_share:
            self._violated(
                "Q4",
                ask,
                f"was refused, at most {counted} count of {self._limit}, {own} of its router",
            )

    def _violated(self, rule: str, ask: QuotaAsk, fact: str) -> None:
        self._report.violated(
            f"{rule} {ask.router}: {ask.request_id} of {ask.key}, {ask.estimate}, {fact}"
        )

    # --- Q3: at rest ------------------------------------------------------------------------------

    async def check_rest(self) -> None:
        """Q3: every router knows what was used, after one more request of each key."""
        for router in self._cluster.routers:
            for key in list(self._asks):
                await self._probe(router, key)
                await asyncio.sleep(TOLD_S)
                self.look()
                self._check_left(router, key)

    async def _probe(self, router: SimRouter, key: str) -> None:
        """Let a router compare: a request is asked for and not served."""
        planned = PlannedRequest(
            0.0, f"rest-{router.name}", (1,), SamplingParams(max_tokens=1), key=key
        )
        request = self._cluster.request(planned.name, planned.prompt, planned.sampling)
        wake = asyncio.Event()
        call = MeteredCall(self._cluster, router, planned, request, wake)
        await wake.wait()
        router.closed(wake)
        with contextlib.suppress(RateLimited):
            await call.stream.close()

    def _check_left(self, router: SimRouter, key: str) -> None:
        now_s = self._cluster.clock.now_s()
        troubles = self._troubles
        asks = self._asks[key]
        limit = self._limit
        if not troubles.has_store:
            asks = [ask for ask in asks if ask.router == router.name]
            limit = self._share
        counted = most(asks, now_s, troubles)
        known = least(asks, router.name, now_s, now_s, troubles)
        shown = router.charging.headers(identity_of(key))
        for index, kind in enumerate(QuotaCost._fields):
            if not limit[index]:
                continue
            left = int(shown[f"x-ratelimit-remaining-{kind}"])
            if not limit[index] - counted[index] <= left <= max(0, limit[index] - known[index]):
                self._report.violated(
                    f"Q3 {router.name}: {left} {kind} of {limit[index]} are left to {key}, "
                    f"between {known[index]} and {counted[index]} count"
                )


def _is_of(ask: QuotaAsk, router: str, asks: Sequence[QuotaAsk]) -> bool:
    """True for what a router has charged itself: a further run may lean on another's charge."""
    return ask.router == router and not any(
        other.request_id == ask.request_id
        and other.router != router
        and other.asked_s < ask.asked_s
        and not ask.is_local
        for other in asks
    )
