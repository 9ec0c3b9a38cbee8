"""Plans on the pipe to ranks: news alone.

Owns what both ends remember of each sequence, so that a step costs what is new in it and not the
length of its contexts. Does not know pipes or processes.

    item on the pipe          sent                                   remembered until `released`
    block table               entries from the block of `start` on,  the entries before
                              or from the first the ranks do not know
    history of penalties      tokens since the last sampling         tokens, distinct ones, counts
    how to draw               if it is not as it was                 all but position and banned

A plan that builds on what a rank does not know is an error: the rank ends rather than guess.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.errors import InternalError
from core.plan import Penalties, SampleSpec, StepItem, StepPlan
from engine.model.rank_memory import GrowingInts, TokenHistory, first_token

NUMBERS = "I"
"""Blocks and tokens travel as unsigned 32-bit words in this machine's byte order."""


@dataclass(slots=True)
class _Told:
    """What the ranks know of a sequence."""

    num_blocks: int = 0
    num_tokens: int = 0
    draws: list[tuple[Any, ...]] = field(default_factory=list)


class PlanEncoder:
    """The worker's end. Ranks that start know nothing: each start takes a new one."""

    def __init__(self, block_size_tokens: int) -> None:
        """Nothing was told yet."""
        self._block_size_tokens = block_size_tokens
        self._told: dict[int, _Told] = {}

    def __len__(self) -> int:
        """Sequences that the ranks know."""
        return len(self._told)

    def encode(self, plan: StepPlan) -> list[Any]:
        """Flatten a plan that every rank decodes next.

        Raises:
            InternalError: The plan breaks the contract of `core.plan`; the ranks must start again.
        """
        released = [key for key in plan.released if self._told.pop(key, None) is not None]
        return [
            plan.step_id,
            released,
            [self._item(item) for item in plan.items],
            plan.copies,
            plan.report_layers,
            plan.arrived,
        ]

    def _item(self, item: StepItem) -> list[Any]:
        told = self._told.setdefault(item.sequence_key, _Told())
        size = self._block_size_tokens
        num_blocks = -(-(item.start + len(item.token_ids)) // size)
        if len(item.block_table) < num_blocks:
            raise InternalError(
                f"sequence {item.sequence_key} has {len(item.block_table)} blocks in a step that "
                f"needs {num_blocks}"
            )
        first_block = min(told.num_blocks, item.start // size)
        told.num_blocks = num_blocks
        return [
            item.sequence_key,
            item.start,
            item.token_ids,
            first_block,
            _to_bytes(item.block_table[first_block:num_blocks]),
            _draws(item.samples, told),
            [(sample.position, sample.banned) for sample in item.samples],
            _penalties(item, told),
            item.targets,
            item.num_target_logprobs,
        ]


def _draws(samples: tuple[SampleSpec, ...], told: _Told) -> list[tuple[Any, ...]] | None:
    """What stays the same from token to token, or None if it did."""
    draws: list[tuple[Any, ...]] = [
        (
            s.choice,
            s.seed,
            s.temperature,
            s.top_k,
            s.top_p,
            s.num_logprobs,
            s.min_p,
            s.bias,
            s.allowed,
        )
        for s in samples
    ]
    if draws == told.draws:
        return None
    told.draws = draws
    return draws


def _penalties(item: StepItem, told: _Told) -> list[Any] | None:
    p = item.samples[0].penalties if item.samples else None
    if any(sample.penalties is not p for sample in item.samples):
        raise InternalError(f"the samples of sequence {item.sequence_key} differ in penalties")
    if p is None:
        return None
    first = first_token(p)
    known = told.num_tokens
    told.num_tokens = p.num_tokens - first
    if told.num_tokens < known:
        raise InternalError(
            f"sequence {item.sequence_key} has {told.num_tokens} tokens and had {known}; one that "
            f"starts again has to be released"
        )
    news = _to_bytes(p.token_ids[first + known : p.num_tokens])
    return [p.presence, p.frequency, p.repetition, p.num_prompt_tokens - first, known, news]


def _to_bytes(numbers: Sequence[int]) -> bytes:
    return array(NUMBERS, numbers).tobytes()


@dataclass(slots=True)
class _Memory:
    """What this rank knows of a sequence."""

    table: GrowingInts = field(default_factory=GrowingInts)
    draws: list[dict[str, Any]] = field(default_factory=list)
    history: TokenHistory | None = None


class PlanDecoder:
    """A rank's end."""

    def __init__(self, block_size_tokens: int, vocabulary_size: int) -> None:
        """Nothing is known yet."""
        self._block_size_tokens = block_size_tokens
        self._vocabulary_size = vocabulary_size
        self._memories: dict[int, _Memory] = {}

    def __len__(self) -> int:
        """Sequences remembered."""
        return len(self._memories)

    def decode(self, wire: list[Any]) -> StepPlan:
        """Rebuild a plan; its tables and histories are good until the next one is decoded.

        Raises:
            InternalError: It builds on something that was never sent here.
        """
        step_id, released, items, copies, report_layers, arrived = wire
        for key in released:
            if self._memories.pop(key, None) is None:
                raise InternalError(f"sequence {key} was released on a rank that never knew it")
        return StepPlan(
            step_id,
            tuple(map(self._item, items)),
            tuple((source, destination) for source, destination in copies),
            report_layers,
            tuple(arrived),
            tuple(released),
        )

    def _item(self, wire: list[Any]) -> StepItem:
        key, start, ids, first_block, blocks, draws, moments, penalties, targets, num_top = wire
        memory = self._memories.setdefault(key, _Memory())
        memory.table.put(first_block, np.frombuffer(blocks, np.uint32))
        if len(memory.table) * self._block_size_tokens < start + len(ids):
            raise InternalError(
                f"a rank knows {len(memory.table)} blocks of sequence {key} in a step that reaches "
                f"{start + len(ids)} tokens"
            )
        if draws is not None:
            memory.draws = [_draw(draw) for draw in draws]
        p = None if penalties is None else self._penalties(penalties, memory, key)
        if len(moments) != len(memory.draws):
            raise InternalError(f"a rank was never told how to draw for sequence {key}")
        return StepItem(
            key,
            start,
            tuple(ids),
            memory.table.view().data,
            tuple(
                SampleSpec(position=position, banned=tuple(banned), penalties=p, **draw)
                for draw, (position, banned) in zip(memory.draws, moments, strict=True)
            ),
            "",
            tuple(targets),
            num_top,
        )

    def _penalties(self, wire: list[Any], memory: _Memory, key: int) -> Penalties:
        presence, frequency, repetition, num_prompt_tokens, known, news = wire
        if memory.history is None:
            memory.history = TokenHistory(num_prompt_tokens, self._vocabulary_size)
        history = memory.history
        if len(history) != known:
            raise InternalError(
                f"a rank knows {len(history)} tokens of sequence {key} and got those after {known}"
            )
        history.extend(np.frombuffer(news, np.uint32))
        return Penalties(presence, frequency, repetition, history, num_prompt_tokens, len(history))


def _draw(wire: list[Any]) -> dict[str, Any]:
    choice, seed, temperature, top_k, top_p, num_logprobs, min_p, bias, allowed = wire
    return {
        "choice": choice,
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_logprobs": num_logprobs,
        "min_p": min_p,
        "bias": tuple((token_id, value) for token_id, value in bias),
        "allowed": tuple(allowed),
    }
