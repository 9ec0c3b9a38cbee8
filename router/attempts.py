"""The attempts at one request: place, submit, wait, and try again after a fault or a move.

Owns the limits and pauses between attempts. Does not know permits, streams or text.

A worker that drains ends its attempts with `Draining`, one without room with `PoolExhausted`: such
a move is no fault and costs nothing of the retry budget.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from core.config import RouterConfig
from core.containment import contained
from core.errors import (
    Draining,
    LayoutMismatch,
    NoWorker,
    PoolExhausted,
    Quarantined,
    ServingError,
    WorkerDied,
    WorkerLost,
)
from core.ids import Epoch, Ids, RunId
from core.ports import Clock
from core.session import Credit, FetchReport, Task
from router.attempt_state import AttemptState
from router.peer_fetches import PeerFetches
from router.placement import Placement, PlacementConstraints
from router.placer import Placer
from router.prompt_prefixes import PromptNames, PromptPrefixes
from router.request_state import RequestObserver, RequestState
from router.retry_budget import RetryBudget
from router.steering import Steering
from router.submits import DEATHS_BEFORE_ALONE, submits_of
from router.workers.session import WorkerSession
from router.workers.sessions import WorkerSessions

AFTER_FAULT_WAIT_S = 3.0
"""How long a request that lost its worker waits for another while none is known to be starting."""
FAULT_PAUSE_S = 0.05
REPORT_WAIT_S = 0.25
"""For what prefill measured, where decode was faster: beside load, a message is late."""
MAX_MOVES = 32
"""Moves off draining or full workers that one request may see."""


class Attempts:
    """Tries requests; between them it holds nothing but the retry budget."""

    def __init__(
        self,
        sessions: WorkerSessions,
        config: RouterConfig,
        clock: Clock,
        ids: Ids,
        prefixes: PromptPrefixes,
        fetches: PeerFetches,
        placer: Placer,
        observer: RequestObserver,
    ) -> None:
        """Start with the full budget: this router's share of the cluster's."""
        self._sessions = sessions
        self._config = config
        self._clock = clock
        self._ids = ids
        self._prefixes = prefixes
        self._fetches = fetches
        self._placer = placer
        self._observer = observer
        self._steering = Steering()
        # Routers do not hear of one another's retries.
        share = max(1, config.replicas)
        self._budget = RetryBudget(max(1, config.retry_burst // share), config.retry_per_s / share)
        self.in_progress: dict[RunId, AttemptState] = {}
        """At most one of a run; none while it waits for a worker or for its next attempt."""

    async def run(self, run: RequestState) -> None:
        """Try until every choice has finished.

        Raises:
            ServingError: The last fault, when no further attempt is allowed.
        """
        num_faults = 0
        num_moves = 0
        last_error: ServingError | None = None
        while True:
            epoch = Epoch(num_faults + num_moves)
            try:
                await self._attempt(run, epoch, last_error)
            except ServingError as error:
                run.attempt_ended(epoch, error)
                last_error = error
                is_move = run.attempts[-1].is_move
                num_moves += is_move
                num_faults += not is_move
                run.num_deaths += isinstance(error, WorkerDied)
                if run.num_deaths > DEATHS_BEFORE_ALONE:
                    raise Quarantined(
                        f"{run.num_deaths} workers died while serving this request; "
                        "it is not tried again"
                    ) from error
                if (
                    run.aborted_with is not None
                    or not error.is_retryable
                    or num_faults > self._config.max_fault_attempts
                    or num_moves > MAX_MOVES
                ):
                    raise
                if isinstance(error, LayoutMismatch) and run.placement is not None:
                    self._sessions.note_incompatible(run.placement.prefill, run.placement.decode)
                await self._pause(error)
            else:
                run.attempt_ended(epoch)
                return

    async def _pause(self, error: ServingError) -> None:
        """Wait before the next attempt; after `Draining` there is nothing to wait for."""
        if isinstance(error, Draining):
            return
        with contained("noting a retry"):
            self._observer.retried(error)
        if isinstance(error, PoolExhausted):
            await asyncio.sleep(FAULT_PAUSE_S)
        else:
            await self._wait_for_budget(error)

    async def _wait_for_budget(self, error: ServingError) -> None:
        """Wait for this retry's turn, and long enough for a death to be known here."""
        delay_s = self._budget.reserve(self._clock.now_s(), AFTER_FAULT_WAIT_S)
        if delay_s is None:
            raise error
        # A peer often reports a death before the worker's own stream does: placed at once, the
        # next attempt would go to the dead worker.
        await asyncio.sleep(max(delay_s, FAULT_PAUSE_S))

    async def _attempt(self, run: RequestState, epoch: Epoch, after: ServingError | None) -> None:
        """Place, submit to both workers at once, and wait for every choice or the first fault."""
        candidates = self._sessions.candidates()
        names = await self._prefixes.names(run.request, (c.descriptor for c in candidates))
        placement = await self._place(run, after, names)
        attempt = AttemptState(
            run=run,
            epoch=epoch,
            placement=placement,
            finished=asyncio.get_running_loop().create_future(),
            started_at=self._clock.now_s(),
            on_choice_finished=self._send_credit,
            on_answered=self._note_answer,
            on_handed_over=self._note_hand_over,
            # Later attempts find what this request has computed itself.
            expectation=self._prefixes.expectation(
                run.request, placement.prefill, names, placement.most_held_blocks
            )
            if epoch == 0
            else None,
            reported_finished=run.finished_choices,
        )
        run.placement = placement
        run.measured = None
        run.timings = replace(run.timings, fetch=FetchReport())
        self.in_progress[run.run_id] = attempt
        sessions: list[WorkerSession] = []
        try:
            source = self._fetches.ask(run.request, placement)
            now_s = self._clock.now_s()
            transfer_id = self._ids.transfer()
            for descriptor, submit in submits_of(run, epoch, placement, transfer_id, source, now_s):
                session = self._sessions.get(descriptor)
                # Noted and subscribed before it is sent: if sending fails, it is forgotten below.
                sessions.append(session)
                is_computed = submit.task is not Task.DECODE
                session.subscribe(
                    run.run_id, attempt, placement.uncached_tokens if is_computed else 0
                )
                session.send(submit)
            self._prefixes.sent(run.run_id, placement.prefill, names)
            self._steering.placed(run.request, placement)
            await attempt.finished
            # Usage is made of it. No answer that is whole misses its deadline for that.
            left_s = run.request.deadline_at - self._clock.now_s()
            await attempt.prefill_report(min(REPORT_WAIT_S, left_s / 2))
        finally:
            if not attempt.is_answered:
                self._prefixes.failed(run.run_id)
            self._note_prefix(attempt)
            run.measured = attempt.measured_by(self._clock.now_s())
            del self.in_progress[run.run_id]
            if not attempt.finished.cancel() and not attempt.finished.cancelled():
                # Raised above, or the caller has left: asyncio must not report it as unseen.
                attempt.finished.exception()
            for session in sessions:
                session.forget(run.run_id, epoch)

    def _note_answer(self, attempt: AttemptState) -> None:
        """Learn from a prompt that has been computed."""
        run = attempt.run
        self._note_prefix(attempt)
        self._prefixes.answered(run.run_id)
        self._fetches.note(attempt.placement, run.timings.fetch)
        if attempt.epoch == 0:  # later, the figures of a run may be those of an attempt before
            num_tokens = len(run.request.token_ids) - run.timings.cached_tokens
            with contextlib.suppress(WorkerLost):
                self._sessions.get(attempt.placement.prefill).measured(
                    num_tokens, run.timings.prefill_s
                )

    def _note_prefix(self, attempt: AttemptState) -> None:
        """Compare what of the prompt was expected in a cache with what was there, once."""
        expectation = attempt.expectation
        timings = attempt.run.timings
        # If decode spoke first, the figures of who computed the prompt are still to come.
        if expectation is not None and timings.prefill_s:
            attempt.expectation = None
            with contained("noting what was cached"):
                outcome = self._prefixes.outcome(expectation, timings.cached_tokens)
                self._observer.prompt_computed(attempt.run, outcome)

    def _note_hand_over(self, attempt: AttemptState) -> None:
        """Learn how late the KV came."""
        placement = attempt.placement
        with contextlib.suppress(WorkerLost):
            session = self._sessions.get(placement.prefill)
            session.handed_over(placement.decode, attempt.exposed_transfer_s)

    async def _place(
        self, run: RequestState, after: ServingError | None, names: PromptNames
    ) -> Placement:
        """Choose workers; without any, wait for one.

        While one is starting, wait until the request's deadline; if one was just lost, to this
        request or to all, wait 3 s; otherwise do not wait.

        Raises:
            NoWorker: None came.
        """
        hopeless_at: float | None = None
        while True:
            # Taken before looking, so that no change in between is missed.
            changed = self._sessions.changed
            try:
                return self._placer.place(
                    run.request,
                    names,
                    self._constraints(run),
                    # Cached blocks have no scores to give.
                    may_fetch=not run.awaits_prompt_scores,
                )
            except NoWorker:
                now_s = self._clock.now_s()
                if self._sessions.is_starting():
                    hopeless_at = None
                    await changed.wait()  # until the deadline, which the orchestrator watches
                    continue
                if after is None and not self._sessions.has_lost():
                    raise
                hopeless_at = now_s + AFTER_FAULT_WAIT_S if hopeless_at is None else hopeless_at
                if now_s >= hopeless_at:
                    raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(hopeless_at - now_s):
                    await changed.wait()

    def _constraints(self, run: RequestState) -> PlacementConstraints:
        has_output = any(c.token_ids for c in run.choices)
        return PlacementConstraints(
            rules=run.rules,
            # One transfer carries one sequence, which choices with output no longer are.
            must_be_local=len(run.choices) > 1 and has_output,
            excluded=frozenset(run.excluded),
            incompatible_pairs=self._sessions.incompatible_pairs,
            preferred=self._steering.preferred(run.request),
        )

    def fail(self, run: RequestState, error: ServingError) -> bool:
        """End the attempt in progress with a fault; False if there is none."""
        attempt = self.in_progress.get(run.run_id)
        if attempt is None:
            return False
        attempt.fail(error)
        return True

    def send_credit(self, run: RequestState) -> None:
        """Tell the decode worker the new limit; without one, the next attempt starts with it."""
        attempt = self.in_progress.get(run.run_id)
        if attempt is not None:
            self._send_credit(attempt)

    def _send_credit(self, attempt: AttemptState) -> None:
        """Send the decode worker its limit, and the choices that need no more tokens."""
        run = attempt.run
        credit = Credit(run.run_id, attempt.epoch, run.credit, run.finished_choices)
        try:
            self._sessions.get(attempt.placement.decode).send(credit)
        except WorkerLost as error:
            attempt.fail(error)
