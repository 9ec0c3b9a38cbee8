"""What the router knows of an attempt in progress.

Owns the order of what its two workers deliver, what of the transfer is exposed, and how the attempt
ends by what they report. Does not know placement, sessions or what comes after the attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from core.errors import KVTransferError, LayoutMismatch, PoolExhausted, ServingError, WorkerLost
from core.ids import Epoch, WorkerId
from core.session import AttemptEnded, TokenDelta, Wanted
from core.types import Logprob, Path, PromptScored
from router.placement import Placement
from router.prefix_outcome import Expectation
from router.regret import MeasuredCost
from router.request_state import RequestState


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
    on_handed_over: Callable[[AttemptState], None]
    """Called once, on path pd, with decode's first tokens: it has the KV."""
    expectation: Expectation | None = None
    """What of the prompt should be cached where it is computed; None: nobody can tell."""
    reported_finished: tuple[int, ...] = ()
    """Finished choices at the last of these calls, or before the first."""
    is_answered: bool = False
    decode_spoke: bool = False
    prefill_spoke: bool = False
    prefill_spoke_at: float | None = None
    """Until decode speaks: from here on the transfer is exposed."""
    held: list[TokenDelta] = field(default_factory=list)
    """Decode's deltas that arrived before prefill's, while the prompt's scores must come first;
    bounded by the credit."""
    scores: list[Logprob] = field(default_factory=list)
    """The prompt's scores, as far as they have arrived."""
    prefill_reported: asyncio.Event = field(default_factory=asyncio.Event)
    """Prefill has said what it measured, or never will."""

    def fail(self, error: ServingError, suspect: WorkerId | None = None) -> None:
        """End the attempt with a fault, once; the next one avoids `suspect`."""
        if not self.finished.done():
            self.finished.set_exception(error)
            if suspect is not None:
                self.run.excluded.add(suspect)

    async def prefill_report(self, wait_s: float) -> None:
        """Wait for what prefill measured: decode may have said everything before its first word."""
        if self.placement.path is Path.PD and not self.prefill_reported.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self.prefill_reported.wait()

    @property
    def exposed_transfer_s(self) -> float:
        """By which decode's announcement of the first token came behind prefill's."""
        # An attempt before may have left its time: if decode was first, this one exposed nothing.
        return self.run.exposed_transfer_s if self.prefill_spoke else 0.0

    def measured_by(self, now_s: float) -> MeasuredCost | None:
        """Return what the phases took that placement predicts; None if that is not known."""
        timings = self.run.timings
        # Later, the figures of a run may be those of an attempt before, and a client that resumes
        # has its output computed with the prompt.
        is_alone = self.epoch == 0 and not any(self.run.request.resume_from)
        if not (is_alone and self.decode_spoke and timings.prefill_s):
            return None
        # Workers measure by their own clocks: no duration may exceed what the router saw pass.
        passed_s = now_s - self.started_at
        queue_s = min(timings.queue_s, passed_s)
        return MeasuredCost(
            queue_s=queue_s,
            prefill_s=min(timings.prefill_s, passed_s - queue_s),
            transfer_s=self.exposed_transfer_s,
            fetch_s=min(timings.fetch.took_s, queue_s),
        )

    def wanted(self) -> Wanted:
        """Return what is still missing, for a reconnect."""
        run = self.run
        return Wanted(
            run_id=run.run_id,
            epoch=self.epoch,
            next_positions=tuple(len(c.token_ids) for c in run.choices),
            credit=run.credit,
            num_scores=run.num_scores if run.has_prompt_scores else len(self.scores),
            finished_choices=run.finished_choices,
        )

    def on_delta(self, worker_id: WorkerId, delta: TokenDelta) -> None:
        """Deliver new tokens; the attempt is done when every choice is."""
        is_decode = worker_id == self.placement.decode.worker_id
        if delta.timings is not None and not is_decode:
            self.run.note_timings(delta.timings)
            self.prefill_reported.set()
        if self.finished.done():
            return
        try:
            self._take_scores(delta)
        except ServingError as error:
            self.fail(error)
            return
        if not (delta.token_ids or delta.finish):
            return
        # Clients get scores before any token, and prefill alone has them.
        if is_decode and self._awaits_scores:
            self.held.append(delta)
            return
        self.prefill_spoke = self.prefill_spoke or not is_decode
        held = self.held
        self.held = []
        try:
            # Prefill's token is the first; what decode was held for comes after it.
            if not is_decode:
                self._deliver(delta, is_decode=False)
            for later in (*held, delta) if is_decode else held:
                self._deliver(later, is_decode=True)
        except ServingError as error:
            self.fail(error)
            return
        had_spoken = self.decode_spoke
        self.decode_spoke = had_spoken or is_decode or bool(held)
        if self.decode_spoke and not had_spoken and self.placement.path is Path.PD:
            self.on_handed_over(self)
        if not self.is_answered:
            self.is_answered = True
            self.on_answered(self)
        if self.run.is_whole:
            self.finished.set_result(None)
        # A stop string may have ended it, which workers do not see: they would compute on.
        elif self.run.finished_choices != self.reported_finished:
            self.reported_finished = self.run.finished_choices
            self.on_choice_finished(self)

    def _deliver(self, delta: TokenDelta, *, is_decode: bool) -> None:
        """Pass tokens on, and note when either side first delivered some."""
        run = self.run
        if is_decode:
            if self.prefill_spoke_at is not None:
                run.exposed_transfer_s = max(0.0, run.clock.now_s() - self.prefill_spoke_at)
                self.prefill_spoke_at = None
        elif self.prefill_spoke_at is None and not self.decode_spoke:
            # Had decode been first, nothing of the transfer would have been exposed.
            self.prefill_spoke_at = run.clock.now_s()
        run.deliver(delta)

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
        is_wanted = run.awaits_prompt_scores
        return is_wanted and self.placement.path is Path.PD and not self.prefill_spoke

    def on_ended(self, worker_id: WorkerId, ended: AttemptEnded) -> None:
        """Note a worker's end; its error ends the attempt, unless the worker is needed no more."""
        self.run.note_timings(ended.timings)
        if worker_id == self.placement.prefill.worker_id:
            self.prefill_reported.set()
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
        if worker_id == self.placement.prefill.worker_id:
            self.prefill_reported.set()
        if not self._is_done_with(worker_id):
            self.fail(error, worker_id)

    def _is_done_with(self, worker_id: WorkerId) -> bool:
        """True for the prefill worker once decode has its KV, which its first token proves."""
        is_prefill = (
            self.placement.path is Path.PD and worker_id == self.placement.prefill.worker_id
        )
        return is_prefill and self.decode_spoke
