"""What the router knows of one request while it lives.

Owns the delivery of tokens to the choices and the merging of workers' figures. Does not know its
attempts, placement, admission, HTTP or gRPC.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from core.config import PlacementConfig
from core.errors import Draining, NoWorker, PoolExhausted, ServingError
from core.ids import Epoch, RequestId, RunId, WorkerId
from core.ports import Clock
from core.session import TokenDelta, WorkerTiming
from core.timeline import Timeline
from core.trace import Span
from core.types import (
    GenerateRequest,
    RequestEnded,
    RequestEvent,
    TextDelta,
    Usage,
)
from router.choice_output import ChoiceOutput
from router.placement import Placement
from router.prefix_outcome import PromptOutcome
from router.regret import MeasuredCost

Emit = Callable[[RequestEvent], None]
RunKey = tuple[str, RequestId]
"""Tenant and request id: two tenants may choose the same."""


class RequestObserver:
    """Hears how requests fare; what it raises harms none of them. This one notes nothing."""

    def request_ended(self, run: RequestState, ended: RequestEnded) -> None:
        """Note the end of a request that began to run."""

    def request_refused(self, request: GenerateRequest, error: ServingError) -> None:
        """Note a request that never began to run."""

    def prompt_computed(self, run: RequestState, outcome: PromptOutcome) -> None:
        """Note what became of a prompt's cached beginning, once a request."""

    def retried(self, error: ServingError) -> None:
        """Note the fault after which a request is tried again."""


@dataclass(frozen=True, slots=True)
class EndedAttempt:
    """One attempt that is over."""

    epoch: Epoch
    path: str
    outcome: str
    """ok, or the code of its fault."""
    workers: tuple[WorkerId, ...] = ()
    """Who computed the prompt, and who decoded if another; empty: it found none."""
    is_move: bool = False
    """Off a worker that drains or is full: no fault."""

    def __str__(self) -> str:
        """Write it as timings show it."""
        return f"{self.epoch}:{self.path}:{self.outcome}"


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
    rules: PlacementConfig
    """How it is placed; the call may force the path."""
    timings: WorkerTiming = field(default_factory=WorkerTiming)
    excluded: set[WorkerId] = field(default_factory=set)
    attempts: list[EndedAttempt] = field(default_factory=list)
    placement: Placement | None = None
    measured: MeasuredCost | None = None
    """What the latest placement took; None: not all of it was measured, or not for it alone."""
    num_deaths: int = 0
    exposed_transfer_s: float = 0.0
    """Between prefill's first tokens and decode's, in the attempt that saw both."""
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
    def awaits_prompt_scores(self) -> bool:
        """True while the prompt's log probabilities are wanted and not here."""
        return self.request.sampling.prompt_logprobs is not None and not self.has_prompt_scores

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

    def attempt_ended(self, epoch: Epoch, error: ServingError | None = None) -> None:
        """Note an attempt, and the fault or the move that ended it."""
        placement = self.placement
        # One that found no worker has no placement of its own.
        is_placed = placement is not None and not isinstance(error, NoWorker)
        workers = (placement.prefill, placement.decode) if placement and is_placed else ()
        self.attempts.append(
            EndedAttempt(
                epoch,
                self.path_taken,
                error.code if error else "ok",
                tuple(dict.fromkeys(worker.worker_id for worker in workers)),
                isinstance(error, Draining | PoolExhausted),
            )
        )

    def deliver(self, delta: TokenDelta) -> None:
        """Emit new tokens.

        Raises:
            ServingError: They cannot be taken, as when positions before them are missing.
        """
        if delta.timings is not None:
            self.note_timings(delta.timings)
        now_s = self.clock.now_s()
        for event in self.choices[delta.choice].accept(delta):
            if isinstance(event, TextDelta) and event.token_ids:
                self.timeline.delivered(now_s, len(event.token_ids))
            self.emit(event)

    def note_timings(self, new: WorkerTiming) -> None:
        """Merge a worker's figures: only one of the workers reports each field."""
        old = self.timings
        cached_tokens = max(old.cached_tokens, new.cached_tokens)
        if old.prefill_s:
            # A later attempt finds what an earlier one computed for this very request.
            cached_tokens = old.cached_tokens
        self.timings = WorkerTiming(
            queue_s=old.queue_s or new.queue_s,
            prefill_s=old.prefill_s or new.prefill_s,
            decode_s=max(old.decode_s, new.decode_s),
            # Output that a client or an attempt resumes with is no part of the prompt.
            cached_tokens=min(cached_tokens, len(self.request.token_ids)),
            kv_bytes=max(old.kv_bytes, new.kv_bytes),
            kv_blocks=max(old.kv_blocks, new.kv_blocks),
            kv_transport=new.kv_transport or old.kv_transport,
            kv_fragments_resent=max(old.kv_fragments_resent, new.kv_fragments_resent),
            fetch=new.fetch if new.fetch.outcome else old.fetch,
        )

    def usage(self) -> Usage:
        """Token counts so far."""
        counts = len(self.request.token_ids), self.num_output_tokens, self.timings.cached_tokens
        prices = self.request.prices
        if prices is None:
            return Usage(*counts)
        num_prompt, num_output, num_cached = counts
        return Usage(*counts, cost=prices.cost(num_prompt, num_cached, num_output))
