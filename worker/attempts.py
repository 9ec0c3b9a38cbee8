"""A worker's books: attempts by request, and the wiring of sessions, scheduler and role.

Owns which attempts exist, their epochs and endings, and the tombstones of cancelled ones. Does not
know how a role sends or receives KV: that is `WorkerRole`'s.

    Submit ──▶ Attempt ──▶ sequences in the scheduler ──▶ tokens logged ──▶ frame
       ended (done, failed) ──▶ kept until the router's Cancel acknowledges it
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from core import events as told
from core.containment import contained, fault_of
from core.errors import (
    Draining,
    InvalidRequest,
    InvariantViolation,
    ServingError,
    StepFailed,
    WorkerLost,
)
from core.ids import Epoch, RouterId, RunId, TransferId
from core.plan import NOTHING_TO_DRAW, StepPlan
from core.session import (
    AttemptEnded,
    ConnectPeers,
    Credit,
    Load,
    Progress,
    RouteReport,
    Submit,
    Task,
    WorkerDescriptor,
    WorkerTiming,
)
from engine.scheduling.events import (
    HandoverEvent,
    PromptComputed,
    Sampled,
    SchedulerEvent,
    SequenceFailed,
)
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence, Status
from worker.attempt import Attempt
from worker.checking import check_credit, check_submit
from worker.components import WorkerComponents
from worker.ports import WorkerRole
from worker.sessions import SessionServer
from worker.step_loop import StepLoop
from worker.tracing import trace_attempt

MAX_TOMBSTONES = 4096
LEAVE_S = 0.25
"""How long a draining worker waits for what was placed on it before routers heard of that."""
log = logging.getLogger(__name__)


class AttemptTable:
    """One worker of either role."""

    def __init__(
        self,
        scheduler: Scheduler,
        components: WorkerComponents,
        make_role: Callable[[AttemptTable], WorkerRole],
    ) -> None:
        """Keep the collaborators; `start` begins to serve.

        Args:
            scheduler: The engine's.
            components: The worker's.
            make_role: Makes the role, which ends attempts and wakes the loop through this table.
        """
        self.scheduler = scheduler
        self.vocabulary_size = components.vocabulary_size
        self.tracing = components.tracing
        self.attempts: dict[RunId, Attempt] = {}
        self.is_ready = True
        self.fatal: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Set to what ended the worker."""
        runner = self._runner = components.runner
        clock = self._clock = components.clock
        self.identity = components.describe()
        """Where it listens is known once it has started."""
        self._tombstones: OrderedDict[RunId, Epoch] = OrderedDict()
        self._sessions = SessionServer(
            components.session_network,
            self,
            clock,
            lambda: self._loop.num_steps,
            components.frame_bytes,
        )
        self._loop = StepLoop(
            scheduler, runner, clock, self.deliver, self._layer_done, self._rank_lost
        )
        runner.on_lost = self._loop.runner_lost
        self._tasks: list[asyncio.Task[None]] = []
        self.num_stale = 0
        self.num_attempts = 0
        self._is_draining = False
        self._emptied = asyncio.Event()
        self.role = make_role(self)

    async def start(self, transfer_address: str) -> None:
        """Begin to serve."""
        self.identity = replace(
            self.identity,
            session_address=await self._sessions.listen(),
            transfer_address=transfer_address,
        )
        for coroutine in (self._loop.run(), self._sessions.watch()):
            task = asyncio.get_running_loop().create_task(coroutine)
            task.add_done_callback(self._task_done)
            self._tasks.append(task)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.break_down(
                task.exception() or InvariantViolation("a task that never ends has ended")
            )

    def break_down(self, error: BaseException) -> None:
        """End the worker: something it cannot go on without has broken. The first error is kept."""
        if isinstance(error, ServingError):
            told.WORKER_FAILED.log(reason=error.message)
        else:
            log.error("the worker cannot go on", exc_info=error)
        if self.fatal.done():
            return
        self.is_ready = False
        self.fatal.set_exception(error)

    async def stop(self) -> None:
        """End sessions and tasks at once; open attempts are dropped, unless `drain` moved them."""
        await self._sessions.close()
        for request_id, attempt in list(self.attempts.items()):
            self.cancel(request_id, attempt.epoch)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def drain(self, grace_s: float) -> bool:
        """Leave service: nothing new, hand-overs end, everything else moves to another worker.

        Args:
            grace_s: Longest wait for routers to take their attempts back.

        Returns:
            True if nothing was left.
        """
        self._is_draining, self.is_ready = True, False
        told.DRAIN_BEGUN.log(running=len(self.attempts), grace_s=grace_s)
        self._sessions.tell()
        moving = Draining("the worker is shutting down; the request moves to another one")
        for attempt in list(self.attempts.values()):
            if attempt.submit.task is not Task.PREFILL:
                self.end(attempt, moving)
        leave_s = min(LEAVE_S, grace_s)
        await asyncio.sleep(leave_s)
        grace_s -= leave_s
        # A prompt under way is worth more finished than moved, and its blocks may be unread: half
        # the time is its own.
        for share, error in ((0.5, moving), (0.5, None)):
            try:
                async with asyncio.timeout(grace_s * share):
                    while self.attempts:
                        self._emptied.clear()
                        await self._emptied.wait()
            except TimeoutError:
                for attempt in list(self.attempts.values()) if error else ():
                    self.end(attempt, error)
        told.DRAIN_ENDED.log(left=len(self.attempts))
        return not self.attempts

    @property
    def is_idle(self) -> bool:
        """True while no step runs and nothing has asked for one."""
        return self.is_ready and self._loop.is_idle

    def wake(self) -> None:
        """Something changed that may allow a step."""
        self._loop.wake()

    # --- commands from routers --------------------------------------------------------------------

    def submit(self, router_id: RouterId, submit: Submit) -> None:
        """Take part in an attempt, if its epoch is news; an older attempt makes room for it.

        Raises:
            InvalidRequest: It says what no request can be; nothing was changed.
        """
        check_submit(submit, self.vocabulary_size)
        request_id = submit.run_id
        old = self.attempts.get(request_id)
        known = max(old.epoch if old else -1, self._tombstones.get(request_id, -1))
        if submit.epoch <= known:
            self.num_stale += 1
            return
        attempt = Attempt(router_id, submit)
        try:
            self._check_open()
            if submit.task is Task.LOCAL:
                self._begin_local(attempt)
            elif self.role.task is submit.task:
                self.role.begin(attempt)
            else:
                raise WorkerLost(f"this worker has no part in {submit.task} attempts")
        except Exception as error:  # noqa: BLE001 - an attempt's fault ends the attempt
            self._drop_old(old)
            self._enter(attempt)
            self.end(attempt, fault_of("the beginning of an attempt", error))
            return
        self._drop_old(old)
        self._enter(attempt)
        self._loop.wake()

    def _check_open(self) -> None:
        """Take nothing in that would be lost: while the ranks are down there is no pool.

        Raises:
            Draining: Nothing of the request is here, so it moves, and no fault is counted.
        """
        if self._is_draining:
            raise Draining("the worker is shutting down; another one will take the request")
        if not self.is_ready:
            raise Draining(
                "the worker's ranks are not running, fresh ones start; "
                "another worker will take the request"
            )

    def _enter(self, attempt: Attempt) -> None:
        self.num_attempts += 1
        self.attempts[attempt.request_id] = attempt
        self._sessions.session(attempt.router_id).attempts[attempt.request_id] = attempt

    def _drop_old(self, old: Attempt | None) -> None:
        if old is not None:
            self.cancel(old.request_id, old.epoch)

    def _begin_local(self, attempt: Attempt) -> None:
        submit, now_s = attempt.submit, self._clock.now_s()
        choices = attempt.open_choices
        # Choices with output of their own are sequences of their own; fresh ones share a prompt.
        is_fresh = not any(submit.emitted[c] for c in choices)
        groups = [choices] if is_fresh else [(c,) for c in choices]
        for group in groups:
            sequence = self.scheduler.new_sequence(
                submit.request,
                submit.epoch,
                group,
                submit.emitted[group[0]],
                now_s,
                age_s=submit.age_s,
                credit=submit.credit,
            )
            sequence.run_alone = submit.run_alone
            attempt.sequences.append(sequence)
        for sequence in attempt.sequences:
            self.scheduler.submit(sequence)
        self.deliver(self.scheduler.take_events())

    def cancel(self, request_id: RunId, epoch: int) -> None:
        """Forget an attempt and older ones; a Cancel before its Submit leaves a tombstone."""
        attempt = self.attempts.get(request_id)
        if attempt is not None and attempt.epoch <= epoch:
            if attempt.ended is None:
                self._trace(attempt)
            self._stop_sequences(attempt, None)
            del self.attempts[request_id]
            self._sessions.session(attempt.router_id).attempts.pop(request_id, None)
            self._emptied.set()
        self._tombstones[request_id] = Epoch(max(epoch, self._tombstones.pop(request_id, -1)))
        while len(self._tombstones) > MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)
        self._loop.wake()

    def credit(self, message: Credit) -> None:
        """More positions may be computed.

        Raises:
            InvalidRequest: It names choices that the request does not have.
        """
        attempt = self.attempts.get(message.request_id)
        if attempt is None or attempt.epoch != message.epoch:
            self.num_stale += 1
            return
        check_credit(message.finished_choices, attempt.submit.request)
        attempt.finished_choices.update(message.finished_choices)
        for sequence in attempt.sequences:
            self.scheduler.credit(sequence, message.limit)
            self._stop_if_over(attempt, sequence)
        self._end_if_whole(attempt)
        self._loop.wake()

    def fail(self, request_id: RunId, epoch: int, error: ServingError) -> None:
        """A command for this attempt failed: it ends."""
        attempt = self.attempts.get(request_id)
        if attempt is not None and attempt.epoch == epoch:
            self.end(attempt, error)

    def connect_peers(self, message: ConnectPeers) -> None:
        """Open the ways to peers."""
        self.role.connect_peers(message)

    def route_found(self, route: RouteReport) -> None:
        """A way to a peer was tried."""
        self._sessions.send_route(route)

    def router_alive(self, router_id: RouterId) -> None:
        """Renew the leases of this router's transfers."""
        self.role.renew(list(self._sessions.session(router_id).attempts.values()))

    # --- events from the engine -------------------------------------------------------------------

    def deliver(self, events: list[SchedulerEvent]) -> None:
        """Log tokens, tell sessions, end attempts that are done; hand-overs are the role's."""
        for event in events:
            if isinstance(event, HandoverEvent):
                self.role.take(event)
                continue
            attempt = self._attempt_of(event.sequence)
            if attempt is None:
                continue
            with contained("taking a step's result", functools.partial(self.end, attempt)):
                self._take(attempt, event)

    def _layer_done(self, plan: StepPlan, layer: int) -> None:
        self.role.layer_done(plan, layer)

    def _take(self, attempt: Attempt, event: SchedulerEvent) -> None:
        match event:
            case Sampled():
                self._log(attempt, event)
            case PromptComputed(sequence):
                self.role.prompt_computed(attempt, sequence)
            case SequenceFailed(_, message):
                self.end(attempt, _failure(message))

    def _attempt_of(self, sequence: Sequence) -> Attempt | None:
        attempt = self.attempts.get(RunId(sequence.request.request_id))
        return (
            attempt
            if attempt is not None and attempt.epoch == sequence.epoch and attempt.ended is None
            else None
        )

    def _log(self, attempt: Attempt, event: Sampled) -> None:
        sequence = event.sequence
        if sequence not in attempt.sequences:
            attempt.sequences.append(sequence)
        if attempt.timings is None:
            attempt.timings = self.phase_timings(sequence)
            attempt.prompt_logprobs = tuple(sequence.prompt_logprobs)
        if event.choice in attempt.finished_choices:
            self._stop_if_over(attempt, sequence)  # it was not on its own before
            return
        attempt.append(event.choice, event.position, event.token)
        log = attempt.logs[event.choice]
        if event.finish is not None:
            log.finish, log.stop_token_id = event.finish, event.stop_token_id
        self._sessions.session(attempt.router_id).touch(attempt)
        self._end_if_whole(attempt)

    def _stop_if_over(self, attempt: Attempt, sequence: Sequence) -> None:
        """Stop computing choices that the client no longer waits for."""
        is_on_its_own = sequence.status in (Status.RUNNING, Status.WAITING)
        if is_on_its_own and attempt.finished_choices.issuperset(sequence.choices):
            self.scheduler.cancel(sequence)

    def _end_if_whole(self, attempt: Attempt) -> None:
        if attempt.is_whole and attempt.submit.task is not Task.PREFILL:
            self.end(attempt, None)

    def phase_timings(self, sequence: Sequence) -> WorkerTiming:
        """What a sequence has cost so far."""
        now_s = self._clock.now_s()
        started = sequence.started_at if sequence.started_at is not None else now_s
        prompt_done = sequence.prompt_done_at if sequence.prompt_done_at is not None else now_s
        return WorkerTiming(
            queue_s=started - sequence.arrived_at,
            prefill_s=prompt_done - started,
            cached_tokens=sequence.num_prefix_hit_tokens,
        )

    def end(self, attempt: Attempt, error: ServingError | None) -> None:
        """End an attempt, once: stop its sequences and let the router know."""
        if attempt.ended is not None:
            return
        timings = attempt.timings or WorkerTiming()
        if attempt.sequences and attempt.submit.task is not Task.PREFILL:
            done_at = attempt.sequences[0].prompt_done_at
            if done_at is not None:
                timings = replace(timings, decode_s=self._clock.now_s() - done_at)
        attempt.ended = AttemptEnded(
            attempt.request_id, attempt.epoch, attempt.submit.task, timings, error
        )
        self._trace(attempt)
        self._stop_sequences(attempt, error)
        self._sessions.session(attempt.router_id).touch(attempt)
        self._loop.wake()

    def _trace(self, attempt: Attempt) -> None:
        with contained("the trace of an attempt"):
            trace_attempt(self.tracing, attempt, self._clock.now_s())

    def fail_transfer(self, transfer_id: TransferId, error: ServingError) -> None:
        """End the attempt that a transfer belongs to: a step of it broke here."""
        for attempt in list(self.attempts.values()):
            if attempt.submit.transfer_id == transfer_id:
                self.end(attempt, error)

    def _stop_sequences(self, attempt: Attempt, error: ServingError | None) -> None:
        if attempt.submit.task is not Task.LOCAL:
            with contained("the end of a hand-over"):
                self.role.end(attempt, error)
        for sequence in attempt.sequences:
            with contained("the end of a sequence"):
                self.scheduler.cancel(sequence)

    async def _rank_lost(self, error: WorkerLost, plan: StepPlan) -> None:
        """Every request in the engine ends with the rank group; a fresh group takes over.

        Only requests in the fatal step are under suspicion of having caused it.
        """
        self.is_ready = False
        told.RANKS_LOST.log(
            worker_id=self.identity.worker_id,
            reason=error.message,
            rank_pids=self._runner.rank_pids(),
            attempts=len(self.attempts),
        )
        in_step = {item.sequence_key for item in plan.items}
        for attempt in list(self.attempts.values()):
            was_in_step = any(s.key in in_step for s in attempt.sequences)
            self.end(attempt, error if was_in_step else WorkerLost(error.message))
        self.scheduler.fail_all()
        self._sessions.tell()
        await self._runner.restart()
        self.is_ready = not self._is_draining
        self._sessions.tell()

    # --- what sessions ask ------------------------------------------------------------------------

    def progress(self) -> Progress:
        """Current counters."""
        pool, scheduler = self.scheduler.pool, self.scheduler
        return Progress(
            steps=self._loop.num_steps,
            layers_done=self._runner.layers_done,
            work_in_hand=self._loop.plan is not None,
            load=Load(
                num_waiting=len(scheduler.waiting),
                num_running=len(scheduler.running) + len(scheduler.arriving),
                waiting_tokens=scheduler.num_waiting_tokens,
                free_blocks=pool.num_free,
                cached_blocks=pool.num_cached,
            ),
            rank_pids=self._runner.rank_pids(),
            is_ready=self.is_ready,
            is_leaving=self._is_draining and not self.fatal.done(),
        )

    def descriptor(self) -> WorkerDescriptor:
        """Who this worker is."""
        return self.identity


def _failure(message: str) -> ServingError:
    if message == NOTHING_TO_DRAW:
        return InvalidRequest(
            "allowed_token_ids", "and bad_words, stop tokens or min_tokens leave no token to draw"
        )
    return StepFailed(message)
