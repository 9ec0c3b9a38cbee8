"""The story of a request: permit, attempts, one ending.

Owns the order of events, the table of running requests and the guarantee of a single terminal
event. Does not know HTTP, gRPC, tensors or text; `router.attempts` knows how a request is tried.

    run ──▶ permit ──▶ attempt 0 ──────────────▶ all choices finished ──▶ RequestEnded
                          │ fault                  ▲
                          └─▶ attempt 1 (epoch+1, ─┘ ... at most max_fault_attempts
                              tokens emitted so far)

An exception anywhere while a request is served ends that request alone. A client that resumes says
how much it has (`resume_from`): the request is computed anew, from the same seed, and what the
client has is not sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Protocol

from core.config import PlacementConfig, RouterConfig
from core.containment import contained, fault_of
from core.errors import Cancelled, DeadlineExceeded, Draining, DuplicateRequest, ServingError
from core.ids import Ids
from core.ports import Clock
from core.timeline import Timeline
from core.trace import Tracing
from core.types import GenerateRequest, Path, RequestEnded, Usage
from router.admission import Admission
from router.choice_output import ChoiceOutput, NewDecoder
from router.observe.spans import end_span
from router.observe.timing import timing_of
from router.request_state import Emit, RequestObserver, RequestState, RunKey


class AttemptRunner(Protocol):
    """How a request is tried (`router.attempts`)."""

    async def run(self, run: RequestState) -> None:
        """Try until every choice has finished.

        Raises:
            ServingError: The last fault, when no further attempt is allowed.
        """
        ...

    def fail(self, run: RequestState, error: ServingError) -> bool:
        """End the attempt in progress with a fault; False if there is none."""
        ...

    def send_credit(self, run: RequestState) -> None:
        """Tell the worker that decodes, if there is one, the request's new limit."""
        ...


class Orchestrator:
    """Runs requests; between them it holds only the table of those in flight."""

    def __init__(  # noqa: PLR0913 - what a request needs meets here
        self,
        *,
        attempts: AttemptRunner,
        admission: Admission,
        config: RouterConfig,
        placement: PlacementConfig,
        clock: Clock,
        ids: Ids,
        new_decoder: NewDecoder,
        tracing: Tracing,
        observer: RequestObserver,
    ) -> None:
        """Start with no request; `observer` hears of each one's end."""
        self._attempts = attempts
        self._admission = admission
        self._config = config
        self._placement = placement
        self._clock = clock
        self._ids = ids
        self._new_decoder = new_decoder
        self._runs: dict[RunKey, RequestState] = {}
        self._tasks: dict[RunKey, asyncio.Task[object]] = {}
        self.tracing = tracing
        self._observer = observer

    @property
    def num_running(self) -> int:
        """Requests in flight; zero at rest."""
        return len(self._runs)

    async def run(
        self, request: GenerateRequest, emit: Emit, forced_path: Path | None = None
    ) -> None:
        """Run one request to its single terminal event.

        Whatever happens, `emit` gets exactly one `RequestEnded`, and gets it last.

        Args:
            request: Tokenized; `deadline_at` is in loop time (monotonic seconds).
            emit: Must not block. Called from the event loop only.
            forced_path: Overrides the configured path, for the canary.

        Raises:
            asyncio.CancelledError: The caller left; the workers have been sent a Cancel.
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
        await self._run(run, run_key)

    def _refuse(self, request: GenerateRequest, emit: Emit, error: ServingError) -> None:
        """End a request that never began to run."""
        emit(RequestEnded(Usage(0), error))
        with contained("noting that a request was refused"):
            self._observer.request_refused(request, error)

    def _begin(
        self, request: GenerateRequest, emit: Emit, forced_path: Path | None
    ) -> RequestState:
        sampling = request.sampling
        now_s = self._clock.now_s()
        received_at = now_s if request.received_at is None else request.received_at
        span = self.tracing.open("gateway.request", request.trace, received_at)
        request = replace(request, trace=span.context)
        rules = self._placement
        if forced_path is not None:
            rules = rules.model_copy(update={"path": forced_path.value})
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
            # A client that resumes has taken all before its position; its credit comes on top.
            credit=max(request.resume_from, default=0) + self._config.credit_positions,
            # Scores go out before the first token: who has a token has them.
            has_prompt_scores=any(request.resume_from),
            rules=rules,
        )

    async def _run(self, run: RequestState, run_key: RunKey) -> None:
        """Serve a request that has begun, and emit its end, once."""
        self._runs[run_key] = run
        task = asyncio.current_task()
        if task is not None:
            self._tasks[run_key] = task
        # Stands if the caller's cancellation leads out of here.
        error: ServingError | None = Cancelled("the caller left")
        try:
            error = await self._serve(run)
        except asyncio.CancelledError:
            if run.aborted_with is None:
                raise
            error = run.aborted_with
            if task is not None:
                # Cancelled by `abort`, not by the caller: who awaits this must not see a
                # cancellation.
                task.uncancel()
        finally:
            del self._runs[run_key]
            self._tasks.pop(run_key, None)
            self._end(run, error)

    async def _serve(self, run: RequestState) -> ServingError | None:
        """Serve a request until it is whole or has failed.

        Returns:
            The error it failed with, if any.
        """
        request = run.request
        try:
            # In here, so that tokens which cannot be are this request's error. Most clients send
            # none.
            for choice, tokens in zip(run.choices, request.resume_tokens, strict=False):
                choice.restore(tokens)
            permit = self._admission.permit(
                request, run.note_expected, lambda: run.num_output_tokens
            )
            async with asyncio.timeout_at(request.deadline_at), permit:
                run.timeline.admitted_at = self._clock.now_s()
                await self._attempts.run(run)
        except TimeoutError:
            return DeadlineExceeded(
                f"the deadline passed after {run.num_output_tokens} output tokens"
            )
        except Exception as error:  # noqa: BLE001 - a request's fault ends with the request
            return fault_of("serving a request", error)
        return None

    def _end(self, run: RequestState, error: ServingError | None) -> None:
        """Emit the end, even if its timing or its record raises."""
        run.timeline.ended_at = self._clock.now_s()
        ended = RequestEnded(run.usage(), error)
        with contained("the timing of a request"):
            ended = replace(ended, timing=timing_of(run))
            end_span(run, ended)
        with contained("the delivery of a request's end"):
            run.emit(ended)
        with contained("noting that a request has ended"):
            self._observer.request_ended(run, ended)

    def abort(self, run_key: RunKey, error: ServingError | None = None) -> bool:
        """End a request by id, cancelled unless another error is given.

        Returns:
            False if it is not running (any more).
        """
        run = self._runs.get(run_key)
        if run is None:
            return False
        run.aborted_with = error or Cancelled("the request was aborted")
        # An attempt ends by its future; between attempts only the task itself can be woken.
        if not self._attempts.fail(run, run.aborted_with):
            task = self._tasks.get(run_key)
            if task is not None:
                task.cancel()
        return True

    def is_admitted(self, run_key: RunKey) -> bool:
        """Return True if the request is running and has its permits."""
        run = self._runs.get(run_key)
        return run is not None and run.timeline.admitted_at is not None

    def consumed(self, run_key: RunKey, num_positions: int) -> None:
        """Extend the credit: the client has taken `num_positions` of every choice."""
        run = self._runs.get(run_key)
        if run is None:
            return
        limit = num_positions + self._config.credit_positions
        # In halves of the credit: a message for each token would cost more than the token.
        if limit - run.credit < self._config.credit_positions // 2:
            return
        run.credit = limit
        self._attempts.send_credit(run)

    async def _take_over(self, request: GenerateRequest) -> None:
        """End the run that a resuming client left; the router may not have noticed that yet."""
        old = self._tasks.get(request.run_key)
        if old is not None and self.abort(request.run_key):
            # If it has not ended by the deadline, `run` refuses this one as a duplicate.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(request.deadline_at):
                    await asyncio.gather(asyncio.shield(old), return_exceptions=True)

    async def drain(self, grace_s: float) -> None:
        """Let requests finish for `grace_s`, then end the rest so that clients resume elsewhere."""
        # Admission is closed by now: no further requests come.
        all_ended = asyncio.gather(*self._tasks.values(), return_exceptions=True)
        try:
            async with asyncio.timeout(grace_s):
                await asyncio.shield(all_ended)  # the timeout must not cancel the requests
        except TimeoutError:
            for run_key in list(self._runs):
                self.abort(
                    run_key,
                    Draining("the router is shutting down; resume the stream at another one"),
                )
            await all_ended
