"""Replay of a trace on virtual time: which worker gets each prompt, and what it finds cached there.

Owns the workers' queues and the clock. Placement, the router's account of its workers, its view of
their blocks and the books of each worker's pool are those of a real cluster. Does not know files.

A worker computes one prompt at a time, first come first served, at a fixed speed; decoding and the
transfer of KV are not modelled. What a worker stores and evicts reaches the view after a delay.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import cast

from core.block_hash import BlockHash
from core.config import PlacementConfig
from core.ids import Incarnation, RequestId, RunId, WorkerId
from core.prefix_changes import PrefixChange
from core.session import Load, Role, WorkerDescriptor
from core.types import GenerateRequest, SamplingParams
from engine.scheduling.block_changes import BlockChanges
from engine.scheduling.block_pool import BlockPool
from prefix_index.view import PrefixView
from router.candidate import Candidate
from router.cost import Prediction
from router.expected_prefixes import ExpectedPrefixes
from router.placement import PlacementConstraints, choose
from router.workers.load import WorkerLoad
from simulation.traces import Trace, TraceRequest, ideal_hit_rate

PUBLISH_S = 0.05
"""How late a worker's change reaches the view."""
SESSIONS_PER_S = 0.2
"""Rate at which sessions start."""
SCOPE = "trace"
DIGEST = "trace"


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
    warm_up_s: float = 0.0
    """Prompts that are sent before fill the caches, and are in no figure of TTFT."""


@dataclass(slots=True)
class _Job:
    """One prompt on its way."""

    run_id: RunId
    request: TraceRequest
    block_hashes: list[BlockHash]
    """Of its full blocks."""
    sent_s: float
    on_done: Callable[[float], None]
    block_ids: list[int] = field(default_factory=list)
    num_cached_blocks: int = 0


class _Worker:
    """One prefill worker: its pool, and the prompts that wait for it."""

    def __init__(self, number: int, plan: ReplayPlan, block_tokens: int) -> None:
        self.descriptor = _descriptor(
            f"prefill-{number}", Role.PREFILL, plan.cache_tokens // block_tokens, block_tokens
        )
        self.changes = BlockChanges()
        self.pool = BlockPool(self.descriptor.num_blocks, self.changes)
        self.load = WorkerLoad(self.descriptor)
        self.waiting: deque[_Job] = deque()
        self.is_busy = False
        self.computed_tokens = 0

    def begin(self, job: _Job) -> int:
        """Take blocks for a prompt; returns the tokens to compute."""
        pool = self.pool
        size = self.descriptor.block_size_tokens
        num_tokens = job.request.input_tokens
        num_blocks = -(-num_tokens // size)
        if num_blocks > pool.num_blocks:
            return num_tokens
        parent = pool.root(SCOPE)
        for block_hash in job.block_hashes[: (num_tokens - 1) // size]:
            block_id = pool.find(parent, block_hash, _content(block_hash))
            if block_id is None:
                break
            pool.share(block_id)
            job.block_ids.append(block_id)
            parent = pool.identity(block_id)
        job.num_cached_blocks = len(job.block_ids)
        job.block_ids += pool.allocate(num_blocks - job.num_cached_blocks)
        return num_tokens - job.num_cached_blocks * size

    def finish(self, job: _Job) -> None:
        """Register the blocks of a computed prompt, and keep them as long as nobody needs them."""
        parent = self.pool.remember_root(SCOPE)
        for block_id, block_hash in zip(job.block_ids, job.block_hashes, strict=False):
            parent = self.pool.register(block_id, parent, block_hash, _content(block_hash))
        self.pool.free(job.block_ids)


def _ignore(_: float) -> None:
    """Nobody waits for this."""


class Replay:
    """One replay; `run` does it once."""

    def __init__(
        self, trace: Trace, plan: ReplayPlan, on_answer: Callable[[int], None] = _ignore
    ) -> None:
        """Set the cluster up, with empty caches.

        Args:
            trace: What is asked of it.
            plan: Its size.
            on_answer: Called with the number of prompts answered so far.
        """
        self._trace = trace
        self._plan = plan
        self._on_answer = on_answer
        size = trace.block_tokens
        self._workers = [_Worker(number, plan, size) for number in range(plan.num_workers)]
        self._by_id = {worker.descriptor.worker_id: worker for worker in self._workers}
        # Every prompt crosses to it; its cost is the same for all, and it is never full.
        decode = _descriptor("decode", Role.DECODE, 1 << 30, size)
        self._decode = Candidate(decode, Load(free_blocks=decode.num_blocks))
        self._view = PrefixView()
        self._expected = ExpectedPrefixes()
        self._constraints = PlacementConstraints(PlacementConfig(path="pd", local_below_tokens=0))
        self._turns = itertools.cycle(self._workers)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self._names: dict[int, BlockHash] = {}
        self._ttft_s: list[float] = []
        self._num_answered = 0
        self._cached_tokens = 0
        self._now_s = 0.0
        for worker in self._workers:
            worker.changes.begin_whole()
            self._view.apply(worker.descriptor.worker_id, Incarnation(1), PrefixChange())
            worker.changes.watch(partial(self._publish_soon, worker))

    def run(self) -> dict[str, float]:
        """Replay the whole trace; returns the figures, by name."""
        self._schedule()
        while self._events:
            self._now_s, _, action = heapq.heappop(self._events)
            action(self._now_s)
        return self._figures()

    # --- time -------------------------------------------------------------------------------------

    def _at(self, time_s: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), action))

    def _schedule(self) -> None:
        """Plan the arrivals; of a session only the first turn, for the next waits for it."""
        rng = random.Random(self._plan.seed)
        sessions: dict[str, deque[TraceRequest]] = {}
        for request in self._trace.requests:
            if request.session:
                sessions.setdefault(request.session, deque()).append(request)
            else:
                self._at(request.arrival_s, partial(self._arrive, request, _ignore))
        start_s = 0.0
        for turns in sessions.values():
            in_order = deque(sorted(turns, key=lambda turn: turn.arrival_s))
            self._at(start_s, partial(self._take_turn, in_order))
            start_s += rng.expovariate(SESSIONS_PER_S)

    def _take_turn(self, turns: deque[TraceRequest], now_s: float) -> None:
        request = turns.popleft()
        gap_s = turns[0].arrival_s - request.arrival_s if turns else 0.0

        def after(done_s: float) -> None:
            if turns:
                self._at(max(now_s + gap_s, done_s), partial(self._take_turn, turns))

        self._arrive(request, after, now_s)

    # --- the router -------------------------------------------------------------------------------

    def _arrive(
        self, request: TraceRequest, on_done: Callable[[float], None], now_s: float
    ) -> None:
        num_full = request.input_tokens // self._trace.block_tokens
        names = [self._name(block) for block in request.hash_ids[:num_full]]
        job = _Job(RunId(RequestId(f"{next(self._numbers)}")), request, names, now_s, on_done)
        worker, uncached_tokens = self._place(job, now_s)
        worker.load.add(job.run_id, uncached_tokens, now_s)
        self._expected.add(job.run_id, worker.descriptor.worker_id, names)
        worker.waiting.append(job)
        if not worker.is_busy:
            self._start(worker, now_s)

    def _place(self, job: _Job, now_s: float) -> tuple[_Worker, int]:
        num_tokens = job.request.input_tokens
        if self._plan.policy is Policy.ROUND_ROBIN:
            return next(self._turns), num_tokens
        if self._plan.policy is Policy.LEAST_QUEUED:
            return self._least_queued(now_s), num_tokens
        names = job.block_hashes[: (num_tokens - 1) // self._trace.block_tokens]
        held = self._view.match(names)
        for worker_id, num_blocks in self._expected.match(names, now_s).items():
            held[worker_id] = max(held.get(worker_id, 0), num_blocks)
        # Placement asks how long a prompt is, not what is in it.
        token_ids = cast("tuple[int, ...]", range(num_tokens))
        placement = choose(
            [*(worker.load.candidate for worker in self._workers), self._decode],
            GenerateRequest(job.run_id, "", token_ids, SamplingParams(), 0, 0.0),
            self._constraints,
            held,
            now_s=now_s,
        )
        return self._by_id[placement.prefill.worker_id], placement.uncached_tokens

    def _least_queued(self, now_s: float) -> _Worker:
        """Choose as a router that knows no caches: whole prompts count, equals go by their id."""
        candidates = [worker.load.candidate for worker in self._workers]
        prediction = Prediction(candidates, 0, 1, {}, now_s)

        def key(c: Candidate) -> tuple[float, WorkerId]:
            return prediction.queued_tokens(c, prediction.tokens_per_s(c)), c.worker_id

        return self._by_id[min(candidates, key=key).worker_id]

    def _name(self, block: int) -> BlockHash:
        name = self._names.get(block)
        if name is None:
            name = BlockHash(len(self._names).to_bytes(8, "little") * 2)
            self._names[block] = name
        return name

    # --- the workers ------------------------------------------------------------------------------

    def _start(self, worker: _Worker, now_s: float) -> None:
        worker.is_busy = bool(worker.waiting)
        if not worker.is_busy:
            return
        job = worker.waiting.popleft()
        num_tokens = worker.begin(job)
        done_s = now_s + num_tokens / self._plan.prefill_tokens_per_s
        self._at(done_s, partial(self._finish, worker, job, num_tokens))

    def _finish(self, worker: _Worker, job: _Job, num_tokens: int, now_s: float) -> None:
        worker.finish(job)
        worker.computed_tokens += num_tokens
        worker.load.measured(num_tokens, num_tokens / self._plan.prefill_tokens_per_s, now_s)
        worker.load.remove(job.run_id, now_s)
        self._expected.answered(job.run_id, now_s)
        self._cached_tokens += job.request.input_tokens - num_tokens
        self._num_answered += 1
        if job.sent_s >= self._plan.warm_up_s:
            self._ttft_s.append(now_s - job.sent_s)
        self._on_answer(self._num_answered)
        job.on_done(now_s)
        self._start(worker, now_s)

    def _publish_soon(self, worker: _Worker) -> None:
        self._at(self._now_s + PUBLISH_S, partial(self._publish, worker))

    def _publish(self, worker: _Worker, _: float) -> None:
        changes = worker.changes
        is_whole = changes.is_whole_due
        if is_whole:
            changes.begin_whole()
            change = PrefixChange(
                worker.pool.registered(range(worker.pool.num_blocks)), is_whole=True
            )
        else:
            change = PrefixChange(*changes.take(len(changes)))
        self._view.apply(worker.descriptor.worker_id, Incarnation(1), change)

    # --- figures ----------------------------------------------------------------------------------

    def _figures(self) -> dict[str, float]:
        num_tokens = sum(request.input_tokens for request in self._trace.requests)
        computed = [worker.computed_tokens for worker in self._workers]
        ordered = sorted(self._ttft_s)

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

        return {
            "token_hit_rate": self._cached_tokens / num_tokens,
            "ideal_token_hit_rate": ideal_hit_rate(self._trace),
            "load_imbalance": max(computed) * len(computed) / sum(computed),
            "ttft_mean_s": sum(ordered) / len(ordered),
            "ttft_p50_s": at(0.5),
            "ttft_p90_s": at(0.9),
            "ttft_p99_s": at(0.99),
        }


def _descriptor(name: str, role: Role, num_blocks: int, block_tokens: int) -> WorkerDescriptor:
    return WorkerDescriptor(
        WorkerId(name), role, Incarnation(1), name, name, "", DIGEST, block_tokens, num_blocks, 0
    )


def _content(block_hash: BlockHash) -> tuple[int]:
    """Stand for a block's tokens: as unlike those of other blocks as its name."""
    return (int.from_bytes(block_hash[:4], "little", signed=True),)
