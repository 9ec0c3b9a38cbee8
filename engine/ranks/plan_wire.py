"""Plans on the pipe to ranks, as deltas.

Owns what both ends remember of each sequence, so that a step costs what is new in it and not the
length of its contexts. Does not know pipes or processes.

    item on the pipe          sent                                   remembered until `released`
    block table               entries from the block of `start` on,  the entries before
                              or from the first the ranks do not know
    history of penalties      tokens since the last sampling         tokens, distinct ones, counts
    choices, seed, parameters if they are not as they were           all of them

A plan that builds on what a rank does not know is an error: the rank ends rather than guess.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from msgspec.msgpack import Decoder

from core.errors import InternalError
from core.plan import History, SampleSpec, StepItem, StepPlan
from core.types import SamplingParams
from engine.model.rank_memory import GrowingInts, TokenHistory

NUMBERS = "I"
"""Blocks and tokens travel as unsigned 32-bit words in this machine's byte order."""

Draw = tuple[int, int, SamplingParams]
"""What stays the same from token to token: choice, seed and parameters."""


class HistoryDelta(msgspec.Struct, array_like=True):
    """What a history of penalties has after the tokens that ranks know."""

    num_prompt_tokens: int
    num_known_tokens: int
    token_ids: bytes


class ItemDelta(msgspec.Struct, array_like=True):
    """A `StepItem`, without what ranks remember."""

    sequence_key: int
    start: int
    token_ids: tuple[int, ...]
    first_block: int
    blocks: bytes
    """The block table from `first_block` on."""
    draws: list[Draw] | None
    """None: as they were."""
    moments: list[tuple[int, tuple[int, ...]]]
    """For each draw its position and banned tokens."""
    history: HistoryDelta | None
    targets: tuple[int, ...]
    num_target_logprobs: int


class PlanDelta(msgspec.Struct, array_like=True):
    """A `StepPlan`, without what ranks remember."""

    step_id: int
    released: tuple[int, ...]
    items: list[ItemDelta]
    copies: tuple[tuple[int, int], ...]
    report_layers: bool
    arrived: tuple[int, ...]


PLAN: Decoder[PlanDelta] = Decoder(PlanDelta)


@dataclass(slots=True)
class _Sent:
    """What the ranks know of a sequence."""

    num_blocks: int = 0
    num_tokens: int = 0
    draws: list[Draw] = field(default_factory=list)


class PlanEncoder:
    """The worker's end. Ranks that start know nothing: each start takes a new one."""

    def __init__(self, block_size_tokens: int) -> None:
        self._block_size_tokens = block_size_tokens
        self._sent: dict[int, _Sent] = {}

    def __len__(self) -> int:
        """Sequences that the ranks know."""
        return len(self._sent)

    def encode(self, plan: StepPlan) -> PlanDelta:
        """Take from a plan what is new in it; every rank decodes it next.

        Raises:
            InternalError: The plan breaks the contract of `core.plan`; the ranks must start again.
        """
        # A plan may name keys that were in no executed one: ranks never had them.
        released = tuple(key for key in plan.released if self._sent.pop(key, None) is not None)
        return PlanDelta(
            plan.step_id,
            released,
            [self._item(item) for item in plan.items],
            plan.copies,
            plan.report_layers,
            plan.arrived,
        )

    def _item(self, item: StepItem) -> ItemDelta:
        sent = self._sent.setdefault(item.sequence_key, _Sent())
        size = self._block_size_tokens
        # No further than the step reaches: entries behind that may still change.
        num_blocks = -(-(item.start + len(item.token_ids)) // size)
        if len(item.block_table) < num_blocks:
            raise InternalError(
                f"sequence {item.sequence_key} has {len(item.block_table)} blocks in a step that "
                f"needs {num_blocks}"
            )
        # The block of `start` may be a fresh copy (copy on write), so it is always sent.
        first_block = min(sent.num_blocks, item.start // size)
        sent.num_blocks = num_blocks
        return ItemDelta(
            item.sequence_key,
            item.start,
            item.token_ids,
            first_block,
            _to_bytes(item.block_table[first_block:num_blocks]),
            _draws(item.samples, sent),
            [(sample.position, sample.banned) for sample in item.samples],
            _history(item, sent),
            item.targets,
            item.num_target_logprobs,
        )


def _draws(samples: tuple[SampleSpec, ...], sent: _Sent) -> list[Draw] | None:
    """How to draw, or None if that is as it was."""
    draws = [(sample.choice, sample.seed, sample.params) for sample in samples]
    # The same for every token of an output: this spares most of an item's bytes.
    if draws == sent.draws:
        return None
    sent.draws = draws
    return draws


def _history(item: StepItem, sent: _Sent) -> HistoryDelta | None:
    history = item.samples[0].history if item.samples else None
    # One history travels for all samples of an item.
    if any(sample.history is not history for sample in item.samples):
        raise InternalError(f"the samples of sequence {item.sequence_key} differ in history")
    if history is None:
        return None
    start = history.start
    known = sent.num_tokens
    sent.num_tokens = history.num_tokens - start
    if sent.num_tokens < known:
        raise InternalError(
            f"sequence {item.sequence_key} has {sent.num_tokens} tokens and had {known}; one that "
            f"starts again has to be released"
        )
    token_ids = _to_bytes(history.token_ids[start + known : history.num_tokens])
    return HistoryDelta(history.num_prompt_tokens - start, known, token_ids)


def _to_bytes(numbers: Sequence[int]) -> bytes:
    # Raw words: as a list, msgpack would code each number by itself.
    return array(NUMBERS, numbers).tobytes()


@dataclass(slots=True)
class _Memory:
    """What this rank knows of a sequence."""

    table: GrowingInts = field(default_factory=GrowingInts)
    draws: list[Draw] = field(default_factory=list)
    history: TokenHistory | None = None


class PlanDecoder:
    """A rank's end."""

    def __init__(self, block_size_tokens: int, vocabulary_size: int) -> None:
        self._block_size_tokens = block_size_tokens
        self._vocabulary_size = vocabulary_size
        self._memories: dict[int, _Memory] = {}

    def __len__(self) -> int:
        """Sequences remembered."""
        return len(self._memories)

    def decode(self, delta: PlanDelta) -> StepPlan:
        """Rebuild a plan; its tables and histories are good until the next one is decoded.

        Raises:
            InternalError: It builds on something that was never sent here.
        """
        # First of all: a key that is released may stand in this very plan with a new table.
        for key in delta.released:
            if self._memories.pop(key, None) is None:
                raise InternalError(f"sequence {key} was released on a rank that never knew it")
        return StepPlan(
            delta.step_id,
            tuple(map(self._item, delta.items)),
            delta.copies,
            delta.report_layers,
            delta.arrived,
            delta.released,
        )

    def _item(self, delta: ItemDelta) -> StepItem:
        key = delta.sequence_key
        memory = self._memories.setdefault(key, _Memory())
        memory.table.put(delta.first_block, np.frombuffer(delta.blocks, np.uint32))
        end = delta.start + len(delta.token_ids)
        if len(memory.table) * self._block_size_tokens < end:
            raise InternalError(
                f"a rank knows {len(memory.table)} blocks of sequence {key} in a step that reaches "
                f"{end} tokens"
            )
        if delta.draws is not None:
            memory.draws = delta.draws
        history = None if delta.history is None else self._history(delta.history, memory, key)
        if len(delta.moments) != len(memory.draws):
            raise InternalError(f"a rank has no parameters to draw with for sequence {key}")
        return StepItem(
            key,
            delta.start,
            delta.token_ids,
            # Not copied: the step is over before the next plan is decoded.
            memory.table.view().data,
            tuple(
                SampleSpec(choice, position, seed, params, banned, history)
                for (choice, seed, params), (position, banned) in zip(
                    memory.draws, delta.moments, strict=True
                )
            ),
            "",
            delta.targets,
            delta.num_target_logprobs,
        )

    def _history(self, delta: HistoryDelta, memory: _Memory, key: int) -> History:
        if memory.history is None:
            memory.history = TokenHistory(delta.num_prompt_tokens, self._vocabulary_size)
        history = memory.history
        if len(history) != delta.num_known_tokens:
            raise InternalError(
                f"a rank knows {len(history)} tokens of sequence {key} and got those after "
                f"{delta.num_known_tokens}"
            )
        history.extend(np.frombuffer(delta.token_ids, np.uint32))
        return History(history, 0, delta.num_prompt_tokens, len(history))
