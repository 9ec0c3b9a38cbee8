"""The story of a request: permit, placement, attempts, one ending.

Owns the order of events, the attempts (epoch, path, reason) and the guarantee of a single terminal
event. Does not know HTTP, gRPC, tensors or how text is made. Called by the doors through
`router.service`, and by the simulation; the first file to read.

    run ──▶ permit ──▶ attempt 0 ──────────────▶ all choices finished ──▶ RequestEnded
                          │ fault                  ▲
                          └─▶ attempt 1 (epoch+1, tokens emitted so far) ─┘ ... at most max_fault_attempts

A worker that drains ends its attempts with `Draining`; such a move is no fault and costs nothing of
the budgets. A client that comes back says how much it has (`resume_from`): the request is computed
anew, from the same seed, and what the client has is not sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from core.config import PlacementConfig, RouterConfig
from core.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    DuplicateRequest,
    InternalError,
    LayoutMismatch,
    NoWorker,
    Quarantined,
    ServingError,
    WorkerDied,
    WorkerLost,
)
from core.ids import Epoch, Ids, Incarnation, RequestId, TransferId
from core.ports import Clock
from core.session import Credit, Submit, Task, WorkerDescriptor
from core.timeline import Timeline
from core.trace import NoTracing, Tracing
from core.types import GenerateRequest, Path, RequestEnded, Usage
from router.admission import Admission
from router.anatomy import anatomy_of, end_span
from router.choice_output import ChoiceOutput, NewDecoder
from router.links import Links
from router.placement import Placement, Wish, choose
from router.request_run import AttemptRun, Emit, RequestRun
from router.retry_budget import RetryBudget

RunKey = tuple[str, RequestId]
AFTER_FAULT_WAIT_S = 3.0
"""How long a request that lost its worker waits for another to appear."""
FAULT_PAUSE_S = 0.05
MAX_MISFITS = 1024
MAX_MOVES = 32
"""Moves off draining workers that one request may see."""
DEATHS_BEFORE_ALONE = 2


class Orchestrator:
    """Carries requests; between them it holds only the table of those in flight."""

    def __init__(
        self,
        links: Links,
        admission: Admission,
        config: RouterConfig,
        placement: PlacementConfig,
        clock: Clock,
        ids: Ids,
        new_decoder: NewDecoder,
    ) -> None:
        """Keep the collaborators."""
        self._links, self._admission, self._config, self._placement = (
            links,
            admission,
            config,
            placement,
        )
        self._clock, self._ids, self._new_decoder = clock, ids, new_decoder
        self._runs: dict[RunKey, RequestRun] = {}
        self._tasks: dict[RunKey, asyncio.Task[object]] = {}
        self.on_ended: Callable[[RequestRun, RequestEnded], None] = lambda run, ended: None
        self.on_retry: Callable[[ServingError], None] = lambda error: None
        self.tracing: Tracing = NoTracing()
        share = max(1, config.replicas)
        self._misfits: OrderedDict[tuple[Incarnation, Incarnation], None] = OrderedDict()
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
            emit(RequestEnded(Usage(0), DuplicateRequest(fact)))
            return
        sampling, now_s = request.sampling, self._clock.now_s()
        received_at = now_s if request.received_at is None else request.received_at
        span = self.tracing.open("gateway.request", request.trace, received_at)
        request = replace(request, trace=span.context)
        run = RequestRun(
            request=request,
            session_key=self._ids.session_key(request.request_id),
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
        self._runs[run_key] = run
        task = asyncio.current_task()
        if task is not None:
            self._tasks[run_key] = task
        error: ServingError | None = InternalError("the orchestrator itself failed")
        try:
            for choice, tokens in zip(run.choices, request.resume_tokens, strict=False):
                choice.restore(tokens)
            async with asyncio.timeout_at(request.deadline_at), self._admission.permit(request):
                run.timeline.admitted_at = self._clock.now_s()
                await self._attempts(run)
            error = None
        except TimeoutError:
            error = DeadlineExceeded(
                f"the deadline passed after {run.num_output_tokens} output tokens"
            )
        except ServingError as failure:
            error = failure
        except asyncio.CancelledError:
            if run.aborted_with is None:
                error = Cancelled("the caller left")
                raise
            error = run.aborted_with
            if task is not None:
                task.uncancel()
        finally:
            del self._runs[run_key]
            self._tasks.pop(run_key, None)
            run.timeline.ended_at = self._clock.now_s()
            ended = RequestEnded(run.usage(), error, anatomy_of(run))
            end_span(run, ended)
            emit(ended)
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
        """The client has taken `num_positions` of every choice: workers may compute that much further."""
        run = self._runs.get(run_key)
        if run is None or run.current is None:
            return
        limit = num_positions + self._config.credit_positions
        if limit - run.credit < self._config.credit_positions // 2:
            return
        run.credit = limit
        self._send_credit(run.current)

    def _send_credit(self, attempt: AttemptRun) -> None:
        """Tell who decodes how far it may compute, and which choices no further."""
        run = attempt.run
        credit = Credit(run.session_key, attempt.epoch, run.credit, run.finished_choices)
        try:
            self._links.get(attempt.placement.decode).send(credit)
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
        """Let running requests finish for `grace_s`, then end the rest so that clients resume elsewhere."""
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

    async def _attempts(self, run: RequestRun) -> None:
        """Try until the request is whole: after a fault elsewhere, within the limits; after a move, at once."""
        num_faults = num_moves = 0
        last_error: ServingError | None = None
        while True:
            epoch = Epoch(num_faults + num_moves)
            try:
                await self._attempt(run, epoch, last_error)
            except ServingError as error:
                run.attempts.append(f"{epoch}:{run.path_taken}:{error.code}")
                last_error, is_move = error, isinstance(error, Draining)
                num_moves, num_faults = num_moves + is_move, num_faults + (not is_move)
                run.num_deaths += isinstance(error, WorkerDied)
                if run.num_deaths > DEATHS_BEFORE_ALONE:
                    raise Quarantined(
                        f"{run.num_deaths} workers died while serving this request; it is not tried again"
                    ) from error
                if (
                    run.aborted_with is not None
                    or not error.is_retryable
                    or num_faults > self._config.max_fault_attempts
                    or num_moves > MAX_MOVES
                ):
                    raise
                if isinstance(error, LayoutMismatch) and run.placement is not None:
                    self._note_misfit(run.placement)
                if not is_move:
                    self.on_retry(error)
                    await self._wait_for_budget(error)
            else:
                run.attempts.append(f"{epoch}:{run.path_taken}:ok")
                return

    def _note_misfit(self, placement: Placement) -> None:
        """These two will never understand each other; other pairs go on."""
        self._misfits[placement.prefill.incarnation, placement.decode.incarnation] = None
        while len(self._misfits) > MAX_MISFITS:
            self._misfits.popitem(last=False)

    async def _wait_for_budget(self, error: ServingError) -> None:
        """A peer often reports a death before the dead worker's own stream does; and retries take turns."""
        delay_s = self._budget.reserve(self._clock.now_s(), AFTER_FAULT_WAIT_S)
        if delay_s is None:
            raise error
        await asyncio.sleep(max(delay_s, FAULT_PAUSE_S))

    async def _attempt(self, run: RequestRun, epoch: Epoch, after: ServingError | None) -> None:
        """Place, submit to both workers at once, and wait for every choice or the first fault."""
        placement = await self._place(run, after)
        attempt = AttemptRun(
            run, epoch, placement, asyncio.get_running_loop().create_future(), self._clock.now_s()
        )
        attempt.on_choice_finished = partial(self._send_credit, attempt)
        attempt.told_finished = run.finished_choices
        run.placement, run.current, run.prefill_spoke_at = placement, attempt, None
        key, num_tokens = run.session_key, len(run.request.token_ids)
        links = []
        try:
            for descriptor, submit in self._submits(run, epoch, placement):
                link = self._links.get(descriptor)
                links.append(link)
                link.subscribe(key, attempt, num_tokens)
                link.send(submit)
            await attempt.finished
        finally:
            run.current = None
            attempt.finished.cancel()
            for link in links:
                link.forget(key, epoch)

    async def _place(self, run: RequestRun, after: ServingError | None) -> Placement:
        """Choose workers; with none, wait for one to appear: to the deadline, or 3 s after a fault."""
        emitted = [c for c in run.choices if c.token_ids]
        wish = Wish(
            path=run.path,
            local_below_tokens=self._placement.local_below_tokens,
            must_be_local=(len(run.choices) > 1 and bool(emitted))
            or run.request.sampling.max_tokens == 1,
            excluded=frozenset(run.excluded),
            misfits=frozenset(self._misfits),
        )
        is_after_fault = after is not None and not isinstance(after, Draining)
        give_up_at = (
            self._clock.now_s() + AFTER_FAULT_WAIT_S if is_after_fault else run.request.deadline_at
        )
        while True:
            changed = self._links.changed
            try:
                return choose(self._links.candidates(), run.request, wish)
            except NoWorker:
                if not self._links.is_starting() and after is None:
                    raise
                try:
                    async with asyncio.timeout_at(min(give_up_at, run.request.deadline_at)):
                        await changed.wait()
                except TimeoutError:
                    if self._clock.now_s() >= run.request.deadline_at:
                        raise
                    return choose(self._links.candidates(), run.request, wish)

    def _submits(
        self, run: RequestRun, epoch: Epoch, placement: Placement
    ) -> list[tuple[WorkerDescriptor, Submit]]:
        request = replace(run.request, request_id=run.session_key)
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
