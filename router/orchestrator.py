"""The story of a request: permit, placement, attempts, one ending.

Owns the order of events, the attempts (epoch, path, reason) and the guarantee of a single terminal
event. Does not know HTTP, gRPC, tensors or how text is made.

    run ──▶ permit ──▶ attempt 0 ──────────────▶ all choices finished ──▶ RequestEnded
                          │ fault                  ▲
                          └─▶ attempt 1 (epoch+1, ─┘ ... at most max_fault_attempts
                              tokens emitted so far)

A worker that drains ends its attempts with `Draining`, one that has no room with `PoolExhausted`;
such a move is no fault and costs nothing of the budgets. A fault while a request is served, in
whatever part, ends that request. A client that comes back says how much it has (`resume_from`): the
request is computed anew, from the same seed, and what the client has is not sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from core.config import PlacementConfig, RouterConfig
from core.containment import contained, fault_of
from core.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    DuplicateRequest,
    LayoutMismatch,
    NoWorker,
    PoolExhausted,
    Quarantined,
    ServingError,
    WorkerDied,
    WorkerLost,
)
from core.ids import Epoch, Ids, RequestId, TransferId
from core.ports import Clock
from core.session import Credit, Submit, Task, WorkerDescriptor
from core.timeline import Timeline
from core.trace import NoTracing, Tracing
from core.types import GenerateRequest, Path, RequestEnded, Usage
from router.admission import Admission
from router.choice_output import ChoiceOutput, NewDecoder
from router.observe.timing import end_span, timing_of
from router.placement import Placement, PlacementConstraints, choose
from router.request_state import AttemptState, Emit, RequestState
from router.retry_budget import RetryBudget
from router.workers.sessions import WorkerSessions

RunKey = tuple[str, RequestId]
AFTER_FAULT_WAIT_S = 3.0
"""How long a request that lost its worker waits for another while none is known to be starting."""
FAULT_PAUSE_S = 0.05
MAX_MOVES = 32
"""Moves off draining or full workers that one request may see."""
DEATHS_BEFORE_ALONE = 2


class Orchestrator:
    """Carries requests; between them it holds only the table of those in flight."""

    def __init__(
        self,
        sessions: WorkerSessions,
        admission: Admission,
        config: RouterConfig,
        placement: PlacementConfig,
        clock: Clock,
        ids: Ids,
        new_decoder: NewDecoder,
    ) -> None:
        """Keep the collaborators."""
        self._sessions = sessions
        self._admission = admission
        self._config = config
        self._placement = placement
        self._clock = clock
        self._ids = ids
        self._new_decoder = new_decoder
        self._runs: dict[RunKey, RequestState] = {}
        self._tasks: dict[RunKey, asyncio.Task[object]] = {}
        self.on_ended: Callable[[RequestState, RequestEnded], None] = lambda run, ended: None
        self.on_refused: Callable[[GenerateRequest, ServingError], None] = lambda request, error: (
            None
        )
        self.on_retry: Callable[[ServingError], None] = lambda error: None
        self.tracing: Tracing = NoTracing()
        share = max(1, config.replicas)
        self._budget = RetryBudget(max(1, config.retry_burst // share), config.retry_per_s / share)

    @property
    def num_running(self) -> int:
        """Requests in flight; zero at rest."""
        return len(self._runs)

    async def run(
        self, request: GenerateRequest, emit: Emit, forced_path: Path | None = None
    ) -> None:
        """Carry one request from the door to its single terminal event.

        Whatever happens, `emit` gets exactly one `RequestEnded`, and gets it last.

        Args:
            request: Tokenized; `deadline_at` is in loop time (monotonic seconds).
            emit: Must not block. Called from the event loop only.
            forced_path: Overrides the configured path, for the canary.

        Raises:
            asyncio.CancelledError: The caller left; the workers have been told.
        """
        run_key = request.run_key
        if request.resume_from:
            await self._take_over(request)
        if run_key in self._runs:
            fact = f"request_id {request.request_id} is running; choose another"
            self._refuse(request, emit, DuplicateRequest(fact))
            return
        try:
            run = self._begin(request, emit, forced_path)
        except Exception as error:  # noqa: BLE001 - a request's fault ends with the request
            self._refuse(request, emit, fault_of("the start of a request", error))
            return
        await self._carry(run, run_key)

    def _refuse(self, request: GenerateRequest, emit: Emit, error: ServingError) -> None:
        """End a request that never began to run."""
        emit(RequestEnded(Usage(0), error))
        with contained("noting that a request was refused"):
            self.on_refused(request, error)

    def _begin(
        self, request: GenerateRequest, emit: Emit, forced_path: Path | None
    ) -> RequestState:
        sampling, now_s = request.sampling, self._clock.now_s()
        received_at = now_s if request.received_at is None else request.received_at
        span = self.tracing.open("gateway.request", request.trace, received_at)
        request = replace(request, trace=span.context)
        return RequestState(
            request=request,
            run_id=self._ids.run(request.request_id),
            emit=emit,
            clock=self._clock,
            timeline=Timeline(received_at),
            started_at=now_s,
            span=span,
            choices=[
                ChoiceOutput(c, sampling, self._new_decoder(request), skip, request.hidden_stops)
                for c, skip in enumerate(request.resume_from or (0,) * sampling.n)
            ],
            credit=max(request.resume_from, default=0) + self._config.credit_positions,
            has_prompt_scores=any(request.resume_from),
            path=forced_path.value if forced_path else self._placement.path,
        )

    async def _carry(self, run: RequestState, run_key: RunKey) -> None:
        """Serve a request that has begun, and tell its end, once."""
        self._runs[run_key] = run
        task = asyncio.current_task()
        if task is not None:
            self._tasks[run_key] = task
        error: ServingError | None = Cancelled("the caller left")
        try:
            error = await self._serve(run)
        except asyncio.CancelledError:
            if run.aborted_with is None:
                raise
            error = run.aborted_with
            if task is not None:
                task.uncancel()
        finally:
            del self._runs[run_key]
            self._tasks.pop(run_key, None)
            self._tell_end(run, error)

    async def _serve(self, run: RequestState) -> ServingError | None:
        """Carry a request as far as it goes.

        Returns:
            What it failed with.
        """
        request = run.request
        try:
            for choice, tokens in zip(run.choices, request.resume_tokens, strict=False):
                choice.restore(tokens)
            async with asyncio.timeout_at(request.deadline_at), self._admission.permit(request):
                run.timeline.admitted_at = self._clock.now_s()
                await self._attempts(run)
        except TimeoutError:
            return DeadlineExceeded(
                f"the deadline passed after {run.num_output_tokens} output tokens"
            )
        except Exception as error:  # noqa: BLE001 - a request's fault ends with the request
            return fault_of("serving a request", error)
        return None

    def _tell_end(self, run: RequestState, error: ServingError | None) -> None:
        """Tell the end, whatever becomes of those who note it down."""
        run.timeline.ended_at = self._clock.now_s()
        ended = RequestEnded(run.usage(), error)
        with contained("the account of a request"):
            ended = replace(ended, timing=timing_of(run))
            end_span(run, ended)
        with contained("the delivery of a request's end"):
            run.emit(ended)
        with contained("noting that a request has ended"):
            self.on_ended(run, ended)

    def abort(self, run_key: RunKey, error: ServingError | None = None) -> bool:
        """End a request by id, cancelled unless another error is given.

        Returns:
            False if it is not running (any more).
        """
        run = self._runs.get(run_key)
        if run is None:
            return False
        run.aborted_with = error or Cancelled("the request was aborted")
        if run.current is not None:
            run.current.fail(run.aborted_with)
        elif (task := self._tasks.get(run_key)) is not None:
            task.cancel()
        return True

    def consumed(self, run_key: RunKey, num_positions: int) -> None:
        """The client has `num_positions` of every choice: workers may compute that much further."""
        run = self._runs.get(run_key)
        if run is None:
            return
        limit = num_positions + self._config.credit_positions
        if limit - run.credit < self._config.credit_positions // 2:
            return
        run.credit = limit
        if run.current is not None:  # else the next attempt is submitted with it
            self._send_credit(run.current)

    def _send_credit(self, attempt: AttemptState) -> None:
        """Tell who decodes how far it may compute, and which choices no further."""
        run = attempt.run
        credit = Credit(run.run_id, attempt.epoch, run.credit, run.finished_choices)
        try:
            self._sessions.get(attempt.placement.decode).send(credit)
        except WorkerLost as error:
            attempt.fail(error)

    async def _take_over(self, request: GenerateRequest) -> None:
        """The client lost its stream before the router noticed: the run it left makes room."""
        old = self._tasks.get(request.run_key)
        if old is not None and self.abort(request.run_key):
            with contextlib.suppress(
                TimeoutError
            ):  # if it has not gone by the deadline, this one is refused as its double
                async with asyncio.timeout_at(request.deadline_at):
                    await asyncio.gather(asyncio.shield(old), return_exceptions=True)

    async def drain(self, grace_s: float) -> None:
        """Let requests finish for `grace_s`, then end the rest so that clients resume elsewhere."""
        all_ended = asyncio.gather(*self._tasks.values(), return_exceptions=True)
        try:
            async with asyncio.timeout(grace_s):
                await asyncio.shield(
                    all_ended
                )  # the timeout must not cancel the requests behind their backs
        except TimeoutError:
            for run_key in list(self._runs):
                self.abort(
                    run_key,
                    Draining("the router is shutting down; resume the stream at another one"),
                )
            await all_ended

    async def _attempts(self, run: RequestState) -> None:
        """Try until the request is whole: after a fault within the limits, after a move at once."""
        num_faults = num_moves = 0
        last_error: ServingError | None = None
        while True:
            epoch = Epoch(num_faults + num_moves)
            try:
                await self._attempt(run, epoch, last_error)
            except ServingError as error:
                run.attempts.append(f"{epoch}:{run.path_taken}:{error.code}")
                last_error = error
                is_move = isinstance(error, Draining | PoolExhausted)
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
                run.attempts.append(f"{epoch}:{run.path_taken}:ok")
                return

    async def _pause(self, error: ServingError) -> None:
        """Wait before the next attempt: for one's turn after a fault, not when a worker drains."""
        if isinstance(error, Draining):
            return
        with contained("noting a retry"):
            self.on_retry(error)
        if isinstance(error, PoolExhausted):
            await asyncio.sleep(FAULT_PAUSE_S)
        else:
            await self._wait_for_budget(error)

    async def _wait_for_budget(self, error: ServingError) -> None:
        """A peer often reports a death before the worker's own stream does; retries take turns."""
        delay_s = self._budget.reserve(self._clock.now_s(), AFTER_FAULT_WAIT_S)
        if delay_s is None:
            raise error
        await asyncio.sleep(max(delay_s, FAULT_PAUSE_S))

    async def _attempt(self, run: RequestState, epoch: Epoch, after: ServingError | None) -> None:
        """Place, submit to both workers at once, and wait for every choice or the first fault."""
        placement = await self._place(run, after)
        attempt = AttemptState(
            run, epoch, placement, asyncio.get_running_loop().create_future(), self._clock.now_s()
        )
        attempt.on_choice_finished = partial(self._send_credit, attempt)
        attempt.told_finished = run.finished_choices
        run.placement, run.current, run.prefill_spoke_at = placement, attempt, None
        key, num_tokens = run.run_id, len(run.request.token_ids)
        sessions = []
        try:
            for descriptor, submit in self._submits(run, epoch, placement):
                session = self._sessions.get(descriptor)
                sessions.append(session)
                session.subscribe(key, attempt, num_tokens)
                session.send(submit)
            await attempt.finished
        finally:
            run.current = None
            if not attempt.finished.cancel() and not attempt.finished.cancelled():
                attempt.finished.exception()  # heard by now, or nobody is left to hear it
            for session in sessions:
                session.forget(key, epoch)

    async def _place(self, run: RequestState, after: ServingError | None) -> Placement:
        """Choose workers; with none, wait for one.

        To the deadline while one is starting; for 3 s if one was just lost, to this request or to
        all; otherwise not at all.
        """
        hopeless_at: float | None = None
        while True:
            changed = self._sessions.changed
            try:
                return choose(self._sessions.candidates(), run.request, self._constraints(run))
            except NoWorker:
                now_s = self._clock.now_s()
                if self._sessions.is_starting():
                    hopeless_at = None
                    await changed.wait()  # within the request's deadline, which is watched above
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
            path=run.path,
            local_below_tokens=self._placement.local_below_tokens,
            must_be_local=(len(run.choices) > 1 and has_output)
            or run.request.sampling.max_tokens == 1,
            excluded=frozenset(run.excluded),
            incompatible_pairs=self._sessions.incompatible_pairs,
        )

    def _submits(
        self, run: RequestState, epoch: Epoch, placement: Placement
    ) -> list[tuple[WorkerDescriptor, Submit]]:
        request = replace(run.request, request_id=run.run_id)
        if (
            run.has_prompt_scores
        ):  # they need a prompt computed without the prefix cache: once is enough
            request = replace(request, sampling=replace(request.sampling, prompt_logprobs=None))
        base = Submit(
            request=request,
            epoch=epoch,
            task=Task.LOCAL,
            emitted=tuple(tuple(c.token_ids) for c in run.choices),
            finished_choices=run.finished_choices,
            credit=run.credit,
            run_alone=run.num_deaths >= DEATHS_BEFORE_ALONE,
            age_s=max(0.0, self._clock.now_s() - run.timeline.received_at),
        )
        if placement.path is Path.LOCAL:
            return [(placement.decode, base)]
        transfer_id: TransferId = self._ids.transfer()
        prefill, decode = placement.prefill, placement.decode
        return [
            (
                prefill,
                replace(
                    base, task=Task.PREFILL, transfer_id=transfer_id, peer_id=decode.worker_id,
                    peer_incarnation=decode.incarnation, peer_address=decode.transfer_address,
                ),
            ),
            (
                decode,
                replace(
                    base, task=Task.DECODE, transfer_id=transfer_id, peer_id=prefill.worker_id,
                    peer_incarnation=prefill.incarnation, peer_address=prefill.transfer_address,
                ),
            ),
        ]  # fmt: skip
