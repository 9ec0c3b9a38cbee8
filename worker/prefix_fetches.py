"""The receiver's side of a fetch: a prefix comes from a peer before its prompt is queued.

Owns, per transfer, the attempt that waits, for how long, and the blocks that the agent may be
writing. Does not know who decided on the fetch, frames or streams.

    begin ─▶ Fetch opened ─▶ Starting ─▶ reserved ─▶ arrived, verified ─▶ cached ─▶ prompt queued
               └── refused, no room, late, damaged: whatever it is ───────────────────▶┘

What arrives becomes cache before the prompt is queued, so that the prompt finds it as any other
hit, and computes what is missing. A fetch that fails costs its wait and nothing else. It waits for
no block of this worker's: no room is a refusal, so that two workers never wait for each other.
"""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass

from core.containment import contained
from core.errors import PoolExhausted, ServingError, TransferNotFound
from core.ids import TransferId
from core.session import FetchOutcome, FetchReport, PrefixSource
from core.types import Logprob
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from kv_transfer.receiver import Arrival, FetchOrder
from kv_transfer.reserved_blocks import Reservation
from worker.attempt import Attempt
from worker.components import TransferAgents, WorkerComponents
from worker.ports import WorkerAttempts

MAX_FETCHES = 64
"""At once; the prompts of more are computed, which is what the engine is there for."""


@dataclass(slots=True, eq=False)
class _Fetch:
    attempt: Attempt
    source: PrefixSource
    began_at: float
    late: asyncio.TimerHandle
    is_waiting: bool = True
    """The attempt is not queued yet."""
    prefix: Sequence | None = None
    """With blocks that the agent may be writing to."""
    pool_generation: int = 0
    """Of the pool in which they are."""


class PrefixFetches:
    """The prefixes that one worker fetches from others."""

    def __init__(
        self,
        components: WorkerComponents,
        scheduler: Scheduler,
        attempts: WorkerAttempts,
        agents: TransferAgents,
    ) -> None:
        """Fetch nothing yet."""
        self._attempts = attempts
        self._prefixes = scheduler.prefixes
        self._pool = scheduler.pool
        self._is_cache_on = components.engine.cache_prefixes
        self._kv = components.kv
        self._layout = components.layout
        self._clock = components.clock
        self._agent = agents.receive
        self._post = agents.post
        self._me = (components.worker_id, components.incarnation)
        self._fetches: dict[TransferId, _Fetch] = {}

    def __len__(self) -> int:
        """Fetches with any state left; zero at rest."""
        return len(self._fetches)

    def __contains__(self, transfer_id: TransferId) -> bool:
        return transfer_id in self._fetches

    # --- called by the worker ---------------------------------------------------------------------

    def begin(self, attempt: Attempt) -> bool:
        """Fetch the prefix of an attempt that has one to fetch; `WorkerAttempts.queue` follows.

        The id of its transfer is new.

        Returns:
            False if there is nothing to wait for.
        """
        source = attempt.submit.prefix_source
        if source is None:
            return False
        # Scores are drawn from the computing of every position: a hit would leave them out.
        if not self._is_cache_on or attempt.submit.request.sampling.prompt_logprobs is not None:
            return False
        if len(self._fetches) >= MAX_FETCHES:
            attempt.fetch = FetchReport(FetchOutcome.NO_ROOM)
            return False
        prefix = self._prefix_of(attempt, source.num_tokens)
        num_held = self._prefixes.num_held(prefix) * self._layout.block_size_tokens
        # Not one whole block would be gained.
        if num_held + self._layout.block_size_tokens > source.num_tokens:
            attempt.fetch = FetchReport(FetchOutcome.HELD)
            return False
        late = functools.partial(self._give_up, source.transfer_id, FetchOutcome.LATE)
        self._fetches[source.transfer_id] = _Fetch(
            attempt,
            source,
            self._clock.now_s(),
            asyncio.get_running_loop().call_later(source.wait_s, late),
        )
        order = FetchOrder(source.transfer_id, source.peer_address, *self._me)
        self._post(self._agent.fetch, order)
        return True

    def end(self, attempt: Attempt) -> None:
        """The attempt is over: it waits no more."""
        source = attempt.submit.prefix_source
        fetch = self._fetches.get(source.transfer_id) if source is not None else None
        # One that was refused for its transfer id must not end the fetch that has it.
        if fetch is not None and fetch.attempt is attempt:
            self._stop(fetch)

    def _prefix_of(self, attempt: Attempt, num_tokens: int) -> Sequence:
        request = attempt.submit.request
        return self._prefixes.prefix(request.token_ids[: num_tokens + 1], request.scope)

    # --- called by the agent, on the worker's loop ------------------------------------------------

    def transfer_starting(self, transfer_id: TransferId, num_tokens: int) -> None:
        """The peer has so many tokens: reserve blocks for them now, or go without."""
        fetch = self._fetches.get(transfer_id)
        if fetch is None or not fetch.is_waiting or fetch.prefix is not None:
            return
        if not 0 < num_tokens <= fetch.source.num_tokens:
            self._give_up(transfer_id, FetchOutcome.FAILED)
            return
        prefix = self._prefix_of(fetch.attempt, num_tokens)
        have_blocks = self._prefixes.reserve(prefix)
        if have_blocks is None:
            error = PoolExhausted("no free blocks for a prefix; it is computed instead")
            self._post(self._agent.refuse, transfer_id, error)
            self._give_up(transfer_id, FetchOutcome.NO_ROOM)
            return
        fetch.prefix = prefix
        fetch.pool_generation = self._kv.generation
        if have_blocks * self._layout.block_size_tokens >= num_tokens:
            self._give_up(transfer_id, FetchOutcome.HELD)  # meanwhile another request computed it
            return
        table = tuple(prefix.block_table)
        generations = tuple(self._pool.generation(b) for b in table)
        reservation = Reservation(table, generations, have_blocks, fetch.pool_generation)
        self._post(self._agent.reserved, transfer_id, reservation)

    def transfer_arrived(
        self, transfer_id: TransferId, first_tokens: dict[int, Logprob], arrival: Arrival
    ) -> None:
        """KV is complete and verified: it becomes cache, and the prompt finds it there."""
        fetch = self._fetches.get(transfer_id)
        if fetch is None or not fetch.is_waiting or fetch.prefix is None:
            return
        # The ranks started again: what was written is in memory that nobody reads.
        if fetch.pool_generation != self._kv.generation:
            self._give_up(transfer_id, FetchOutcome.FAILED)
            return
        num_here = len(fetch.prefix.parents) - 1
        num_tokens = fetch.prefix.num_tokens - 1 - num_here * self._layout.block_size_tokens
        self._prefixes.attach(fetch.prefix)
        self._post(self._agent.ack, transfer_id)
        took_s = self._clock.now_s() - fetch.began_at
        self._go_on(fetch, FetchReport(FetchOutcome.FETCHED, num_tokens, took_s))

    def transfer_finished(self, transfer_id: TransferId) -> None:
        """The peer takes this for a hand-over."""
        self._give_up(transfer_id, FetchOutcome.FAILED)

    def transfer_failed(self, transfer_id: TransferId, error: ServingError) -> None:
        """The fetch cannot succeed."""
        is_unknown = isinstance(error, TransferNotFound)
        self._give_up(transfer_id, FetchOutcome.NOT_HELD if is_unknown else FetchOutcome.FAILED)

    def transfer_closed(self, transfer_id: TransferId) -> None:
        """Nothing is written any more: what did not become cache is free again."""
        fetch = self._fetches.pop(transfer_id, None)
        if fetch is None:
            return
        if fetch.prefix is not None:
            self._prefixes.release(fetch.prefix)
        # Nothing ended it before: a bug, after which the prompt is computed like any other.
        if fetch.is_waiting:
            self._go_on(fetch, self._report_of(fetch, FetchOutcome.FAILED))
        self._attempts.wake()

    # --- ends -------------------------------------------------------------------------------------

    def _give_up(self, transfer_id: TransferId, outcome: FetchOutcome) -> None:
        """Compute the prefix instead."""
        fetch = self._fetches.get(transfer_id)
        if fetch is not None and fetch.is_waiting:
            self._post(self._agent.end_fetch, transfer_id)
            self._go_on(fetch, self._report_of(fetch, outcome))

    def _report_of(self, fetch: _Fetch, outcome: FetchOutcome) -> FetchReport:
        return FetchReport(outcome, 0, self._clock.now_s() - fetch.began_at)

    def _go_on(self, fetch: _Fetch, report: FetchReport) -> None:
        """Queue the prompt, whatever came of the fetch."""
        fetch.is_waiting = False
        fetch.late.cancel()
        fetch.attempt.fetch = report
        fail = functools.partial(self._attempts.end, fetch.attempt)
        with contained("the start of a prompt after a fetch", fail):
            self._attempts.queue(fetch.attempt)
        self._attempts.wake()

    def _stop(self, fetch: _Fetch) -> None:
        if fetch.is_waiting:
            fetch.is_waiting = False
            fetch.late.cancel()
            self._post(self._agent.end_fetch, fetch.source.transfer_id)
