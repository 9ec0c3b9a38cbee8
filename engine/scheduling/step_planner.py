"""How the budget of a step is shared among sequences.

Owns the order in which they get tokens: every running answer one, then prompts, the oldest first
and with at most half of what is left for a giant. Does not know what a result means, and leaves who
gets blocks to `BlockSupply`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from core.plan import SampleSpec, StepItem
from engine.scheduling.block_supply import LOOK_AHEAD, MAX_OVERTAKEN, BlockSupply
from engine.scheduling.block_tables import Limits
from engine.scheduling.events import HandoverEvents, Started
from engine.scheduling.sequence import Place, Sequence, Status
from engine.scheduling.sequences import Sequences
from engine.scheduling.step_budget import StepBudget


@dataclass(slots=True)
class Step:
    """A plan in the making."""

    now_s: float
    num_left: int
    """Tokens of the budget that nobody has yet."""
    items: list[StepItem] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    planned: set[int] = field(default_factory=set)
    has_handover: bool = False


def _turn(sequence: Sequence) -> tuple[bool, Place]:
    """What is computed for a partner that may never answer comes after everything else."""
    return sequence.is_ahead, sequence.due


def _shortest_first(sequence: Sequence) -> tuple[bool, int]:
    """Unless somebody was overtaken as often as may be: that one is next."""
    return sequence.num_overtaken < MAX_OVERTAKEN, sequence.num_missing_tokens


def _count_passed(step: Step, prompts: list[Sequence]) -> None:
    """Prompts under way that got nothing were overtaken too; who waits is counted by `take`."""
    for older in prompts:
        if older.status is Status.RUNNING and older.key not in step.planned:
            younger = (s.key for s in prompts if s.due > older.due)
            older.num_overtaken += sum(key in step.planned for key in younger)


class StepPlanner:
    """Fills steps of one engine."""

    def __init__(
        self,
        limits: Limits,
        budget: StepBudget,
        sequences: Sequences,
        blocks: BlockSupply,
        events: HandoverEvents,
    ) -> None:
        self._limits = limits
        self._budget = budget
        self._sequences = sequences
        self._blocks = blocks
        self._events = events

    def fill(self, now_s: float) -> Step:
        """Choose what the next step computes. May preempt, and may find nothing."""
        step = Step(now_s, self._budget.num_tokens)
        active = self._sequences.active
        # A suspect runs by itself: if the ranks die again, it was this one.
        alone = next((s for s in active if s.run_alone), None)
        if alone is not None:
            active = [alone]
        # Decodes before prompts: somebody waits for each of these tokens (arXiv:2403.02310).
        for sequence in active:
            if sequence.status is Status.RUNNING and sequence.num_missing_tokens == 1:
                self._add(step, sequence, 1)
        # Those who gave their blocks to an older one just now wait in the line.
        active = [s for s in active if s.status is Status.RUNNING]
        prompts = sorted((s for s in active if s.num_missing_tokens > 1), key=_turn)
        starting = self._blocks.fitting(Status.WAITING) if alone is None else ()
        # Lazily: a walk of the line takes blocks back for whom it comes to, and no further.
        in_turn = heapq.merge(prompts, starting, key=_turn)
        for _, group in itertools.groupby(in_turn, key=lambda s: s.is_ahead):
            self._plan_prompts(step, group)
            if not step.num_left:
                break
        return step

    def _plan_prompts(self, step: Step, prompts: Iterator[Sequence]) -> None:
        """Share what is left of the budget among prompts, the oldest first.

        One that would take more than half of what is left gets half of it; the other half goes to
        those behind, shortest first unless one was passed often enough, and what they do not need
        comes back. So a giant takes at most twice as long as alone, and whoever is behind it does
        not wait for its end, unless he is of a lower tier and has not waited his delay: he gets
        what the others leave.
        """
        giant: Sequence | None = None
        num_kept = 0
        while step.num_left and giant is None and (sequence := next(prompts, None)) is not None:
            if sequence.status is Status.WAITING and not self._start(sequence, step.now_s):
                continue
            num_half = -(-step.num_left // 2)
            if sequence.num_missing_tokens > num_half:
                giant = sequence
                num_kept = num_half
            else:
                self._add(step, sequence, sequence.num_missing_tokens)
        if giant is None:
            return
        # Put aside before the others choose: the giant has its half.
        step.num_left -= num_kept
        behind = list(itertools.islice(prompts, LOOK_AHEAD)) if step.num_left else []
        level = [s for s in behind if s.delay_s <= giant.delay_s or s.due[0] <= step.now_s]
        for sequence in sorted(level, key=_shortest_first):
            self._add(step, sequence, step.num_left)
        step.num_left += num_kept
        self._add(step, giant, step.num_left)
        self._plan_prompts(step, (s for s in behind if s not in level))
        _count_passed(step, behind)

    def _add(self, step: Step, sequence: Sequence, most: int) -> None:
        """Let a sequence compute up to `most` tokens, if it can start and finds blocks for them."""
        if not most or not step.num_left:
            return
        if sequence.status is Status.WAITING and not self._start(sequence, step.now_s):
            return
        if sequence.status is not Status.RUNNING:
            return  # it gave its blocks to an older one meanwhile
        num_tokens = min(sequence.num_missing_tokens, most, step.num_left)
        if not self._blocks.make_writable(sequence, num_tokens, step.copies, step.planned):
            return
        step.items.append(self._item(sequence, num_tokens))
        step.planned.add(sequence.key)
        # It has had its turn.
        sequence.num_overtaken = 0
        step.num_left -= num_tokens
        step.has_handover = step.has_handover or sequence.handover is not None

    def _start(self, sequence: Sequence, now_s: float) -> bool:
        """Let a waiting sequence run, if there is a place and its blocks are there."""
        if not self._blocks.has_place(sequence):
            return False
        hits = self._blocks.take(sequence)
        if hits is None:
            return False
        self._sequences.waiting.remove(sequence)
        if sequence.handover is not None:
            sequence.handover.ran_ahead = sequence.is_ahead
        sequence.num_computed_tokens = len(hits) * self._limits.block_size_tokens
        sequence.num_prefix_hit_tokens = max(
            sequence.num_prefix_hit_tokens, sequence.num_computed_tokens
        )
        sequence.status = Status.RUNNING
        # The first start ends its wait in the queue; after a preemption it starts once more.
        if sequence.started_at is None:
            sequence.started_at = now_s
        self._sequences.running.add(sequence)
        if sequence.handover is not None:
            self._events.add(Started(sequence))
        return True

    def _item(self, sequence: Sequence, num_tokens: int) -> StepItem:
        start = sequence.num_computed_tokens
        end = start + num_tokens
        samples: tuple[SampleSpec, ...] = ()
        is_drawn = sequence.handover is not None and bool(sequence.handover.first_tokens)
        # Only behind the last token that is known is there something to draw.
        if end == sequence.num_tokens and not is_drawn:
            samples = sequence.sample_specs()
        return StepItem(
            sequence_key=sequence.key,
            start=start,
            token_ids=tuple(sequence.token_ids[start:end]),
            block_table=sequence.block_table,
            samples=samples,
            scope=sequence.request.scope,
            targets=sequence.targets(start, end),
            num_target_logprobs=sequence.request.sampling.prompt_logprobs or 0,
        )
