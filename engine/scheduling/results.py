"""What a step's result means: tokens appended, prompts done, choices forked, sequences finished.

Owns the way from drawn tokens to events. Does not know how a step was planned.
"""

from __future__ import annotations

from collections.abc import Callable

from core.plan import StepItem, StepPlan, StepResult
from core.types import Logprob
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_tables import BlockTables
from engine.scheduling.events import PromptComputed, Sampled, SchedulerEvent, SequenceFailed
from engine.scheduling.sequence import Sequence, Status
from engine.scheduling.sequences import Sequences


class Results:
    """Applies results to the sequences of one engine."""

    def __init__(
        self,
        pool: BlockPool,
        tables: BlockTables,
        sequences: Sequences,
        next_key: Callable[[], int],
    ) -> None:
        """Keep the collaborators; `next_key` names forks."""
        self._pool = pool
        self._tables = tables
        self._sequences = sequences
        self._next_key = next_key

    def apply(self, plan: StepPlan, result: StepResult, now_s: float) -> list[SchedulerEvent]:
        """Apply the result of a plan; items of sequences that left meanwhile are dropped."""
        events: list[SchedulerEvent] = []
        by_key = {s.key: s for s in self._sequences.running}
        for item in plan.items:
            # Cancelled while the step ran.
            if item.sequence_key not in by_key:
                continue
            sequence = by_key[item.sequence_key]
            if item.sequence_key in result.failed:
                self._sequences.cancel(sequence)
                events.append(SequenceFailed(sequence, result.failed[item.sequence_key]))
                continue
            sequence.num_computed_tokens = item.start + len(item.token_ids)
            sequence.prompt_logprobs += result.scored.get(item.sequence_key, ())
            # Only what is computed: from here on others may share these blocks.
            self._tables.register(sequence)
            if sequence.num_computed_tokens == sequence.num_tokens:
                events += self._caught_up(sequence, item, result, now_s)
        return events

    def _caught_up(
        self, sequence: Sequence, item: StepItem, result: StepResult, now_s: float
    ) -> list[SchedulerEvent]:
        """All known tokens are computed: what was drawn becomes the next ones."""
        tokens = {
            spec.choice: result.tokens[item.sequence_key, spec.choice] for spec in item.samples
        }
        # A prompt that is computed again was done when it was done first.
        if sequence.prompt_done_at is None:
            sequence.prompt_done_at = now_s
        if sequence.handover is not None:
            # Drawn once: a prompt that is computed again has its first tokens already.
            sequence.handover.first_tokens = sequence.handover.first_tokens or tokens
            self._sequences.running.remove(sequence)
            sequence.status = Status.HOLDING
            self._sequences.holding[sequence.key] = sequence
            sampled = [self._sampled(sequence, choice, token) for choice, token in tokens.items()]
            return [*sampled, PromptComputed(sequence)]
        if len(sequence.choices) > 1:
            self._sequences.running.remove(sequence)
            return self.fork(sequence, tokens)
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
            self._sequences.cancel(sequence)
        return sampled

    def fork(self, sequence: Sequence, tokens: dict[int, Logprob]) -> list[SchedulerEvent]:
        """Fork a computed prompt into one running sequence per choice, sharing all its blocks."""
        events: list[SchedulerEvent] = []
        for choice in sequence.choices:
            fork = sequence.fork(self._next_key(), choice)
            for block_id in fork.block_table:
                self._pool.share(block_id)
            # One for each choice: its first own token finds a block.
            if sequence.spare_blocks:
                fork.spare_blocks.append(sequence.spare_blocks.pop())
            self._sequences.running.add(fork)
            self._sequences.turns.count(fork)
            events.append(self._append(fork, tokens[choice]))
        # Last: until the forks have their references the blocks must not be free.
        self._sequences.forked(sequence)
        return events
