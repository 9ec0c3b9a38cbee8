"""Preempted sequences whose blocks lie in storage tiers below the pool: how they go on.

Owns their way from the waiting line over LOADING to running, or back. Does not know tiers and their
books (`StorageTiers`), threads or bytes.

A sequence is preempted within a plan, and nobody waits for a copy: its blocks were written ahead,
while it ran (`BlockSupply.preempted_next`), and are pinned in the tiers until it goes on. When its
turn comes it is given all its blocks, as always, and those that the pool does not have any more are
loaded into them. The last, partial block is computed.
"""

from __future__ import annotations

from engine.scheduling.block_tables import BlockTables
from engine.scheduling.events import HandoverEvents, SwapInBegun
from engine.scheduling.sequence import Sequence, Status
from engine.scheduling.sequences import Sequences
from engine.scheduling.step_budget import StepBudget
from engine.scheduling.storage_tiers import Loading, StorageTiers


class Swapping:
    """The preempted sequences of one engine."""

    def __init__(
        self, tables: BlockTables, sequences: Sequences, budget: StepBudget, events: HandoverEvents
    ) -> None:
        """Keep the collaborators; without tiers all is computed again."""
        self._tables = tables
        self._sequences = sequences
        self._budget = budget
        self._events = events

    def use(self, storage: StorageTiers) -> None:
        """Look in these tiers from now on."""
        self._sequences.storage = storage

    def begin(self, sequence: Sequence, num_hits: int) -> bool:
        """Let a preempted sequence wait for those of its blocks that lie in the tiers.

        Args:
            sequence: Has its table, and stands nowhere.
            num_hits: Leading blocks that the pool had.

        Returns:
            False if it may run at once.
        """
        storage = self._sequences.storage
        if storage is None or not sequence.num_swapped_blocks:
            return False
        loading = storage.begin_swap_in(sequence, num_hits, self._budget.token_s)
        if loading is None:
            return False
        sequence.status = Status.LOADING
        self._sequences.arriving[sequence.key] = sequence
        self._events.add(SwapInBegun(loading))
        return True

    def end(self, loading: Loading) -> None:
        """Let a sequence go on that loaded until now; one that was cancelled meanwhile does not.

        It runs on behind what was read, and computes what is missing. If the load is under way
        still, it is late: then the sequence gives up its blocks, which may be written to, and is
        computed when its turn comes.

        Args:
            loading: Of `SwapInBegun`. Once for each.
        """
        sequence = loading.sequence
        if sequence.status is not Status.LOADING:
            return
        self._sequences.remove(sequence)
        if loading.num_read is None:
            loading.is_late = True
            self._sequences.release(sequence)
            sequence.num_computed_tokens = 0
            sequence.status = Status.WAITING
            self._sequences.waiting.add(sequence)
            return
        sequence.num_computed_tokens += loading.num_read * sequence.block_size_tokens
        sequence.num_prefix_hit_tokens = max(
            sequence.num_prefix_hit_tokens, sequence.num_computed_tokens
        )
        self._tables.register(sequence)
        sequence.status = Status.RUNNING
        self._sequences.running.add(sequence)
