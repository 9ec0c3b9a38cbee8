"""What must hold of the whole cluster, while it runs and when it is at rest.

Owns the checks that no single stream shows:

    I6 queues stay under their bounds          L2 after the last fault, service is whole again
    L3 at rest nothing is left                 L4 who waits for a worker is woken when there is one
    I8 nobody who moves is taken for dead      X1 no exception is left that nobody caught
    I9 no message is sent that is over its transport's limit
    L1 what is unfinished waits for something that is still to come
    F5 nobody gets a permit before one of another tier that is due first and may have it

Does not know clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from core.config import TierConfig
from core.errors import InvariantViolation, NoWorker, ServingError, WorkerDied
from core.types import RequestEnded, SamplingParams
from router.placement import Placement, PlacementConstraints, choose
from router.prompt_prefixes import PromptNames
from router.request_state import RequestState
from router.request_stream import RequestStream
from simulation.cluster import SimCluster
from simulation.observers import ClusterObserver
from simulation.pool_invariants import may_use
from simulation.prefix_invariants import SETTLED_S, check_views
from simulation.report import Report
from simulation.router_node import SimRouter
from simulation.wait_reasons import WaitReason, wait_reason_of

WATCH_S = 0.25
UNUSED_WORKER_S = 1.0
PROBES_PER_ROUTER = 2
RECOVERY_S = 8.0
DEATH_REPORT_S = 8.0
"""How long after its cause a worker may still be taken for dead: its 3 s without progress, its
session's 5 s of silence, or both in part."""


class Watch(ClusterObserver):
    """Looks at a cluster every quarter of a second."""

    def __init__(
        self, cluster: SimCluster, report: Report, looks: Sequence[Callable[[], None]]
    ) -> None:
        """Look on from now; `run` looks at what stands still, and calls each of `looks`."""
        cluster.observers.join(self)
        self._cluster = cluster
        self._report = report
        self._looks = looks
        self._suspects: list[str] = []
        self._placing: dict[int, tuple[SimRouter, RequestState, float]] = {}
        self._watched: dict[str, None] = {}

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            for router in self._cluster.routers:
                if router.name not in self._watched:
                    self._watched[router.name] = None
                    self._watch_router(router)
            await asyncio.sleep(WATCH_S)
            self._check_bounds()
            self._check_wait_reasons()
            self._check_placing()
            for look in self._looks:
                look()

    def _check_bounds(self) -> None:
        """I6: nothing that workers hold for a router outgrows what its requests may have open."""
        credit = self._cluster.shape.router.credit_positions
        for node, unit in self._cluster.units.items():
            for attempt in unit.attempts.by_run.values():
                for choice, log in attempt.logs.items():
                    num_unsent = len(log.tokens) - log.num_sent
                    if num_unsent > max(credit, attempt.submit.credit) + 1:
                        self._report.violated(f"I6 {node}: {num_unsent} unsent of {choice}")

    def _check_wait_reasons(self) -> None:
        """Twice in a row, so that a wake-up under way is not taken for a lost one."""
        found = [*_lost_wake_ups(self._cluster), *_idle_permits(self._cluster)]
        for suspect in found:
            if suspect in self._suspects:
                self._report.violated(suspect)
        self._suspects = found

    # --- routers ----------------------------------------------------------------------------------

    def _watch_router(self, router: SimRouter) -> None:
        place = router.attempts._place

        async def watched(
            run: RequestState, after: ServingError | None, names: PromptNames
        ) -> Placement:
            key = id(run)
            self._placing[key] = (router, run, asyncio.get_running_loop().time())
            try:
                placement = await place(run, after, names)
                self._cluster.observers.placed(router.name, run, names, placement)
                return placement
            finally:
                self._placing.pop(key, None)

        router.attempts._place = watched  # type: ignore[method-assign]
        self._watch_permits(router)

    def _watch_permits(self, router: SimRouter) -> None:
        """F5, at every permit that was waited for."""
        admission = router.admission
        waiting = admission._waiting
        take = waiting.take

        def watched(waiter: Any, num_turns: float) -> None:  # noqa: ANN401 - admission's own kind
            due_at = waiting.by_tier[waiter.tier].due_at
            for other in waiting.in_turn():
                first = other.waiters.peek(admission._is_within_part)
                if first is None or other.due_at >= due_at:
                    continue
                if admission._permits.is_within_share(first.tier, first.num_permits):
                    self._report.violated(f"F5 {router.name}: a permit went past {first.tier}")
            take(waiter, num_turns)

        waiting.take = watched  # type: ignore[method-assign, assignment]

    def _check_placing(self) -> None:
        """L4: nobody waits for a placement that could be made."""
        now_s = asyncio.get_running_loop().time()
        for key, (router, run, since_s) in list(self._placing.items()):
            if not router.is_alive:
                del self._placing[key]
            # The clock starts when a placement first becomes possible, not when it was asked for.
            elif router.name in self._cluster.paused or not _could_place(
                router, run, self._cluster.shape.tiers
            ):
                self._placing[key] = (router, run, now_s)
            elif now_s - since_s > UNUSED_WORKER_S:
                self._report.violated(
                    f"L4 {router.name}: {run.request.request_id} waited for a worker for "
                    f"{UNUSED_WORKER_S:g} s while one was ready"
                )

    def retried(self, error: ServingError) -> None:
        """I8: a worker called dead had something that looks like it."""
        if not isinstance(error, WorkerDied):
            return
        now_s = asyncio.get_running_loop().time()
        ill_at = self._cluster.ill_at
        for node in self._cluster.units:
            is_named = f"worker {node} " in error.message
            if is_named and now_s - ill_at.get(node, -DEATH_REPORT_S) >= DEATH_REPORT_S:
                self._report.violated(f"I8 {node} was well, and called dead: {error.message}")


def _could_place(router: SimRouter, run: RequestState, tiers: Mapping[str, TierConfig]) -> bool:
    constraints = PlacementConstraints(
        rules=run.rules.model_copy(update={"local_below_tokens": 1}),
        must_be_local=len(run.choices) > 1 and any(c.token_ids for c in run.choices),
    )
    try:
        now_s = asyncio.get_running_loop().time()
        usable = [
            c
            for c in router.sessions.candidates()
            if may_use(tiers, run.request.tier, c.descriptor)
        ]
        choose(usable, run.request, constraints, now_s=now_s)
    except NoWorker:
        return False
    return True


def _lost_wake_ups(cluster: SimCluster) -> list[str]:
    """L1: on an idle worker every unfinished sequence waits for something that is still to come."""
    found = []
    for node, unit in cluster.units.items():
        if node in cluster.paused or not unit.is_idle:
            continue
        if cluster.rare_choices.failing_allocations.get(node, 0):
            continue  # blocks are refused that are there, and a timer wakes the worker
        scheduler = unit.scheduler
        found += [
            f"L1 {node}: sequence {sequence.key} waits for a step that nobody takes"
            for sequence in (*scheduler.running, *scheduler.waiting)
            if wait_reason_of(scheduler, sequence) is WaitReason.STEP
        ]
    return found


def _idle_permits(cluster: SimCluster) -> list[str]:
    """L1: nobody waits for permits that are there."""
    found = []
    for router in cluster.routers:
        admission = router.admission
        first = admission._next()
        if router.name in cluster.paused or not router.is_alive or first is None:
            continue
        if first.num_permits <= admission._permits.num_free:
            found.append(f"L1 {router.name}: a request of tier {first.tier} waits for free permits")
    return found


# --- afterwards -----------------------------------------------------------------------------------


async def check_recovery(
    cluster: SimCluster, store_back_at_s: float | None, report: Report
) -> None:
    """L2: after the last fault every router serves at the first attempt, and the store is whole."""
    await asyncio.sleep(SETTLED_S)
    check_views(cluster, report)
    await asyncio.sleep(RECOVERY_S - SETTLED_S)
    for router in cluster.routers:
        _check_sessions(cluster, router, report)
        for number in range(PROBES_PER_ROUTER):
            request = cluster.request(
                f"probe-{router.name}-{number}", tuple(range(1, 50)), SamplingParams(max_tokens=4)
            )
            wake = asyncio.Event()
            stream = router.open(request, wake)
            ended = await _last_event(stream, wake)
            router.closed(wake)
            if ended.error is not None or len(ended.timing.attempts) != 1:
                report.violated(f"L2 {router.name}: {ended.error!r} after {ended.timing.attempts}")
    if store_back_at_s is not None and cluster.store.written_at < store_back_at_s:
        report.violated(f"L2 the store was not written within {RECOVERY_S} s of its return")


def _check_sessions(cluster: SimCluster, router: SimRouter, report: Report) -> None:
    sessions = {
        session.descriptor.incarnation: session.state.name for session in router.sessions.all()
    }
    candidates = {c.descriptor.incarnation for c in router.sessions.candidates()}
    for member in cluster.membership.members():
        state = sessions.get(member.incarnation, "GONE")
        if state != "LIVE" or member.incarnation not in candidates:
            session = f"the session to {member.worker_id}"
            report.violated(f"L2 {router.name}: {session} is {state.lower()}")


async def _last_event(stream: RequestStream, wake: asyncio.Event) -> RequestEnded:
    while True:
        wake.clear()
        for event in stream.take():
            if isinstance(event, RequestEnded):
                return event
        await wake.wait()


async def check_rest(cluster: SimCluster, report: Report) -> None:
    """L3 and I3: nothing is left, neither at the workers nor at the routers; X1."""
    # First, since it waits: what is on its way then has time to arrive.
    try:
        await cluster.rest()
    except InvariantViolation as error:
        report.violated(f"L3 {error}")
    check_views(cluster, report)
    for router in cluster.routers:
        admission = router.admission
        left = {
            "requests": router.orchestrator.num_running,
            "permits": admission.num_running,
            "waiting for a permit": admission.num_queued,
            "subscriptions": sum(len(session.subscriptions) for session in router.sessions.all()),
        }
        found = {name: count for name, count in left.items() if count}
        if found:
            report.violated(f"L3 {router.name} is not at rest: {found}")
    for fact in cluster.hub.too_large:
        report.violated(f"I9 {fact}")
    for fact in cluster.loop.uncaught():
        report.violated(f"X1 {fact}")
