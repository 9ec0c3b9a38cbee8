"""Which sequences compute how many tokens in the next step, and what a step's result means.

Owns the waiting and running queues, block tables, chunking, prefix hits, copy-on-write forks and
preemption by recompute. Pure: plain Python over integers, `now_s` is an argument. Does not know
tensors, transfers or sessions. Called by `worker.step_loop`, from the event loop only.

    plan = scheduler.plan(now_s); result = await runner.execute(plan, on_layer); scheduler.commit(plan, result)

Two numbers per sequence, `num_computed_tokens` and `num_tokens`, and one token budget per step
cover chunked prefill, prefix hits, mixed batches and decode alike. A step runs the oldest
sequences first; what is left of the budget admits new ones. A waiting sequence waits for one of
three things: blocks (woken by any free), its partner (woken by `partnered`) or credit. A parked
sequence, one that is out of credit, takes no place in a step and yields its blocks first: what waits
may be the sibling whose progress the credit depends on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from core.block_hash import BlockHash, root_hash
from core.errors import InvariantViolation, PoolExhausted
from core.ids import Epoch
from core.plan import SampleSpec, StepItem, StepPlan, StepResult
from core.types import GenerateRequest, Logprob
from engine.block_pool import BlockPool
from engine.block_tables import BlockTables, Limits
from engine.events import PromptComputed, Sampled, SchedulerEvent, SequenceFailed
from engine.sequence import Handover, Sequence, Status
from engine.step_budget import StepBudget

MAX_ANNOUNCED = 8
"""Prefill sequences whose partners may be reserving at the same time."""


class Scheduler:
    """Queues and block tables of one engine."""

    def __init__(
        self, pool: BlockPool, limits: Limits, content_digest: str, hash_key: bytes = b""
    ) -> None:
        """Start empty over a pool that nobody else uses; `hash_key` as in `root_hash`."""
        self.pool = pool
        self.limits = limits
        self.tables = BlockTables(pool, limits)
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.holding: dict[int, Sequence] = {}
        self.arriving: dict[int, Sequence] = {}
        self.num_preemptions = 0
        self.announce: Callable[[Sequence], None] = lambda sequence: None
        self.started: Callable[[Sequence], None] = lambda sequence: None
        self.preempted: Callable[[Sequence], None] = lambda sequence: None
        self.budget = StepBudget(limits)
        self._content_digest = content_digest
        self._hash_key = hash_key
        self._next_key = 0
        self._step_id = 0
        self._executing: frozenset[int] = frozenset()
        self._cancelled_in_step: list[Sequence] = []
        self._arrived: dict[int, None] = {}

    # --- entering ---------------------------------------------------------------------------------

    def new_sequence(
        self,
        request: GenerateRequest,
        epoch: Epoch,
        choices: tuple[int, ...],
        emitted: Iterable[int],
        now_s: float,
        *,
        credit: int = 2**31,
        handover: Handover | None = None,
    ) -> Sequence:
        """Make a sequence that knows the prompt and the tokens emitted so far; nothing is queued yet.

        Raises:
            PromptTooLong: It could not fit the context window or the pool even alone.
        """
        self.tables.check_fits(request)
        self._next_key += 1
        return Sequence(
            key=self._next_key,
            request=request,
            epoch=epoch,
            choices=choices,
            token_ids=[*request.token_ids, *emitted],
            root_hash=self._root(request),
            block_size_tokens=self.limits.block_size_tokens,
            credit=credit,
            arrived_at=now_s,
            handover=handover,
        )

    def _root(self, request: GenerateRequest) -> BlockHash:
        return root_hash(self._content_digest, request.scope, self._hash_key)

    def submit(self, sequence: Sequence, replaces: Sequence | None = None) -> None:
        """Queue a sequence; it starts when blocks (and its partner, if it has one) are there.

        Args:
            sequence: New, not queued yet.
            replaces: An older attempt at the same request, whose queue position is kept.
        """
        sequence.status = Status.WAITING
        if replaces is not None and replaces in self.waiting:
            self.waiting.insert(self.waiting.index(replaces), sequence)
        else:
            self.waiting.append(sequence)

    def partnered(self, sequence: Sequence, first_block: int) -> None:
        """The decode worker has reserved blocks and has the first `first_block` of them already."""
        if sequence.handover is None:
            raise InvariantViolation(f"sequence {sequence.key} has no hand-over to be partnered in")
        sequence.handover.is_partnered = True
        sequence.handover.first_block = first_block

    # --- arriving (decode side of a hand-over) ------------------------------------------------------

    def reserve(self, sequence: Sequence, now_s: float) -> int:
        """Take every block an arriving sequence needs, all or nothing, pinning what is cached here.

        Returns:
            Number of leading blocks whose content is already here.

        Raises:
            PoolExhausted: Not enough blocks; nothing was changed.
        """
        hits = self.tables.find_prefix(sequence)
        num_new = self.tables.blocks_for(sequence.num_tokens) - len(hits)
        self.tables.allocate(sequence, hits, num_new, num_spare=len(sequence.choices))
        sequence.num_prefix_hit_tokens = len(hits) * self.limits.block_size_tokens
        sequence.name_blocks()  # now, while the KV is on its way, and not when it is there
        sequence.status = Status.ARRIVING
        sequence.started_at = now_s
        self.arriving[sequence.key] = sequence
        return len(hits)

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
        self._arrived.update(dict.fromkeys(sequence.block_table[num_here:]))
        return self._accept_first_tokens(sequence, first_tokens)

    # --- leaving ----------------------------------------------------------------------------------

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence. Blocks in an executing plan are freed at its commit. Idempotent."""
        if sequence.is_finished:
            return
        if sequence.key in self._executing:
            self._cancelled_in_step.append(sequence)
            if sequence in self.running:
                self.running.remove(sequence)
            sequence.status = Status.FINISHED
            return
        self._remove(sequence)
        self.tables.free(sequence)
        sequence.status = Status.FINISHED

    def fail_all(self) -> list[Sequence]:
        """The rank group died: every sequence is gone and the cache with it.

        Returns:
            The sequences that were in the engine.
        """
        lost = [*self.running, *self.waiting, *self.holding.values(), *self.arriving.values()]
        self._executing = frozenset()
        for sequence in lost:
            self.cancel(sequence)
        for sequence in self._cancelled_in_step:
            self.tables.free(sequence)
        self._cancelled_in_step.clear()
        self._arrived.clear()
        self.pool.drop_cache()
        return lost

    def _remove(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
        elif sequence.status is Status.HOLDING:
            del self.holding[sequence.key]
        elif sequence.status is Status.ARRIVING:
            del self.arriving[sequence.key]

    # --- plan -------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """True if a plan might compute something."""
        return bool(self.running or self.waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens not yet computed of waiting and running sequences."""
        return sum(s.num_tokens - s.num_computed_tokens for s in (*self.waiting, *self.running))

    def plan(self, now_s: float) -> StepPlan:
        """Choose the next step. May preempt, announce waiting hand-overs, and come back empty."""
        before = self.num_preemptions
        plan = self._plan(now_s)
        # One that runs alone and gave up its blocks leaves the step to the others, which were not looked at.
        return plan if plan.items or self.num_preemptions == before else self._plan(now_s)

    def _plan(self, now_s: float) -> StepPlan:
        self._step_id += 1
        items: list[StepItem] = []
        copies: list[tuple[int, int]] = []
        planned: set[int] = set()
        budget = self.budget.num_tokens
        for sequence in self._runnable():
            if budget == 0:
                break
            if sequence.status is not Status.RUNNING or sequence.is_out_of_credit:
                continue
            num_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            if not self._make_writable(sequence, num_tokens, copies, planned):
                continue
            items.append(self._item(sequence, num_tokens))
            planned.add(sequence.key)
            budget -= num_tokens
        budget = self._admit(now_s, budget, items, planned)
        self._executing = frozenset(planned)
        by_key = {s.key: s for s in self.running}
        report = any(by_key[item.sequence_key].handover is not None for item in items)
        arrived: dict[int, None] = {}
        if items:
            arrived, self._arrived = self._arrived, arrived
        return StepPlan(
            self._step_id, tuple(items), tuple(copies), report_layers=report, arrived=tuple(arrived)
        )

    def _runnable(self) -> list[Sequence]:
        alone = [s for s in self.running if s.run_alone and not s.is_out_of_credit]
        return alone[:1] if alone else list(self.running)

    def _admit(self, now_s: float, budget: int, items: list[StepItem], planned: set[int]) -> int:
        announced = sum(
            1
            for s in self.waiting
            if s.handover and s.handover.is_announced and not s.handover.is_partnered
        )
        skipped: list[Sequence] = []
        while self.waiting and budget > 0:
            active = [s for s in self.running if not s.is_out_of_credit]
            if len(active) >= self.limits.max_sequences or any(s.run_alone for s in active):
                break
            sequence = self.waiting.popleft()
            if sequence.is_out_of_credit:
                skipped.append(sequence)
                continue
            if sequence.run_alone and active:
                skipped.append(sequence)
                break
            handover = sequence.handover
            if handover is not None and not handover.is_announced and announced < MAX_ANNOUNCED:
                handover.is_announced = True
                announced += 1
                self.announce(sequence)
            if (
                handover is not None
                and not handover.is_partnered
                and not self._may_run_ahead(sequence, handover)
            ):
                skipped.append(sequence)
                continue
            if not self._start(sequence, now_s, planned):
                skipped.append(sequence)
                break
            num_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            items.append(self._item(sequence, num_tokens))
            planned.add(sequence.key)
            budget -= num_tokens
        self.waiting.extendleft(reversed(skipped))
        return budget

    def _may_run_ahead(self, sequence: Sequence, handover: Handover) -> bool:
        """Above the watermark an announced prefill may start before its partner has answered (rule 1).

        One that nobody was told of must wait: it would be computed and then held for a partner that never comes.
        """
        if not handover.is_announced:
            return False
        left = self.pool.num_available - self.tables.blocks_for(sequence.num_tokens)
        return left >= self.pool.num_blocks // 2

    def _start(self, sequence: Sequence, now_s: float, planned: set[int]) -> bool:
        hits = self.tables.find_prefix(sequence)
        num_new = self.tables.blocks_for(sequence.num_tokens) - len(hits)
        try:
            self.tables.allocate(sequence, hits, num_new, num_spare=0)
        except PoolExhausted:
            num_cached_hits = sum(
                self.pool.references(block_id) == 0 for block_id in hits
            )  # available, but spoken for
            if not self._make_room(num_new + num_cached_hits, planned):
                return False
            return self._start(sequence, now_s, planned)
        sequence.num_computed_tokens = len(hits) * self.limits.block_size_tokens
        sequence.num_prefix_hit_tokens = max(
            sequence.num_prefix_hit_tokens, sequence.num_computed_tokens
        )
        sequence.status = Status.RUNNING
        if sequence.started_at is None:
            sequence.started_at = now_s
        self.running.append(sequence)
        self.started(sequence)
        return True

    def _item(self, sequence: Sequence, num_tokens: int) -> StepItem:
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens
        samples: tuple[SampleSpec, ...] = ()
        has_tokens = sequence.handover is not None and bool(sequence.handover.first_tokens)
        if end == sequence.num_tokens and not has_tokens:
            samples = sequence.sample_specs()
        return StepItem(
            sequence_key=sequence.key,
            start=start,
            token_ids=tuple(sequence.token_ids[start:end]),
            block_table=tuple(sequence.block_table[: self.tables.blocks_for(end)]),
            samples=samples,
            scope=sequence.request.scope,
            targets=sequence.targets(start, end),
            num_target_logprobs=sequence.request.sampling.prompt_logprobs or 0,
        )

    # --- blocks -----------------------------------------------------------------------------------

    def _make_writable(
        self, sequence: Sequence, num_tokens: int, copies: list[tuple[int, int]], planned: set[int]
    ) -> bool:
        """Give a running sequence private blocks for its next tokens, preempting others if need be.

        Returns:
            False if the sequence itself was preempted or must wait for a block.
        """
        size = self.limits.block_size_tokens
        first, last = (
            sequence.num_computed_tokens // size,
            (sequence.num_computed_tokens + num_tokens - 1) // size,
        )
        for index in range(first, last + 1):
            is_new = index >= len(sequence.block_table)
            if not is_new and self.pool.references(sequence.block_table[index]) == 1:
                continue
            block_id = self._one_block(sequence, planned)
            if block_id is None:
                return False
            if is_new:
                sequence.block_table.append(block_id)
            else:  # copy on write: a fork's partial block is shared until someone appends to it
                shared = sequence.block_table[index]
                copies.append((shared, block_id))
                self.pool.free([shared])
                sequence.block_table[index] = block_id
        return True

    def _one_block(self, sequence: Sequence, planned: set[int]) -> int | None:
        if sequence.spare_blocks:
            return sequence.spare_blocks.pop()
        while self.pool.num_available == 0 and not self._make_room(1, planned):
            victim = next((s for s in reversed(self.running) if s.key not in planned), None)
            if victim is None or victim is sequence:
                # Alone it always fits (check_fits), so others hold the rest and will give it back.
                if len(self.running) > 1 or self.holding or self.arriving:
                    self.preempt(sequence)
                return None
            self.preempt(victim)
        return self.pool.allocate(1)[0]

    def _make_room(self, num_blocks: int, planned: set[int]) -> bool:
        """Take back computed KV that nobody has asked for yet, and that of parked sequences; True if it may have helped."""
        before = self.pool.num_available
        for sequence in list(self.holding.values()):
            if self.pool.num_available >= num_blocks:
                break
            if sequence.handover is not None and not sequence.handover.is_partnered:
                self.preempt(sequence)
        for sequence in [s for s in self.running if s.is_out_of_credit and s.key not in planned]:
            if self.pool.num_available >= num_blocks:
                break
            self.preempt(sequence)
        return self.pool.num_available > before

    def preempt(self, sequence: Sequence) -> None:
        """Free a sequence's blocks and queue it at the head; its tokens are recomputed later.

        `preempted` is called first: whoever may still read the blocks pins them there.
        """
        self.preempted(sequence)
        self.num_preemptions += 1
        if sequence.status is Status.HOLDING:
            del self.holding[sequence.key]
        else:
            self.running.remove(sequence)
        self.tables.free(sequence)
        sequence.num_computed_tokens = 0
        if sequence.needs_prompt_scores:
            sequence.prompt_logprobs.clear()
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)

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
        self._executing = frozenset()
        for sequence in self._cancelled_in_step:
            self.tables.free(sequence)
        self._cancelled_in_step.clear()
        events: list[SchedulerEvent] = []
        by_key = {s.key: s for s in self.running}
        for item in plan.items:
            if item.sequence_key not in by_key:
                continue
            sequence = by_key[item.sequence_key]
            if item.sequence_key in result.failed:
                self.cancel(sequence)
                events.append(SequenceFailed(sequence, result.failed[item.sequence_key]))
                continue
            sequence.num_computed_tokens = item.start + len(item.token_ids)
            sequence.prompt_logprobs += result.scored.get(item.sequence_key, ())
            self.tables.register(sequence)
            if sequence.num_computed_tokens == sequence.num_tokens:
                events += self._prompt_or_token_done(sequence, item, result, now_s)
        return events

    def _prompt_or_token_done(
        self, sequence: Sequence, item: StepItem, result: StepResult, now_s: float
    ) -> list[SchedulerEvent]:
        tokens = {
            spec.choice: result.tokens[item.sequence_key, spec.choice] for spec in item.samples
        }
        if sequence.prompt_done_at is None:
            sequence.prompt_done_at = now_s
        if sequence.handover is not None:
            sequence.handover.first_tokens = sequence.handover.first_tokens or tokens
            self.running.remove(sequence)
            sequence.status = Status.HOLDING
            self.holding[sequence.key] = sequence
            sampled = [self._sampled(sequence, choice, token) for choice, token in tokens.items()]
            return [*sampled, PromptComputed(sequence)]
        if len(sequence.choices) > 1:
            self.running.remove(sequence)
            return self._accept_first_tokens(sequence, tokens)
        return [self._append(sequence, tokens[sequence.choices[0]])]

    def _sampled(self, sequence: Sequence, choice: int, token: Logprob) -> Sampled:
        position = sequence.num_output_tokens
        finish = sequence.finish_after(token.token_id, position + 1)
        reason, stop_token_id = finish if finish is not None else (None, None)
        return Sampled(sequence, choice, position, token, reason, stop_token_id)

    def _append(self, sequence: Sequence, token: Logprob) -> Sampled:
        sampled = self._sampled(sequence, sequence.choices[0], token)
        sequence.token_ids.append(token.token_id)
        if sampled.finish is not None:
            self.cancel(sequence)
        return sampled

    def _accept_first_tokens(
        self, sequence: Sequence, tokens: dict[int, Logprob]
    ) -> list[SchedulerEvent]:
        """Fork a computed prompt into one running sequence per choice, sharing all its blocks."""
        events: list[SchedulerEvent] = []
        for choice in sequence.choices:
            self._next_key += 1
            fork = sequence.fork(self._next_key, choice)
            for block_id in fork.block_table:
                self.pool.share(block_id)
            if sequence.spare_blocks:
                fork.spare_blocks.append(sequence.spare_blocks.pop())
            self.running.append(fork)
            events.append(self._append(fork, tokens[choice]))
        self.tables.free(sequence)
        sequence.status = Status.FINISHED
        return events
