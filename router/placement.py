"""Who serves a request: a pure function of a snapshot and the request.

Owns the choice of path and workers. Does not know streams or time. Called by the orchestrator,
once per attempt.

The cost of a worker is what stands in front of the request: tokens to prefill, sequences and
blocks in use. Never "longest prefix wins": on real traces every request shares block 0, and that
rule sends them all to one worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from core.errors import NoWorker
from core.ids import Incarnation, WorkerId
from core.session import Load, Role, WorkerDescriptor
from core.types import GenerateRequest, Path


@dataclass(frozen=True, slots=True)
class Candidate:
    """One live worker as the router sees it. `pending_tokens` were sent by this router and not answered."""

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
class Wish:
    """What placement needs to know of an attempt besides the request."""

    path: Literal["auto", "pd", "local"]
    local_below_tokens: int
    must_be_local: bool = False
    excluded: frozenset[WorkerId] = frozenset()
    misfits: frozenset[tuple[Incarnation, Incarnation]] = frozenset()
    """(prefill, decode) pairs that found their layouts to differ."""


def choose(candidates: Sequence[Candidate], request: GenerateRequest, wish: Wish) -> Placement:
    """Choose path and workers.

    Excluded workers (they failed this request) are used only when no other is left.

    Raises:
        NoWorker: Nobody can take the request on an allowed path.
    """
    fit = [c for c in candidates if request.model in ("", c.descriptor.model)]
    prefill = _of_role(fit, Role.PREFILL, wish.excluded)
    decode = _of_role(fit, Role.DECODE, wish.excluded)
    pairs = [(p, d) for p in prefill for d in decode if _fits(p.descriptor, d.descriptor, wish)]
    if wish.path == "pd" and not wish.must_be_local:
        note = "their KV layouts differ; " if prefill and decode else ""
        return _pair(pairs, "path pd is forced") if pairs else _nobody(candidates, wish, note)
    if wish.path == "local" or wish.must_be_local:
        reason = (
            "path local is forced"
            if wish.path == "local"
            else "choices with output of their own stay together"
        )
        return _local(decode or prefill, candidates, wish, reason)
    if not pairs:
        return _local(
            decode or prefill,
            candidates,
            wish,
            f"{len(prefill)} prefill and {len(decode)} decode workers match",
        )
    if len(request.token_ids) < wish.local_below_tokens:
        return _local(
            decode,
            candidates,
            wish,
            f"prompt of {len(request.token_ids)} tokens is below {wish.local_below_tokens}",
        )
    return _pair(pairs, "prompt is worth a hand-over")


def _of_role(
    candidates: Sequence[Candidate], role: Role, excluded: frozenset[WorkerId]
) -> list[Candidate]:
    mine = [c for c in candidates if c.descriptor.role is role]
    return [c for c in mine if c.descriptor.worker_id not in excluded] or mine


def _fits(prefill: WorkerDescriptor, decode: WorkerDescriptor, wish: Wish) -> bool:
    """Can KV go from one to the other?"""
    small, large = sorted((prefill.block_size_tokens, decode.block_size_tokens))
    is_alike = prefill.content_digest == decode.content_digest and large % small == 0
    return is_alike and (prefill.incarnation, decode.incarnation) not in wish.misfits


def _pair(pairs: list[tuple[Candidate, Candidate]], reason: str) -> Placement:
    prefill, decode = min(pairs, key=lambda pair: (_prefill_cost(pair[0]), _decode_cost(pair[1])))
    return Placement(Path.PD, prefill.descriptor, decode.descriptor, reason)


def _local(
    pool: list[Candidate], candidates: Sequence[Candidate], wish: Wish, reason: str
) -> Placement:
    if not pool:
        return _nobody(candidates, wish)
    best = min(pool, key=_decode_cost).descriptor
    return Placement(Path.LOCAL, best, best, reason)


def _nobody(candidates: Sequence[Candidate], wish: Wish, note: str = "") -> Placement:
    roles = [c.descriptor.role.value for c in candidates]
    raise NoWorker(
        f"no worker for path {wish.path}: {roles.count('prefill')} prefill and {roles.count('decode')} decode workers "
        f"are live; {note}try again, or raise pools.*.replicas"
    )


def _prefill_cost(c: Candidate) -> tuple[int, int, str]:
    return c.load.waiting_tokens + c.pending_tokens, c.pending_requests, c.descriptor.worker_id


def _decode_cost(c: Candidate) -> tuple[int, int, str]:
    used_blocks = c.descriptor.num_blocks - c.load.free_blocks - c.load.cached_blocks
    running = max(c.load.num_running + c.load.num_waiting, c.pending_requests)
    return running, used_blocks, c.descriptor.worker_id
