"""Who gets blocks, in which order, and from whom they are taken back.

Owns the walk down the waiting line with its bounded overtaking, blocks to write to for running
sequences, copy on write, and preemption by recompute. Does not know budgets or the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from core.errors import PoolExhausted
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_tables import BlockTables, Limits
from engine.scheduling.events import HandoverEvents, Preempted
from engine.scheduling.sequence import Sequence, Status
from engine.scheduling.sequences import Sequences
from engine.scheduling.yielding import may_yield, victims

MAX_OVERTAKEN = 16
"""Sequences that may take blocks before an older one that they are too few for."""
LOOK_AHEAD = 32
"""How many waiting sequences a walk passes over before it gives up finding one that fits."""


def _is_waiting(sequence: Sequence) -> bool:
    """True unless it was started, reserved for or cancelled while the walk went on."""
    return sequence.status in (Status.WAITING, Status.RESERVING)


def _num_held(sequence: Sequence) -> int:
    """Blocks of its own or shared; the latter do not come free with it."""
    return len(sequence.block_table) + len(sequence.spare_blocks)


def _needs_every_place(sequence: Sequence) -> bool:
    """True for a prompt that must run alone; an arrival takes one place like any other."""
    return sequence.run_alone and sequence.status is Status.WAITING


@dataclass(slots=True)
class _Walk:
    """What a walk down the waiting line has found so far."""

    num_yielding: int
    """Blocks that may still be taken back for somebody."""
    num_places_taken: int
    num_places_kept: int = 0
    num_blocks_kept: int = 0
    """Like the places, for those in front, out of the reach of those behind."""
    num_left_waiting: int = 0
    """Of those that might have started."""
    has_met_lone_one: bool = False
    """One that must run alone waits in front: no prompt behind it may start."""
    passed: list[Sequence] = field(default_factory=list)
    """Those that were left waiting and let others pass."""


class BlockSupply:
    """Blocks of one pool for the sequences of one engine."""

    def __init__(
        self,
        pool: BlockPool,
        tables: BlockTables,
        limits: Limits,
        sequences: Sequences,
        events: HandoverEvents,
    ) -> None:
        self.num_preemptions = 0
        self._pool = pool
        self._tables = tables
        self._limits = limits
        self._sequences = sequences
        self._events = events
        self._passed: list[Sequence] = []
        """By the walk under way: overtaken by whoever takes blocks and came later."""

    # --- the waiting line ---------------------------------------------------------------------

    def fitting(
        self, status: Status, *, lends: bool = False, takes_back: bool = True
    ) -> Iterator[Sequence]:
        """Walk the line, the first first, and yield those whose blocks and place are there.

        The caller may start or reserve for each before the walk goes on. One that finds too few
        blocks, no place, or is left waiting, lets those behind it pass, until it was overtaken
        MAX_OVERTAKEN times; from then on what it needs is kept for it. What one of the other status
        needs is kept at once if it would fit: its turn comes with the next walk. An arrival has its
        place from its reservation on.

        Args:
            status: Whom to yield: those that would run, or arrivals.
            lends: Keep nothing at once: a step begins, and had no budget for those who wait still.
            takes_back: Take blocks from those that have to yield them. False: only look.
        """
        num_yielding = self._num_yielding() if takes_back else 0
        walk = _Walk(num_yielding, self._sequences.num_places_taken)
        if takes_back:
            self._passed = walk.passed
        for sequence in self._sequences.waiting.in_order():
            if walk.num_left_waiting >= LOOK_AHEAD:
                return
            if not (_is_waiting(sequence) and self._may_start(sequence)):
                continue
            num_needed, fits = self._find_room(sequence, walk)
            is_asked_for = sequence.status is status
            if fits and is_asked_for:
                yield sequence
            if not _is_waiting(sequence):
                walk.num_places_taken = self._sequences.num_places_taken
                continue
            walk.num_left_waiting += 1
            if is_asked_for or lends or not fits:
                walk.passed.append(sequence)
                if sequence.num_overtaken < MAX_OVERTAKEN:
                    continue
            if _needs_every_place(sequence):
                return  # an arrival would run beside it as long as it answers
            # From here on out of reach for those behind, or it could wait for ever.
            walk.num_blocks_kept += num_needed
            walk.num_places_kept += fits

    def _find_room(self, sequence: Sequence, walk: _Walk) -> tuple[int, bool]:
        """Look for blocks and a place beside what is kept; blocks are taken back if that helps.

        Returns:
            Blocks that it needs, and whether it would find them and a place.
        """
        # Prompts behind one that must run alone would keep the engine from ever being empty for it.
        is_shut_out = walk.has_met_lone_one and sequence.status is Status.WAITING
        num_taken = walk.num_places_taken + walk.num_places_kept
        has_place = not is_shut_out and self._is_free(sequence, num_taken)
        if _needs_every_place(sequence):
            walk.has_met_lone_one = True
        num_needed = self.num_needed(sequence, walk.num_blocks_kept)
        num_lacking = walk.num_blocks_kept + num_needed - self._pool.num_available
        # Only if it may be enough: what is taken back has to be computed again.
        if has_place and 0 < num_lacking <= walk.num_yielding:
            self._make_room(walk.num_blocks_kept + num_needed, set())
            walk.num_yielding = self._num_yielding()
            # Again: a hit that only those had is not held any more, and takes an available block.
            num_needed = self.num_needed(sequence, walk.num_blocks_kept)
        has_blocks = walk.num_blocks_kept + num_needed <= self._pool.num_available
        return num_needed, has_place and has_blocks

    def has_place(self, sequence: Sequence) -> bool:
        """Could one more sequence run now, blocks aside?"""
        return self._is_free(sequence, self._sequences.num_places_taken)

    def _is_free(self, sequence: Sequence, num_taken: int) -> bool:
        if _needs_every_place(sequence):
            return not num_taken
        return num_taken < self._limits.max_sequences

    def _may_start(self, sequence: Sequence) -> bool:
        """A hand-over waits for its partner, but above the watermark it may run ahead, once.

        One that was not announced must wait: it would be computed and then held for a partner that
        never comes. One whose KV was taken back must, too: it would be computed again and again.
        """
        handover = sequence.handover
        if handover is None or handover.is_partnered:
            return True
        num_left = self._pool.num_available - self._tables.blocks_for(sequence.num_tokens)
        # What may be for nobody must not take more than half of the pool.
        is_roomy = num_left >= self._pool.num_blocks // 2
        return handover.is_announced and not handover.ran_ahead and is_roomy

    def _num_spare(self, sequence: Sequence) -> int:
        """Blocks for growth that an arrival takes with its prompt's: one for each choice."""
        return len(sequence.choices) if sequence.status is Status.RESERVING else 0

    def num_needed(self, sequence: Sequence, num_kept: int) -> int:
        """Available blocks that a sequence would use up: cached ones count, held ones are shared.

        Where blocks are plenty even beside `num_kept`, nobody looks for what is here already.
        """
        num_blocks = self._tables.blocks_for(sequence.num_tokens) + self._num_spare(sequence)
        if num_kept + num_blocks <= self._pool.num_available:
            return num_blocks
        hits = self._tables.find_prefix(sequence)
        return num_blocks - sum(self._pool.references(block_id) > 0 for block_id in hits)

    def take(self, sequence: Sequence) -> list[int] | None:
        """Give a sequence its table; those in front of it that still wait were overtaken.

        Returns:
            Leading blocks whose content is here already; None if there were too few.
        """
        hits = self._tables.find_prefix(sequence)
        num_new = self._tables.blocks_for(sequence.num_tokens) - len(hits)
        try:
            self._tables.allocate(sequence, hits, num_new, num_spare=self._num_spare(sequence))
        except PoolExhausted:
            return None
        for older in self._passed:
            # By whoever is due later; who was in front has not overtaken.
            older.num_overtaken += _is_waiting(older) and older.due < sequence.due
        sequence.num_overtaken = 0
        return hits

    def make_writable(
        self,
        sequence: Sequence,
        num_tokens: int,
        copies: list[tuple[int, int]],
        planned: set[int],
    ) -> bool:
        """Give a running sequence private blocks for its next tokens, from the youngest if need be.

        Returns:
            False if the sequence itself was preempted or must wait for a block.
        """
        size = self._limits.block_size_tokens
        first = sequence.num_computed_tokens // size
        last = (sequence.num_computed_tokens + num_tokens - 1) // size
        for index in range(first, last + 1):
            is_new = index >= len(sequence.block_table)
            # Nobody else reads it: it may be written in place.
            if not is_new and self._pool.references(sequence.block_table[index]) == 1:
                continue
            block_id = self._one_block(sequence, planned)
            if block_id is None:
                return False
            if is_new:
                sequence.block_table.append(block_id)
            else:  # copy on write: a fork's partial block is shared until someone appends to it
                shared = sequence.block_table[index]
                copies.append((shared, block_id))
                # Before the copy has run: `copies_from_free` keeps the block until then.
                self._pool.free([shared])
                sequence.block_table[index] = block_id
        return True

    def _one_block(self, sequence: Sequence, planned: set[int]) -> int | None:
        # Reserved with its prompt, so that its first own tokens preempt nobody.
        if sequence.spare_blocks:
            return sequence.spare_blocks.pop()
        while self._pool.num_available == 0 and not self._make_room(1, planned):
            # The youngest has the least to compute again; who is planned keeps its blocks.
            victim = next(
                (s for s in reversed(self._sequences.running) if s.key not in planned), None
            )
            if victim is None or victim is sequence:
                # Alone it always fits (check_fits), so others hold the rest and will give it back.
                if (
                    len(self._sequences.running) > 1
                    or self._sequences.holding
                    or self._sequences.arriving
                ):
                    self.preempt(sequence)
                return None
            self.preempt(victim)
        return self._pool.allocate(1)[0]

    def give_way(self) -> None:
        """Take what those lack to start, blocks and places, who go before others that run.

        Only between steps. The rule is that of `engine.scheduling.yielding`; the youngest yields
        first.
        """
        # Not what would run ahead of its partner: that may be for nobody.
        line = list(self._sequences.waiting.ready)
        if self._sequences.executing or not may_yield(self._sequences.running, line):
            return
        num_blocks = 0
        starting: list[Sequence] = []
        num_looked_at = 0
        hopeless: set[tuple[str, float]] = set()
        for sequence in line:
            # Nobody is called in before one that waits for an empty engine.
            if _needs_every_place(sequence) or num_looked_at == LOOK_AHEAD:
                return
            kind = (sequence.tenant, sequence.delay_s)
            if sequence.run_alone or kind in hopeless:
                continue
            num_looked_at += 1
            num_needed = num_blocks + self.num_needed(sequence, num_blocks)
            if not self._has_room(num_needed, len(starting)):
                yielding = victims(self._sequences.running, starting, sequence)
                if not yielding:
                    # Nor to those of its kind behind it, however many they are.
                    hopeless.add(kind)
                self._call_in(sequence, yielding, num_needed, len(starting))
            if self._has_room(num_needed, len(starting)):
                num_blocks = num_needed
                starting.append(sequence)

    def _call_in(
        self, sequence: Sequence, yielding: list[Sequence], num_blocks: int, num_places: int
    ) -> None:
        """Preempt as few of those who yield as do, if there are enough, and put it before them."""
        num_active = sum(not one.is_out_of_credit for one in yielding)
        num_left = num_blocks - sum(map(_num_held, yielding))
        if not self._has_room(num_left, num_places - num_active):
            return  # not even all of them would do
        for victim in yielding:
            if self._has_room(num_blocks, num_places):
                return
            # Who is parked takes no place.
            if victim.is_out_of_credit and num_blocks <= self._pool.num_available:
                continue
            self.preempt(victim)
            # Or it would take its place again: it came before.
            self._sequences.waiting.move_before(yielding[-1].due, sequence)

    def _has_room(self, num_blocks: int, num_places: int) -> bool:
        """True if so many blocks are there, and a place beside so many."""
        num_taken = self._sequences.num_places_taken + num_places
        return num_blocks <= self._pool.num_available and num_taken < self._limits.max_sequences

    def _make_room(self, num_blocks: int, planned: set[int]) -> bool:
        """Take back KV that nobody has asked for yet, and that of parked sequences.

        Only between steps: an executing one may still copy from what a parked sequence shares.

        Returns:
            True if it may have helped.
        """
        if self._sequences.executing:
            return False
        num_before = self._pool.num_available
        for sequence in self._yielding(planned):
            if self._pool.num_available >= num_blocks:
                break
            self.preempt(sequence)
        return self._pool.num_available > num_before

    def _yielding(self, planned: set[int]) -> list[Sequence]:
        """Who gives up blocks for anybody: the first of them first."""
        # First what nobody asked for, then what its client does not read.
        unasked = [s for s in self._sequences.holding.values() if s.is_ahead]
        parked = [s for s in self._sequences.running if s.is_out_of_credit and s.key not in planned]
        return [*unasked, *reversed(parked)]

    def _num_yielding(self) -> int:
        """Blocks that may come free so, at the most: shared ones do not, none while a step runs."""
        if self._sequences.executing:
            return 0
        yielding = self._yielding(set())
        return sum(map(_num_held, yielding))

    def preempt(self, sequence: Sequence) -> None:
        """Free a sequence's blocks and queue it where it is due; its tokens are recomputed later.

        A transfer may still read the blocks of a hand-over: they stay pinned until it is drained.
        """
        handover = sequence.handover
        if handover is not None and not self._events.withdraw_start(sequence):
            pins = self._tables.pin(sequence) if handover.is_read else []
            handover.is_read = False
            self._events.add(Preempted(sequence, tuple(pins)))
        self.num_preemptions += 1
        sequence.num_preemptions += 1
        self._sequences.remove(sequence)
        # Computed again instead of swapped out (PagedAttention has both): what is cached still is.
        self._sequences.release(sequence)
        sequence.num_computed_tokens = 0
        if sequence.needs_prompt_scores:
            # The prompt is scored again from its start.
            sequence.prompt_logprobs.clear()
        sequence.status = Status.WAITING
        self._sequences.waiting.add(sequence)
