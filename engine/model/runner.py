"""Executes step plans on one rank: plan to tensors, forward, sample this rank's share.

Owns the KV tensor and the building of inputs. Does not know processes or the network.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import numpy as np
from torch import Tensor

from core.plan import StepItem, StepPlan, StepResult
from core.types import Logprob
from engine.model.attention import AttentionInputs
from engine.model.kv_pools import HostPool, KVPool, StagedPool
from engine.model.model import Model
from engine.model.sampling import draw, score

Ints = np.ndarray[Any, np.dtype[np.int64]]
Indexed = list[tuple[int, StepItem]]
"""Items of a plan with their places in it."""


class ModelRunner:
    """A model and its KV cache."""

    def __init__(
        self,
        model: Model,
        memory: memoryview,
        num_blocks: int,
        block_size_tokens: int,
        *,
        exports_kv: bool = True,
    ) -> None:
        """Join a model and a pool in, or staged in, the memory it shares with its worker.

        Args:
            model: Or one rank's part of it.
            memory: uint8 [pool bytes].
            num_blocks: Blocks in the pool.
            block_size_tokens: Tokens in each.
            exports_kv: Whether KV computed here is sent to others; only a pool on a device minds.
        """
        spec = model.spec
        shape = (
            spec.num_layers,
            num_blocks,
            2,
            block_size_tokens,
            model.shard.num_kv_heads,
            spec.head_size,
        )
        self.model = model
        self.pool: KVPool = (
            HostPool(memory, shape, model.dtype)
            if model.device.type == "cpu"
            else StagedPool(memory, shape, model.dtype, model.device, exports_kv=exports_kv)
        )

    @property
    def kv(self) -> Tensor:
        """The pool [layers, N, 2, B, K, D]."""
        return self.pool.kv

    def execute(self, plan: StepPlan, on_layer: Callable[[int, int], None]) -> StepResult:
        """Run one step; a sequence that cannot be computed or sampled fails alone."""
        # An id without a row fails its own sequence; the step goes on for the others.
        failed = _outside(plan.items, self.model.spec.vocabulary_size)
        # Before the copies, whose source may have arrived just now.
        self.pool.load_staged_blocks(plan.arrived)
        for source, destination in plan.copies:
            self.kv[:, destination] = self.kv[:, source]
        written = _written_blocks(plan, self.kv.shape[3])

        def layer_queued(layer: int) -> None:
            if self.pool.layer_queued(layer, written):
                on_layer(plan.step_id, layer)

        # Failed items stay in, so that all rows keep their places.
        inputs = _inputs(plan.items)
        sound = [(i, item) for i, item in enumerate(plan.items) if item.sequence_key not in failed]
        sampling = [(i, item) for i, item in sound if item.samples]
        scoring = [(i, item) for i, item in sound if item.targets]
        # Every rank draws for its share of the sequences: sampling is split like the other work.
        rank, size = self.model.ranks.rank, self.model.ranks.size
        owners = [i % size for i, _ in sampling]
        owners += [i % size for i, item in scoring for _ in item.targets]
        logits = self.model.forward(
            _token_ids(plan.items, failed),
            inputs,
            self.kv,
            _logit_rows(inputs.row_starts, sampling, scoring),
            layer_queued,
            owners,
        )
        # On a device a layer ends after it was queued, and is reported when it has.
        for layer in self.pool.finished():
            on_layer(plan.step_id, layer)
        # One transfer for all rows; the draws are numpy's, in float64.
        values = logits.cpu().numpy()
        drawn = [item for i, item in sampling if i % size == rank]
        scored = [item for i, item in scoring if i % size == rank]
        tokens, not_drawn = _tokens(values[: len(drawn)], drawn)
        scores = _scores(values[len(drawn) :], scored)
        return StepResult(plan.step_id, tokens, failed | not_drawn, scores)


def _outside(items: tuple[StepItem, ...], vocabulary_size: int) -> dict[int, str]:
    """Items with a token that the model does not have, and the message for each."""
    failed: dict[int, str] = {}
    for item in items:
        ids = (*item.token_ids, *item.targets)
        if not 0 <= min(ids) <= max(ids) < vocabulary_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            failed[item.sequence_key] = (
                f"a token id is {wrong}, the model has rows for 0 to {vocabulary_size - 1}"
            )
    return failed


def _token_ids(items: tuple[StepItem, ...], failed: Container[int]) -> Ints:
    """Ids of all rows; what fails is computed for some token, so that rows stay where they are."""
    return np.concatenate(
        [
            np.zeros(len(item.token_ids), dtype=np.int64)
            if item.sequence_key in failed
            else np.asarray(item.token_ids, dtype=np.int64)
            for item in items
        ]
    )


def _logit_rows(row_starts: Ints, sampling: Indexed, scoring: Indexed) -> Ints:
    """Rows whose logits are wanted: the last one of what samples, then one for each target."""
    last_rows = [row_starts[i + 1] - 1 for i, _ in sampling]
    scored_rows = [row_starts[i] + np.arange(len(item.targets)) for i, item in scoring]
    return np.concatenate([np.asarray(last_rows, dtype=np.int64), *scored_rows])


def _tokens(
    logits: np.ndarray[Any, Any], items: list[StepItem]
) -> tuple[dict[tuple[int, int], Logprob], dict[int, str]]:
    """Draw each item's tokens from its row of fp32 [items, V].

    Returns:
        Tokens by (sequence key, choice), and why a sequence has none or not all.
    """
    tokens: dict[tuple[int, int], Logprob] = {}
    failed: dict[int, str] = {}
    for row, item in zip(logits, items, strict=True):
        try:
            for spec in item.samples:
                tokens[item.sequence_key, spec.choice] = draw(row, spec)
        # A draw fails alone: every other row is drawn by itself.
        except (ValueError, IndexError) as error:
            failed[item.sequence_key] = str(error)
    return tokens, failed


def _scores(
    logits: np.ndarray[Any, Any], scoring: list[StepItem]
) -> dict[int, tuple[Logprob, ...]]:
    """Score prompt tokens; logits fp32 [all targets, V]."""
    scored = {}
    at = 0
    for item in scoring:
        part = logits[at : at + len(item.targets)]
        at += len(item.targets)
        pairs = zip(part, item.targets, strict=True)
        scored[item.sequence_key] = tuple(
            score(row, target, item.num_target_logprobs) for row, target in pairs
        )
    return scored


def _written_blocks(plan: StepPlan, block_size: int) -> list[int]:
    """Blocks that a step writes."""
    written = [destination for _, destination in plan.copies]
    for item in plan.items:
        end = item.start + len(item.token_ids)
        written += item.block_table[item.start // block_size : -(-end // block_size)]
    return written


def _inputs(items: tuple[StepItem, ...]) -> AttentionInputs:
    positions = [
        np.arange(item.start, item.start + len(item.token_ids), dtype=np.int64) for item in items
    ]
    row_starts = np.zeros(len(items) + 1, dtype=np.int64)
    np.cumsum([len(p) for p in positions], out=row_starts[1:])
    # Short tables end in zeros, which no row reaches: positions end before them.
    tables = np.zeros((len(items), max(len(item.block_table) for item in items)), dtype=np.int64)
    for index, item in enumerate(items):
        tables[index, : len(item.block_table)] = item.block_table
    return AttentionInputs(np.concatenate(positions), row_starts, tables)
