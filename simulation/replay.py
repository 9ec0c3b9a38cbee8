"""Replay of a trace on virtual time: which worker gets each prompt, and what it finds cached there.

Owns the workers' queues and the clock. Placement, the router's account of its workers, its view of
their blocks and the books of each worker's pool are those of a real cluster. Does not know files.

A worker computes one prompt at a time, first come first served, at a fixed speed; decoding and the
transfer of KV are not modelled. What a worker has stored and evicted reaches the view after a delay.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from core.block_hash import BlockHash
from core.errors import ConfigError
from core.ids import Incarnation, RunId, WorkerId
from core.prefix_changes import PrefixChange
from core.session import Load, Role, WorkerDescriptor
from core.types import GenerateRequest, SamplingParams
from engine.scheduling.block_pool import BlockPool
from prefix_index.view import PrefixView
from router.cost import Candidate
from router.expected_prefixes import ExpectedPrefixes
from router.placement import PlacementConstraints, choose
from router.workers.load import WorkerLoad
from simulation.traces import Trace, TraceRequest, ideal_hit_rate

PUBLISH_S = 0.05
"""How late a worker's change reaches the view."""
SESSIONS_PER_S = 0.2
"""Rate at which sessions start."""
SCOPE = "trace"
EVENTS_BETWEEN_REPORTS = 256


class Policy(StrEnum):
    """How a worker is chosen."""

    COST = "cost"
    LEAST_QUEUED = "least-queued"
    ROUND_ROBIN = "round-robin"


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """The cluster that a trace is replayed on."""

    num_workers: int
    cache_tokens: int
    """Of each worker."""
    prefill_tokens_per_s: float
    """Of each worker."""
    policy: Policy = Policy.COST
    seed: int = 0


@dataclass(slots=True)
class _Job:
    """One prompt on its way."""

    run_id: RunId
    request: TraceRequest
    sent_s: float
    on_done: Callable[[float], None]
    block_ids: list[int] = field(default_factory=list)
    num_cached: int = 0


class _Pool(BlockPool):
    """A pool that tells what it evicts."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.evicted: list[BlockHash] = []

    def _evict(self, num_blocks: int) -> list[int]:
        oldest = self._lists.members(self._cached)[:num_blocks] if num_blocks else []
        self.evicted += [h for h in map(self.block_hash, oldest) if h is not None]
        return super()._evict(num_blocks)
