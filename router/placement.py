"""Who serves a request: a pure function of a snapshot and the request.

Owns the choice of path and workers. Does not know streams or time.

A worker costs what is ahead of the request there: tokens to prefill, sequences and blocks in use.
Never "longest prefix wins": on real traces every request shares block 0, and that rule sends them
all to one worker.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from core.errors import NoWorker
from core.ids import Incarnation, WorkerId
from core.session import Load, Role, WorkerDescriptor
from core.types import GenerateRequest, Path


@dataclass(frozen=True, slots=True)
class Candidate:
    """One live worker as the router sees it.

    `pending_tokens` are those of prompts that this router has sent and the worker has not answered;
    `pending_requests` are those that this router has there.
    """

    descriptor: WorkerDescriptor
    load: Load
    pending_tokens: int = 0
    pending_requests: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """The chosen workers; on path `local` both are the same."""

    path: Path
    prefill: WorkerDescriptor
    decode: WorkerDescriptor
    reason: str


@dataclass(frozen=True, slots=True)
class PlacementConstraints:
    """What placement needs to know of an attempt besides the request."""

    path: Literal["auto", "pd", "local"]
    local_below_tokens: int
    must_be_local: bool = False
    excluded: frozenset[WorkerId] = frozenset()
    incompatible_pairs: frozenset[tuple[Incarnation, Incarnation]] = frozenset()
    """(prefill, decode) pairs whose KV layouts differ."""


def choose(
    candidates: Sequence[Candidate], request: GenerateRequest, constraints: PlacementConstraints
) -> Placement:
    """Choose path and workers.

    Excluded workers, which have failed this request, serve it only when no other is left.

    Raises:
        NoWorker: No worker can take the request on an allowed path.
    """
    prefill, decode = _by_role(candidates, request.model, constraints.excluded)
    may_cross = not constraints.must_be_local and constraints.path != "local"
    pair = _best_pair(prefill, decode, request, constraints) if may_cross else None
    if constraints.path == "pd" and may_cross:
        if pair is None:
            note = "their KV layouts differ; " if prefill and decode else ""
            raise _no_worker(candidates, constraints, note)
        return Placement(Path.PD, *pair, "path pd is forced")
    size = len(request.token_ids)
    if constraints.path == "local":
        reason = "path local is forced"
    elif constraints.must_be_local:
        reason = "choices that have output stay together"
    elif pair is None:
        reason = f"{len(prefill)} prefill and {len(decode)} decode workers match"
    elif size < constraints.local_below_tokens:
        reason = f"prompt of {size} tokens is below {constraints.local_below_tokens}"
    else:
        return Placement(Path.PD, *pair, "prompt is worth a transfer")
    pool = decode or prefill
    if not pool:
        raise _no_worker(candidates, constraints)
    best = _best_decode(pool, request)
    return Placement(Path.LOCAL, best, best, reason)


def _by_role(
    candidates: Sequence[Candidate], model: str, excluded: frozenset[WorkerId]
) -> tuple[list[Candidate], list[Candidate]]:
    """Split those that serve the model; drop excluded ones where others are left."""
    prefill: list[Candidate] = []
    decode: list[Candidate] = []
    for c in candidates:
        if model in ("", c.descriptor.model):
            (prefill if c.descriptor.role is Role.PREFILL else decode).append(c)
    if not excluded:
        return prefill, decode
    return _without(prefill, excluded), _without(decode, excluded)


def _without(pool: list[Candidate], excluded: frozenset[WorkerId]) -> list[Candidate]:
    return [c for c in pool if c.descriptor.worker_id not in excluded] or pool


def _best_pair(
    prefill: list[Candidate],
    decode: list[Candidate],
    request: GenerateRequest,
    constraints: PlacementConstraints,
) -> tuple[WorkerDescriptor, WorkerDescriptor] | None:
    """Find the cheapest prefill worker that has a partner, and the cheapest of its partners.

    Linear in workers: partners are looked up by layout, of which there are few.
    """
    by_layout: dict[tuple[str, int], list[Candidate]] = {}
    for c in decode:
        by_layout.setdefault(_layout(c.descriptor), []).append(c)
    partners: dict[tuple[str, int], list[Candidate]] = {}
    queue = [(_prefill_cost(c), index) for index, c in enumerate(prefill)]
    # A heap and no sort: nearly always the cheapest has a partner.
    heapq.heapify(queue)
    while queue:
        sender = prefill[heapq.heappop(queue)[1]].descriptor
        layout = _layout(sender)
        if layout not in partners:
            compatible = [pool for other, pool in by_layout.items() if _fits(layout, other)]
            partners[layout] = [c for pool in compatible for c in pool]
        receivers = partners[layout]
        excluded = constraints.incompatible_pairs
        if excluded:
            receivers = [
                c
                for c in receivers
                if (sender.incarnation, c.descriptor.incarnation) not in excluded
            ]
        if receivers:
            return sender, _best_decode(receivers, request)
    return None


def _layout(descriptor: WorkerDescriptor) -> tuple[str, int]:
    return descriptor.content_digest, descriptor.block_size_tokens


def _fits(sender: tuple[str, int], receiver: tuple[str, int]) -> bool:
    """True if KV can go from one to the other."""
    small, large = sorted((sender[1], receiver[1]))
    return sender[0] == receiver[0] and large % small == 0


def _no_worker(
    candidates: Sequence[Candidate], constraints: PlacementConstraints, note: str = ""
) -> NoWorker:
    roles = [c.descriptor.role.value for c in candidates]
    return NoWorker(
        f"no worker for path {constraints.path}: {roles.count('prefill')} prefill and "
        f"{roles.count('decode')} decode workers are live; {note}try again, or raise "
        "pools.*.replicas"
    )


def _prefill_cost(c: Candidate) -> tuple[int, int, WorkerId]:
    return c.load.waiting_tokens + c.pending_tokens, c.pending_requests, c.descriptor.worker_id


def _best_decode(pool: list[Candidate], request: GenerateRequest) -> WorkerDescriptor:
    num_tokens = len(request.token_ids)
    num_choices = request.sampling.n
    return min(pool, key=lambda c: _decode_cost(c, num_tokens, num_choices)).descriptor


def _decode_cost(
    c: Candidate, num_tokens: int, num_choices: int
) -> tuple[bool, int, int, WorkerId]:
    """Order by room first: a worker with few sequences may have no blocks left."""
    descriptor = c.descriptor
    load = c.load
    num_available = load.free_blocks + load.cached_blocks
    num_needed = -(-num_tokens // descriptor.block_size_tokens) + num_choices
    # A report is up to half a second old: what this router has sent there counts at once.
    running = max(load.num_running + load.num_waiting, c.pending_requests)
    used_blocks = descriptor.num_blocks - num_available
    return num_needed > num_available, running, used_blocks, descriptor.worker_id
