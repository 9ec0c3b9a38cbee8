"""What the router knows of one request while it lives, and of its attempt in progress.

Owns the delivery of tokens to the choices, the merging of workers' figures, and how an attempt ends
by what its workers say. Does not know placement, admission or the doors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from core.errors import KVTransferError, LayoutMismatch, PoolExhausted, ServingError, WorkerLost
from core.ids import Epoch, RunId, WorkerId
from core.ports import Clock
from core.session import AttemptEnded, TokenDelta, Wanted, WorkerTiming
from core.timeline import Timeline
from core.trace import Span
from core.types import (
    GenerateRequest,
    Logprob,
    Path,
    PromptScored,
    RequestEvent,
    TextDelta,
    Usage,
)
from router.choice_output import ChoiceOutput
from router.placement import Placement

Emit = Callable[[RequestEvent], None]


@dataclass(slots=True)
class AttemptState:
    """One attempt: who serves it and how it ends."""

    run: RequestState
    epoch: Epoch
    placement: Placement
    finished: asyncio.Future[None]
    started_at: float
    decode_spoke: bool = False
    prefill_spoke: bool = False
    held: list[TokenDelta] = field(default_factory=list)
    """What decode said before prefill, when the prompt's own scores have to come first;
    bounded by the credit."""
    scores: list[Logprob] = field(default_factory=list)
    """The prompt's, as far as they have come."""
    on_choice_finished: Callable[[], None] = lambda: None
    """Called when one of several choices is over: the worker need not compute it any further."""
    told_finished: tuple[int, ...] = ()

    def fail(self, error: ServingError, suspect: WorkerId | None = None) -> None:
        """End the attempt with a fault, once; `suspect` is avoided by the next one."""
        if not self.finished.done():
            self.finished.set_exception(error)
            if suspect is not None:
                self.run.excluded.add(suspect)

    def _suspect(self, reporter: WorkerId, error: ServingError) -> WorkerId | None:
        """A broken transfer is blamed on the other side, everything else on who reports it."""
        if isinstance(error, LayoutMismatch):
            return None  # neither is to blame: only this pair is remembered
        if isinstance(error, PoolExhausted):
            return (
                self.placement.decode.worker_id
            )  # room is waited for on decode alone, whoever reports it
        pair = (self.placement.prefill.worker_id, self.placement.decode.worker_id)
        is_transfer = isinstance(error, KVTransferError)
        return pair[0] if (reporter == pair[1]) == is_transfer else pair[1]

    def wanted(self) -> Wanted:
        """What is still missing, for a reconnect."""
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
        """Tokens came: deliver what is new; the attempt is done when every choice is."""
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
        held, self.held = self.held, []
        try:
            if not is_decode:
                self.run.deliver(delta, is_decode=False)
            for later in (*held, delta) if is_decode else held:
                self.run.deliver(later, is_decode=True)
        except ServingError as error:
            self.fail(error)
            return
        self.decode_spoke = self.decode_spoke or is_decode or bool(held)
        if self.run.is_whole:
            self.finished.set_result(None)
        elif self.run.finished_choices != self.told_finished:
            self.told_finished = self.run.finished_choices
            self.on_choice_finished()

    def _take_scores(self, delta: TokenDelta) -> None:
        """Put the parts of the prompt's scores together; they are told whole, before any token."""
        if not delta.prompt_logprobs or self.run.has_prompt_scores:
            return
        known = len(self.scores)
        if delta.prompt_start > known:
            raise WorkerLost(f"prompt scores {known} to {delta.prompt_start - 1} are missing")
        self.scores += delta.prompt_logprobs[known - delta.prompt_start :]
        if len(self.scores) >= self.run.num_scores:
            self.run.has_prompt_scores = True
            self.run.emit(PromptScored(tuple(self.scores)))
            self.scores.clear()

    @property
    def _awaits_scores(self) -> bool:
        """True while only the prefill worker's first word can bring the scores before any token."""
        is_wanted = (
            self.run.request.sampling.prompt_logprobs is not None and not self.run.has_prompt_scores
        )
        return is_wanted and self.placement.path is Path.PD and not self.prefill_spoke

    def on_ended(self, worker_id: WorkerId, ended: AttemptEnded) -> None:
        """A worker's part is over; after decode has spoken, prefill's troubles are its own."""
        self.run.note_timings(ended.timings)
        is_prefill = (
            self.placement.path is Path.PD and worker_id == self.placement.prefill.worker_id
        )
        if ended.error is not None and not (is_prefill and self.decode_spoke):
            self.fail(ended.error, self._suspect(worker_id, ended.error))

    def on_lost(self, worker_id: WorkerId, error: WorkerLost) -> None:
        """A worker is gone."""
        is_prefill = (
            self.placement.path is Path.PD and worker_id == self.placement.prefill.worker_id
        )
        if not (is_prefill and self.decode_spoke):
            self.fail(error, worker_id)


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
    """Set by `abort` and by a router that drains: no further attempt."""

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
        """Path of the latest attempt; none before its placement."""
        return self.placement.path.value if self.placement else "none"

    @property
    def num_output_tokens(self) -> int:
        """Tokens delivered, over all choices."""
        return sum(len(c.token_ids) for c in self.choices)

    def deliver(self, delta: TokenDelta, *, is_decode: bool) -> None:
        """Pass new tokens on and note when each side first spoke."""
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
            self.prefill_spoke_at = (
                now_s  # if decode was first, nothing of the transfer was exposed
            )
        for event in self.choices[delta.choice].accept(delta):
            if isinstance(event, TextDelta) and event.token_ids:
                self.timeline.delivered(now_s, len(event.token_ids))
            self.emit(event)

    def note_timings(self, t: WorkerTiming) -> None:
        """Merge a worker's figures: each field is one worker's to report."""
        old = self.timings
        self.timings = WorkerTiming(
            queue_s=old.queue_s or t.queue_s,
            prefill_s=old.prefill_s or t.prefill_s,
            decode_s=max(old.decode_s, t.decode_s),
            cached_tokens=max(old.cached_tokens, t.cached_tokens),
            kv_bytes=max(old.kv_bytes, t.kv_bytes),
            kv_blocks=max(old.kv_blocks, t.kv_blocks),
            kv_transport=t.kv_transport or old.kv_transport,
            kv_fragments_resent=max(old.kv_fragments_resent, t.kv_fragments_resent),
        )

    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(
            len(self.request.token_ids), self.num_output_tokens, self.timings.cached_tokens
        )
