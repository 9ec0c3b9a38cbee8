"""What the router knows of one request while it lives, and of its attempt in progress.

Owns the delivery of tokens to the choices, the merging of workers' figures, and how an attempt ends
by what its workers report. Does not know placement, admission, HTTP or gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from core.errors import KVTransferError, LayoutMismatch, PoolExhausted, ServingError, WorkerLost
from core.ids import Epoch, RequestId, RunId, WorkerId
from core.ports import Clock
from core.session import AttemptEnded, TokenDelta, Wanted, WorkerTiming
from core.timeline import Timeline
from core.trace import Span
from core.types import (
    GenerateRequest,
    Logprob,
    Path,
    PromptScored,
    RequestEnded,
    RequestEvent,
    TextDelta,
    Usage,
)
from router.choice_output import ChoiceOutput
from router.placement import Placement

Emit = Callable[[RequestEvent], None]
RunKey = tuple[str, RequestId]
"""Tenant and request id: two tenants may choose the same."""


class RequestObserver:
    """Hears how requests fare; what it raises harms none of them. This one notes nothing."""

    def request_ended(self, run: RequestState, ended: RequestEnded) -> None:
        """Note the end of a request that began to run."""

    def request_refused(self, request: GenerateRequest, error: ServingError) -> None:
        """Note a request that never began to run."""

    def retried(self, error: ServingError) -> None:
        """Note the fault after which a request is tried again."""


@dataclass(slots=True)
class AttemptState:
    """One attempt: who serves it and how it ends."""

    run: RequestState
    epoch: Epoch
    placement: Placement
    finished: asyncio.Future[None]
    started_at: float
    on_choice_finished: Callable[[AttemptState], None]
    """Called when one of several choices is over: the worker can stop computing it."""
    on_answered: Callable[[AttemptState], None]
    """Called once, with the first tokens: the prompt is computed."""
    reported_finished: tuple[int, ...] = ()
    """Finished choices at the last of these calls, or before the first."""
    is_answered: bool = False
    decode_spoke: bool = False
    prefill_spoke: bool = False
    held: list[TokenDelta] = field(default_factory=list)
    """Decode's deltas that arrived before prefill's, while the prompt's scores must come first;
    bounded by the credit."""
    scores: list[Logprob] = field(default_factory=list)
    """The prompt's scores, as far as they have arrived."""

    def fail(self, error: ServingError, suspect: WorkerId | None = None) -> None:
        """End the attempt with a fault, once; the next one avoids `suspect`."""
        if not self.finished.done():
            self.finished.set_exception(error)
            if suspect is not None:
                self.run.excluded.add(suspect)

    def wanted(self) -> Wanted:
        """Return what is still missing, for a reconnect."""
        run = self.run
        return Wanted(
            request_id=run.run_id,
            epoch=self.epoch,
            next_positions=tuple(len(c.token_ids) for c in run.choices),
            credit=run.credit,
            num_scores=run.num_scores if run.has_prompt_scores else len(self.scores),
            finished_choices=run.finished_choices,
        )

    def on_delta(self, worker_id: WorkerId, delta: TokenDelta) -> None:
        """Deliver new tokens; the attempt is done when every choice is."""
        if self.finished.done():
            return
        is_decode = worker_id == self.placement.decode.worker_id
        try:
            self._take_scores(delta)
        except ServingError as error:
            self.fail(error)
            return
        if not (delta.token_ids or delta.finish):
            return
        if is_decode and self._awaits_scores:
            self.held.append(delta)
            return
        self.prefill_spoke = self.prefill_spoke or not is_decode
        held = self.held
        self.held = []
        try:
            if not is_decode:
                self.run.deliver(delta, is_decode=False)
            for later in (*held, delta) if is_decode else held:
                self.run.deliver(later, is_decode=True)
        except ServingError as error:
            self.fail(error)
            return
        self.decode_spoke = self.decode_spoke or is_decode or bool(held)
        if not self.is_answered:
            self.is_answered = True
            self.on_answered(self)
        if self.run.is_whole:
            self.finished.set_result(None)
        elif self.run.finished_choices != self.reported_finished:
            self.reported_finished = self.run.finished_choices
            self.on_choice_finished(self)

    def _take_scores(self, delta: TokenDelta) -> None:
        """Collect the prompt's scores; they are emitted whole, before any token."""
        if not delta.prompt_logprobs or self.run.has_prompt_scores:
            return
        known = len(self.scores)
        if delta.prompt_start > known:
            raise WorkerLost(f"prompt scores {known} to {delta.prompt_start - 1} are missing")
        # A stream that was cut sends some of them again.
        self.scores += delta.prompt_logprobs[known - delta.prompt_start :]
        if len(self.scores) >= self.run.num_scores:
            self.run.has_prompt_scores = True
            self.run.emit(PromptScored(tuple(self.scores)))
            self.scores.clear()

    @property
    def _awaits_scores(self) -> bool:
        """True while the prefill worker still has to bring the prompt's scores."""
        run = self.run
        is_wanted = run.request.sampling.prompt_logprobs is not None and not run.has_prompt_scores
        return is_wanted and self.placement.path is Path.PD and not self.prefill_spoke

    def on_ended(self, worker_id: WorkerId, ended: AttemptEnded) -> None:
        """Note a worker's end; its error ends the attempt, unless the worker is needed no more."""
        self.run.note_timings(ended.timings)
        if ended.error is not None and not self._is_done_with(worker_id):
            self.fail(ended.error, self._suspect(worker_id, ended.error))

    def _suspect(self, reporter: WorkerId, error: ServingError) -> WorkerId | None:
        """Return the worker to avoid: for a broken transfer the other side, else the reporter."""
        prefill_id = self.placement.prefill.worker_id
        decode_id = self.placement.decode.worker_id
        if isinstance(error, LayoutMismatch):
            return None  # neither is to blame: only the pair is remembered
        if isinstance(error, PoolExhausted):
            return decode_id  # only decode waits for room, whoever reports it
        is_transfer = isinstance(error, KVTransferError)
        return prefill_id if (reporter == decode_id) == is_transfer else decode_id

    def on_lost(self, worker_id: WorkerId, error: WorkerLost) -> None:
        """End the attempt: a worker is gone, unless it is needed no more."""
        if not self._is_done_with(worker_id):
            self.fail(error, worker_id)

    def _is_done_with(self, worker_id: WorkerId) -> bool:
        """True for the prefill worker once decode has its KV, which its first token proves."""
        is_prefill = (
            self.placement.path is Path.PD and worker_id == self.placement.prefill.worker_id
        )
        return is_prefill and self.decode_spoke


@dataclass(slots=True)
class RequestState:
    """Everything the router knows of one request while it lives."""

    request: GenerateRequest
    run_id: RunId
    """What workers call this run: they may remember an older run under the client's id."""
    emit: Emit
    clock: Clock
    timeline: Timeline
    choices: list[ChoiceOutput]
    credit: int
    path: Literal["auto", "pd", "local"]
    timings: WorkerTiming = field(default_factory=WorkerTiming)
    excluded: set[WorkerId] = field(default_factory=set)
    attempts: list[str] = field(default_factory=list)
    placement: Placement | None = None
    num_deaths: int = 0
    prefill_spoke_at: float | None = None
    exposed_transfer_s: float = 0.0
    current: AttemptState | None = None
    has_prompt_scores: bool = False
    started_at: float = 0.0
    span: Span | None = None
    aborted_with: ServingError | None = None
    """Set by `abort` and by a draining router: no further attempt."""

    @property
    def is_whole(self) -> bool:
        """True when every choice has finished."""
        return all(c.finished is not None for c in self.choices)

    @property
    def finished_choices(self) -> tuple[int, ...]:
        """Choices that are over."""
        return tuple(c.choice for c in self.choices if c.finished is not None)

    @property
    def num_scores(self) -> int:
        """Prompt tokens that have a log probability: all but the first."""
        return len(self.request.token_ids) - 1

    @property
    def path_taken(self) -> str:
        """Path of the latest attempt; "none" before its placement."""
        return self.placement.path.value if self.placement else "none"

    @property
    def num_output_tokens(self) -> int:
        """Delivered tokens over all choices."""
        return sum(len(c.token_ids) for c in self.choices)

    def deliver(self, delta: TokenDelta, *, is_decode: bool) -> None:
        """Emit new tokens, and note when either side first delivered one."""
        now_s = self.clock.now_s()
        if delta.timings is not None:
            self.note_timings(delta.timings)
        if is_decode and self.prefill_spoke_at is not None:
            self.exposed_transfer_s = max(0.0, now_s - self.prefill_spoke_at)
            self.prefill_spoke_at = None
        elif (
            not is_decode
            and self.prefill_spoke_at is None
            and not (self.current and self.current.decode_spoke)
        ):
            # Had decode been first, nothing of the transfer would have been exposed.
            self.prefill_spoke_at = now_s
        for event in self.choices[delta.choice].accept(delta):
            if isinstance(event, TextDelta) and event.token_ids:
                self.timeline.delivered(now_s, len(event.token_ids))
            self.emit(event)

    def note_timings(self, new: WorkerTiming) -> None:
        """Merge a worker's figures: only one of the workers reports each field."""
        old = self.timings
        self.timings = WorkerTiming(
            queue_s=old.queue_s or new.queue_s,
            prefill_s=old.prefill_s or new.prefill_s,
            decode_s=max(old.decode_s, new.decode_s),
            cached_tokens=max(old.cached_tokens, new.cached_tokens),
            kv_bytes=max(old.kv_bytes, new.kv_bytes),
            kv_blocks=max(old.kv_blocks, new.kv_blocks),
            kv_transport=new.kv_transport or old.kv_transport,
            kv_fragments_resent=max(old.kv_fragments_resent, new.kv_fragments_resent),
            fetch=new.fetch if new.fetch.outcome else old.fetch,
        )

    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(
            len(self.request.token_ids), self.num_output_tokens, self.timings.cached_tokens
        )
