"""A worker's books: which attempts exist, their epochs and their ends.

Owns every attempt by its run, what routers command of it, and tombstones of cancelled ones. Does
not know how a role sends or receives KV: that is `WorkerRole`'s.

    Submit ──▶ Attempt ──▶ sequences in the scheduler ──▶ tokens logged ──▶ frame
       ended (done, failed) ──▶ kept until the router's Cancel acknowledges it
"""

from __future__ import annotations

import asyncio
import functools
from collections import OrderedDict
from dataclasses import replace

from core.containment import contained, fault_of
from core.errors import InvalidRequest, ServingError, StepFailed, WorkerLost
from core.ids import Epoch, RouterId, RunId, TransferId
from core.plan import NOTHING_TO_DRAW
from core.session import (
    AttemptEnded,
    ConnectPeers,
    Credit,
    OfferPrefix,
    RouteReport,
    Submit,
    Task,
    WorkerTiming,
)
from engine.scheduling.events import PromptComputed, Sampled, SchedulerEvent, SequenceFailed
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence, Status
from worker.attempt import Attempt
from worker.availability import Availability
from worker.checking import check_credit, check_submit
from worker.components import Loops, WorkerComponents
from worker.router_session import RouterSessions
from worker.sequences import add_local_sequences, timing_of
from worker.step_loop import StepLoop
from worker.stored_prefixes import StoredPrefixes
from worker.tracing import trace_attempt
from worker.transfers import Transfers

MAX_TOMBSTONES = 4096
"""A Submit may come after its Cancel by as much as one stream lives longer than another: seconds,
in which no router cancels nearly so many."""


class AttemptTable:
    """The attempts of one worker of either role."""

    def __init__(
        self,
        scheduler: Scheduler,
        components: WorkerComponents,
        availability: Availability,
        step_loop: StepLoop,
        stored: StoredPrefixes | None,
        loops: Loops,
    ) -> None:
        """Start with no attempt, and make the role, which works on this table.

        Args:
            scheduler: The engine's.
            components: What the worker is made of.
            availability: Whether it takes attempts.
            step_loop: Computes them.
            stored: Loads what the storage tiers below the pool hold of a prompt.
            loops: The worker's loop and its transfer agent's.
        """
        self.scheduler = scheduler
        self.vocabulary_size = components.vocabulary_size
        self.tracing = components.tracing
        self._clock = components.clock
        self._availability = availability
        self._step_loop = step_loop
        self._stored = stored
        self.by_run: dict[RunId, Attempt] = {}
        self.sessions = RouterSessions(self.fail, components.frame_bytes)
        self.emptied = asyncio.Event()
        """Set whenever an attempt is forgotten."""
        self.num_stale = 0
        self.num_attempts = 0
        self._tombstones: OrderedDict[RunId, Epoch] = OrderedDict()
        self.transfers = Transfers(components, scheduler, self, loops)
        self.role = self.transfers.role

    def wake(self) -> None:
        """Let a step begin, or let an arrival have blocks in the midst of one: it may be long."""
        self._step_loop.wake()
        if self._step_loop.plan is not None:
            self.scheduler.reserve_in_turn(self._clock.now_s())
            self.deliver(self.scheduler.take_events())

    # --- commands from routers --------------------------------------------------------------------

    def submit(self, router_id: RouterId, submit: Submit) -> None:
        """Take part in an attempt, if its epoch is new; an older attempt makes room for it.

        Raises:
            InvalidRequest: It holds what no request can; nothing was changed.
        """
        check_submit(submit, self.vocabulary_size)
        run_id = submit.run_id
        old = self.by_run.get(run_id)
        # A Submit may come twice, or after the Cancel of its attempt: streams may cross.
        known = max(old.epoch if old else -1, self._tombstones.get(run_id, -1))
        if submit.epoch <= known:
            self.num_stale += 1
            return
        attempt = Attempt(router_id, submit)
        error: ServingError | None = None
        try:
            self._availability.check_open()
            self._begin(attempt)
        except Exception as fault:  # noqa: BLE001 - an attempt's fault ends the attempt
            error = fault_of("the beginning of an attempt", fault)
        # The older attempt goes in either case: its router has moved on to this epoch.
        if old is not None:
            self.cancel(run_id, old.epoch)
        self.num_attempts += 1
        self.by_run[run_id] = attempt
        self.sessions.of(router_id).attempts[run_id] = attempt
        if error is not None:
            self.end(attempt, error)  # entered first: an end is sent from the books alone
            return
        self._step_loop.wake()

    def _begin(self, attempt: Attempt) -> None:
        task = attempt.submit.task
        if task is Task.LOCAL:
            add_local_sequences(self.scheduler, attempt, self._clock.now_s())
            self.enter(attempt)
        elif self.role.task is task:
            self.transfers.begin(attempt)
        else:
            raise WorkerLost(f"this worker takes no {task} attempts")

    def enter(self, attempt: Attempt) -> None:
        """Queue an attempt's sequences; a prefix that a peer is to send is fetched before.

        Whatever becomes of the fetch, `queue` follows.
        """
        if not self.transfers.begin_fetch(attempt):
            self.queue(attempt)

    def queue(self, attempt: Attempt) -> None:
        """Queue an attempt's sequences; what storage tiers hold of a prompt is loaded before.

        A sequence whose blocks fail to come, or come late, is queued all the same.
        """
        for sequence in attempt.sequences:
            submit = functools.partial(self._submit, attempt, sequence)
            if self._stored is None:
                submit()
            else:
                self._stored.load(sequence, submit)

    def _submit(self, attempt: Attempt, sequence: Sequence) -> None:
        # The attempt may have ended while blocks were loaded for it.
        if sequence.is_finished:
            return
        with contained("queueing a sequence", functools.partial(self.end, attempt)):
            self.scheduler.submit(sequence)
            self.deliver(self.scheduler.take_events())
        self._step_loop.wake()

    def cancel(self, run_id: RunId, epoch: int) -> None:
        """Forget an attempt and older ones; a Cancel before its Submit leaves a tombstone."""
        attempt = self.by_run.get(run_id)
        if attempt is not None and attempt.epoch <= epoch:
            if attempt.ended is None:
                self._trace(attempt)
            self._stop_sequences(attempt, None)
            del self.by_run[run_id]
            self.sessions.of(attempt.router_id).attempts.pop(run_id, None)
            self.emptied.set()
        # Taken out and put back at the end, so that the oldest Cancel is the first forgotten.
        self._tombstones[run_id] = Epoch(max(epoch, self._tombstones.pop(run_id, -1)))
        while len(self._tombstones) > MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)
        self.wake()

    def credit(self, message: Credit) -> None:
        """More positions may be computed.

        Raises:
            InvalidRequest: It names choices that the request does not have.
        """
        attempt = self.by_run.get(message.run_id)
        if attempt is None or attempt.epoch != message.epoch:
            self.num_stale += 1
            return
        check_credit(message.finished_choices, attempt.submit.request)
        attempt.finished_choices.update(message.finished_choices)
        for sequence in attempt.sequences:
            self.scheduler.credit(sequence, message.limit)
            self._stop_if_over(attempt, sequence)
        self._end_if_whole(attempt)
        self.wake()

    def fail(self, run_id: RunId, epoch: int, error: ServingError) -> None:
        """A command for this attempt failed: it ends."""
        attempt = self.by_run.get(run_id)
        if attempt is not None and attempt.epoch == epoch:
            self.end(attempt, error)

    def offer_prefix(self, message: OfferPrefix) -> None:
        """Let a peer fetch blocks that are cached here."""
        self.transfers.offer_prefix(message)

    def connect_peers(self, message: ConnectPeers) -> None:
        """Connect to peers before a request needs them."""
        self.role.connect_peers(message)

    def router_alive(self, router_id: RouterId) -> None:
        """Renew the leases of this router's transfers."""
        self.role.renew(list(self.sessions.of(router_id).attempts.values()))

    # --- events from the engine -------------------------------------------------------------------

    def deliver(self, events: list[SchedulerEvent]) -> None:
        """Log tokens and end attempts that are done; hand-overs are the role's."""
        for event in events:
            if not isinstance(event, Sampled | PromptComputed | SequenceFailed):
                self.role.take(event)
                continue
            sequence = event.sequence
            attempt = self.by_run.get(RunId(sequence.request.request_id))
            # What a step computed for an attempt that is over, or an older one, is dropped.
            if attempt is None or attempt.epoch != sequence.epoch or attempt.ended is not None:
                continue
            # A fault ends the attempt alone: the step's other sequences have their results.
            with contained("taking a step's result", functools.partial(self.end, attempt)):
                match event:
                    case Sampled():
                        self._log_token(attempt, event)
                    case PromptComputed():
                        self.role.prompt_computed(sequence)
                    case SequenceFailed(_, message):
                        self.end(attempt, _failure(message))

    def _log_token(self, attempt: Attempt, event: Sampled) -> None:
        sequence = event.sequence
        if sequence not in attempt.sequences:  # the engine forked it off for this choice
            attempt.sequences.append(sequence)
        if attempt.timings is None:  # the first token: only now is the prefill's cost known
            attempt.timings = self.phase_timings(attempt, sequence)
            attempt.prompt_logprobs = tuple(sequence.prompt_logprobs)
        if event.choice in attempt.finished_choices:
            self._stop_if_over(attempt, sequence)  # it was not on its own before
            return
        log = attempt.append(event.choice, event.position, event.token)
        self.sessions.of(attempt.router_id).touch(attempt)
        if event.finish is not None:
            log.finish = event.finish
            log.stop_token_id = event.stop_token_id
            self._end_if_whole(attempt)

    def _stop_if_over(self, attempt: Attempt, sequence: Sequence) -> None:
        """Stop computing choices that the client no longer waits for."""
        is_on_its_own = sequence.status in (Status.RUNNING, Status.WAITING)
        if is_on_its_own and attempt.finished_choices.issuperset(sequence.choices):
            self.scheduler.cancel(sequence)

    # --- ends -------------------------------------------------------------------------------------

    def _end_if_whole(self, attempt: Attempt) -> None:
        # A prefill attempt goes on after its last token, until the KV has arrived.
        if attempt.is_whole and attempt.submit.task is not Task.PREFILL:
            self.end(attempt, None)

    def end(self, attempt: Attempt, error: ServingError | None) -> None:
        """End an attempt, once: stop its sequences and let the router know."""
        if attempt.ended is not None:
            return
        timings = attempt.timings or WorkerTiming()
        # What a prefill attempt does after its prompt is the hand-over, which is no decoding.
        if attempt.sequences and attempt.submit.task is not Task.PREFILL:
            done_at = attempt.sequences[0].prompt_done_at
            if done_at is not None:
                timings = replace(timings, decode_s=self._clock.now_s() - done_at)
        attempt.ended = AttemptEnded(
            attempt.run_id, attempt.epoch, attempt.submit.task, timings, error
        )
        self._trace(attempt)
        self._stop_sequences(attempt, error)
        self.sessions.of(attempt.router_id).touch(attempt)
        self.wake()

    def fail_transfer(self, transfer_id: TransferId, error: ServingError) -> None:
        """End the attempt that a transfer belongs to: a step of it broke here."""
        # A search: faults are rare, and an index would have to be kept for every transfer.
        for attempt in list(self.by_run.values()):
            if attempt.submit.transfer_id == transfer_id:
                self.end(attempt, error)

    def _stop_sequences(self, attempt: Attempt, error: ServingError | None) -> None:
        # Each is contained for itself: one that cannot be stopped must not keep the others' blocks.
        if attempt.submit.task is not Task.LOCAL:
            with contained("the end of a hand-over"):
                self.role.end(attempt, error)
        with contained("the end of a fetch"):
            self.transfers.fetches.end(attempt)
        for sequence in attempt.sequences:
            with contained("the end of a sequence"):
                self.scheduler.cancel(sequence)

    def _trace(self, attempt: Attempt) -> None:
        with contained("the trace of an attempt"):
            trace_attempt(self.tracing, attempt, self._clock.now_s())

    # --- what the role reports --------------------------------------------------------------------

    def phase_timings(self, attempt: Attempt, sequence: Sequence) -> WorkerTiming:
        """What a sequence of an attempt has cost so far."""
        return timing_of(attempt, sequence, self._clock.now_s())

    def route_found(self, route: RouteReport) -> None:
        """A peer was probed: every router may know how KV would come from it."""
        self.sessions.send_route(route)


def _failure(message: str) -> ServingError:
    """Tell a request that leaves nothing to draw, the client's fault, from a failed step."""
    if message == NOTHING_TO_DRAW:
        return InvalidRequest(
            "allowed_token_ids", "and bad_words, stop tokens or min_tokens leave no token to draw"
        )
    return StepFailed(message)
