"""Which sequences compute how many tokens in the next step, and what a step's result means.

Owns the course of a sequence from its entry to its end. Pure: plain Python over integers, `now_s`
is an argument. Does not know tensors, transfers or sessions, and leaves how a step is filled to
`StepPlanner`, who gets blocks to `BlockSupply`, where sequences stand to `Sequences`, and what a
result changes to `Results`.

    plan = scheduler.plan(now_s)
    events = scheduler.take_events()
    result = await runner.execute(plan, on_layer)
    events = scheduler.commit(plan, result, now_s)

Two numbers per sequence, `num_computed_tokens` and `num_tokens`, and one token budget per step
cover chunked prefill, prefix hits, mixed batches and decode alike. There is one order for
everything (`engine.scheduling.order`): a step first gives every running answer its token, then
shares what is left among prompts, and whoever has no block takes one from the youngest. Overtaking
is bounded both ways: the oldest prompt gets at least half of what is left, the others go shortest
first (`StepPlanner`); what does not fit lets smaller ones pass for a while, then blocks are kept
for it (`BlockSupply`). A lower tier yields within a step: its prompts get what higher ones leave of
the budget, and it gives up the blocks and places that they lack.

A parked sequence, one that is out of credit, takes no place in a step and yields its blocks first:
what waits may be the sibling whose progress the credit depends on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from math import inf

from core.block_hash import BlockNaming, naming_of
from core.errors import InvariantViolation
from core.ids import Epoch
from core.plan import StepPlan, StepResult
from core.scopes import tenant_of
from core.types import GenerateRequest, Logprob
from engine.scheduling.block_origins import BlockOrigins
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_supply import BlockSupply
from engine.scheduling.block_tables import BlockTables, Limits
from engine.scheduling.events import (
    Announced,
    BlocksReserved,
    HandoverEvents,
    SchedulerEvent,
)
from engine.scheduling.order import ArrivalOrder, Order
from engine.scheduling.prefix_blocks import PrefixBlocks
from engine.scheduling.results import Results
from engine.scheduling.sequence import UNLIMITED_CREDIT, Handover, Sequence, Status
from engine.scheduling.sequences import Sequences
from engine.scheduling.step_budget import StepBudget
from engine.scheduling.step_planner import StepPlanner


class Scheduler:
    """Queues and block tables of one engine."""

    def __init__(
        self,
        pool: BlockPool,
        limits: Limits,
        content_digest: str,
        hash_key: bytes = b"",
        order: Order | None = None,
        origins: BlockOrigins | None = None,
    ) -> None:
        """Start empty over a pool that nobody else uses.

        Args:
            pool: The engine's own.
            limits: Sizes.
            content_digest: `KVLayout.content_digest`.
            hash_key: The cluster's, as in `root_hash`.
            order: Who goes first; first come, first served unless given.
            origins: Notes what storage tiers below the pool have to know of its blocks.
        """
        self.pool = pool
        self.limits = limits
        self._events = HandoverEvents()
        self.budget = StepBudget(limits)
        self.tables = BlockTables(pool, limits, origins)
        self._sequences = Sequences(self.tables)
        self.running = self._sequences.running
        self.waiting = self._sequences.waiting
        self.holding = self._sequences.holding
        self.arriving = self._sequences.arriving
        self.blocks = BlockSupply(pool, self.tables, limits, self._sequences, self._events)
        self._planner = StepPlanner(limits, self.budget, self._sequences, self.blocks, self._events)
        self._content_digest = content_digest
        self._hash_key = hash_key
        self._order: Order = order or ArrivalOrder()
        self._keys = itertools.count(1)
        next_key = self._keys.__next__
        self._results = Results(pool, self.tables, self._sequences, next_key)
        self._step_id = 0
        self._arrived: dict[int, None] = {}
        """Blocks that were not computed here and came since the last step, in order."""
        self.prefixes = PrefixBlocks(
            pool,
            self.tables,
            self._sequences,
            self._naming,
            limits.block_size_tokens,
            self.note_arrived,
        )

    def take_events(self) -> list[SchedulerEvent]:
        """Return what became of hand-overs in `submit`, `partnered`, `reserve_in_turn` and `plan`.

        To be taken after each of them, before anything else is asked of the scheduler.
        """
        return self._events.take()

    @property
    def num_preemptions(self) -> int:
        """How often a sequence lost its blocks to another."""
        return self.blocks.num_preemptions

    # --- entering ---------------------------------------------------------------------------------

    def new_sequence(
        self,
        request: GenerateRequest,
        epoch: Epoch,
        choices: tuple[int, ...],
        emitted: Iterable[int],
        now_s: float,
        *,
        age_s: float = 0.0,
        credit: int = UNLIMITED_CREDIT,
        handover: Handover | None = None,
    ) -> Sequence:
        """Make a sequence that knows the prompt and the tokens emitted so far; it waits nowhere.

        Args:
            request: What to compute.
            epoch: Of the attempt it belongs to.
            choices: Choices that it stands for.
            emitted: Output tokens known already.
            now_s: Current instant.
            age_s: How long ago the request reached its router. It stands in line accordingly,
                so that a request tried again keeps its turn.
            credit: Positions that may be computed.
            handover: For a prompt whose KV a decode worker will fetch.

        Raises:
            PromptTooLong: It could not fit the context window or the pool even alone.
        """
        self.tables.check_fits(request)
        # Never used twice: ranks and transfers know a sequence by it.
        key = next(self._keys)
        return Sequence(
            key=key,
            request=request,
            epoch=epoch,
            choices=choices,
            token_ids=[*request.token_ids, *emitted],
            naming=self._naming(request),
            block_size_tokens=self.limits.block_size_tokens,
            credit=credit,
            arrived_at=now_s,
            due=(self._order.due_at(request, now_s - age_s), key, inf),
            delay_s=self._order.delay_of(request),
            tenant=tenant_of(request.scope),
            weight=self._order.weight_of(request),
            handover=handover,
        )

    def _naming(self, request: GenerateRequest) -> BlockNaming:
        size = self.limits.block_size_tokens
        return naming_of(self._content_digest, request.scope, size, self._hash_key)

    def submit(self, sequence: Sequence) -> None:
        """Queue a new sequence; it starts when blocks (and its partner, if it has one) are there.

        Raises:
            InvariantViolation: It is not new.
        """
        self._enter(sequence, Status.WAITING)
        self._announce_in_turn()

    def submit_arrival(self, sequence: Sequence) -> None:
        """Queue a new sequence whose KV another worker sends: it wants blocks, and no step.

        `BlocksReserved` reports that it has all it needs, after `reserve_in_turn` or a plan.

        Raises:
            InvariantViolation: It is not new.
        """
        self._enter(sequence, Status.RESERVING)

    def _enter(self, sequence: Sequence, status: Status) -> None:
        if sequence.status is not Status.NEW:
            raise InvariantViolation(
                f"sequence {sequence.key} is {sequence.status.name.lower()} and enters once more"
            )
        sequence.status = status
        # Now, and not when it was made: arrivals are made long before they enter.
        self._sequences.turns.enter(sequence)
        self.waiting.add(sequence)

    def partnered(self, sequence: Sequence, first_block: int) -> None:
        """The decode worker has reserved blocks, and has those before `first_block` already."""
        if sequence.handover is None:
            raise InvariantViolation(f"sequence {sequence.key} has no hand-over to be partnered in")
        is_waiting = sequence.status is Status.WAITING
        # Out and in again: where it stands in the line depends on what changes here.
        if is_waiting:
            self.waiting.remove(sequence)
        sequence.handover.is_partnered = True
        sequence.handover.first_block = first_block
        if is_waiting:
            self.waiting.add(sequence)
        self._announce_in_turn()

    def _announce_in_turn(self) -> None:
        """Announce hand-overs that are near to their partners, also during a step."""
        while (sequence := self.waiting.next_to_announce()) is not None:
            self.waiting.announced(sequence)
            self._events.add(Announced(sequence))

    def credit(self, sequence: Sequence, limit: int) -> None:
        """Positions below `limit` may be computed; a lower limit than before changes nothing."""
        is_waiting = sequence.status is Status.WAITING
        # As above: credit decides where it stands.
        if is_waiting:
            self.waiting.remove(sequence)
        sequence.num_parkings += sequence.is_out_of_credit
        sequence.credit = max(sequence.credit, limit)
        if is_waiting:
            self.waiting.add(sequence)

    # --- arriving (decode side of a hand-over) ----------------------------------------------------

    def reserve_in_turn(self, now_s: float) -> None:
        """Give blocks to arrivals whose turn it is: all that each needs, or nothing.

        Blocks whose content is already here are pinned, not taken anew.
        """
        self._reserve_fitting(now_s, lends=False)

    def _reserve_fitting(self, now_s: float, *, lends: bool) -> None:
        if not self.waiting.num_reservations or self._sequences.copies_from_free:
            return  # the plan after the step comes back to them
        for sequence in self.blocks.fitting(Status.RESERVING, lends=lends):
            self._reserve(sequence, now_s)

    def _reserve(self, sequence: Sequence, now_s: float) -> None:
        hits = self.blocks.take(sequence)
        if hits is None:
            return
        self.waiting.remove(sequence)
        sequence.status = Status.ARRIVING
        sequence.num_prefix_hit_tokens = len(hits) * self.limits.block_size_tokens
        sequence.hash_blocks()  # now, while the KV is on its way, and not when it is there
        sequence.started_at = now_s
        self.arriving[sequence.key] = sequence
        self._events.add(BlocksReserved(sequence, len(hits)))

    def attach(
        self, sequence: Sequence, first_tokens: dict[int, Logprob], now_s: float
    ) -> list[SchedulerEvent]:
        """Let an arrived sequence decode: its prompt KV is complete and verified.

        Args:
            sequence: Arriving; afterwards finished, its choices run as sequences of their own.
            first_tokens: The first token of every choice, drawn on the prefill worker.
            now_s: Current instant.

        Returns:
            One `Sampled` per choice, so that decode re-announces the first tokens.
        """
        del self.arriving[sequence.key]
        sequence.num_computed_tokens = sequence.num_tokens
        sequence.prompt_done_at = now_s
        self.tables.register(sequence)
        num_here = sequence.num_prefix_hit_tokens // self.limits.block_size_tokens
        self.note_arrived(sequence.block_table[num_here:])
        return self._results.fork(sequence, first_tokens)

    @property
    def may_grant_blocks(self) -> bool:
        """False while a step runs that still reads from a free block."""
        return not self._sequences.copies_from_free

    def note_arrived(self, block_ids: Iterable[int]) -> None:
        """Note blocks that were not computed here: a device copies them in before its next step.

        They came from another worker, by a hand-over or a fetch, or from a storage tier.
        """
        self._arrived.update(dict.fromkeys(block_ids))

    # --- leaving ----------------------------------------------------------------------------------

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence. While a step runs, its blocks are freed at the commit. Idempotent."""
        self._sequences.cancel(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running or holding sequence's blocks; it waits where it is due and recomputes."""
        self.blocks.preempt(sequence)

    def fail_all(self) -> list[Sequence]:
        """The rank group died: every sequence is gone and the cache with it.

        Returns:
            The sequences that were in the engine.
        """
        lost = list(self._sequences)
        # There is no step any more, so that what is cancelled is freed at once.
        self._sequences.step_ended()
        for sequence in lost:
            self.cancel(sequence)
        self._sequences.ranks_are_gone()
        self._arrived.clear()
        # The memory is gone, and with it what every block was registered as.
        self.pool.drop_cache()
        return lost

    # --- plan -------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """True if a plan might compute something."""
        return bool(self.running) or bool(self.waiting)

    @property
    def active(self) -> list[Sequence]:
        """Running sequences that take a place in a step; parked ones do not."""
        return self._sequences.active

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens not yet computed of waiting and running sequences."""
        return sum(s.num_missing_tokens for s in (*self.waiting, *self.running))

    def plan(self, now_s: float) -> StepPlan:
        """Choose the next step. May preempt, announce, reserve, and come back empty."""
        self._step_id += 1
        while True:
            num_preemptions = self.num_preemptions
            self.blocks.give_way()
            self.reserve_in_turn(now_s)
            self._announce_in_turn()
            step = self._planner.fill(now_s)
            if step.items or self.num_preemptions == num_preemptions:
                break
            # Somebody gave up its blocks and nobody used them: look again, or they lie idle until
            # something wakes the worker.
        if not step.items:
            return StepPlan(self._step_id, ())
        copies_from_free = any(self.pool.references(source) == 0 for source, _ in step.copies)
        released = self._sequences.step_begins(step.planned, copies_from_free=copies_from_free)
        # Once more: what the step did not need may be enough for an arrival.
        self._reserve_fitting(now_s, lends=True)
        arrived, self._arrived = self._arrived, {}
        return StepPlan(
            self._step_id,
            tuple(step.items),
            tuple(step.copies),
            report_layers=step.has_handover,
            arrived=tuple(arrived),
            released=released,
        )

    # --- commit -----------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult, now_s: float) -> list[SchedulerEvent]:
        """Apply a step's result: append tokens, finish, fork, free what was cancelled meanwhile.

        Raises:
            InvariantViolation: The result is not this plan's.
        """
        if result.step_id != plan.step_id:
            raise InvariantViolation(
                f"result of step {result.step_id} came for step {plan.step_id}"
            )
        self._sequences.step_ended()
        return self._results.apply(plan, result, now_s)
