"""Who serves a request: a pure function of a snapshot and the request.

Owns the choice of path and workers. Does not know streams, time, or how a cost is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.config import PlacementConfig
from core.errors import NoWorker
from core.ids import Incarnation, WorkerId
from core.session import WorkerDescriptor
from core.types import GenerateRequest, Path
from router.candidate import Candidate
from router.cost import DEFAULT_RULES, Cost, Prediction
from router.path_choice import choose_path
from router.prefix_sources import Fetch, PrefixSources

MAX_SHOWN = 8
"""Workers of each kind whose costs a placement keeps, the cheapest first."""
NOTHING_HELD: Mapping[WorkerId, int] = {}


@dataclass(frozen=True, slots=True)
class Placement:
    """The chosen workers; on path `local` both are the same. And why."""

    path: Path
    prefill: WorkerDescriptor
    decode: WorkerDescriptor
    reason: str
    uncached_tokens: int = 0
    """Of the prompt, to be computed by the worker `prefill`."""
    most_held_blocks: int = 0
    """Leading blocks that the best holder has, whoever was chosen."""
    prefill_costs: tuple[Cost, ...] = ()
    """Of workers that could have computed the prompt for another, the cheapest first."""
    local_costs: tuple[Cost, ...] = ()
    """Of workers that could have done both phases, the cheapest first."""
    fetch: Fetch | None = None
    """What the worker `prefill` should fetch from another, instead of computing it."""

    @property
    def costs(self) -> tuple[tuple[Path, Cost], ...]:
        """All costs that were kept, each with the path on which its worker would have served."""
        across = ((Path.PD, cost) for cost in self.prefill_costs)
        local = ((Path.LOCAL, cost) for cost in self.local_costs)
        return (*across, *local)

    @property
    def predicted_s(self) -> float:
        """Seconds to the first token, as predicted; 0 if the chosen worker's cost was not kept."""
        chosen = self.path, self.prefill.worker_id
        known = (cost.total_s for path, cost in self.costs if (path, cost.worker_id) == chosen)
        return next(known, 0.0)


@dataclass(frozen=True, slots=True)
class PlacementConstraints:
    """What placement needs to know of an attempt besides the request."""

    rules: PlacementConfig = DEFAULT_RULES
    must_be_local: bool = False
    excluded: frozenset[WorkerId] = frozenset()
    incompatible_pairs: frozenset[tuple[Incarnation, Incarnation]] = frozenset()
    """(prefill, decode) pairs whose KV layouts differ."""
    preferred: frozenset[WorkerId] = frozenset()
    """Workers that the request's key used before."""


def choose(
    candidates: Sequence[Candidate],
    request: GenerateRequest,
    constraints: PlacementConstraints,
    held_blocks: Mapping[WorkerId, int] = NOTHING_HELD,
    *,
    now_s: float,
    sources: PrefixSources | None = None,
) -> Placement:
    """Choose path and workers, in one pass over the candidates.

    Excluded workers, which have failed this request, serve it only when no other is left.

    Args:
        candidates: Every worker that can take requests.
        request: Tokenized.
        constraints: Of this attempt.
        held_blocks: How many leading blocks of the prompt each worker is thought to hold.
        now_s: On the clock of the candidates' instants.
        sources: From whom the prompt's beginning could be fetched; None: it is not.

    Raises:
        NoWorker: No worker can take the request on an allowed path.
    """
    prefill, decode = _by_role(candidates, request.model, constraints.excluded)
    prediction = Prediction(
        candidates,
        len(request.token_ids),
        request.sampling.n,
        held_blocks,
        now_s,
        constraints.rules,
        constraints.preferred,
        sources,
    )
    is_single = request.sampling.max_tokens == 1  # of which there is nothing to hand over
    must_be_local = constraints.must_be_local or is_single
    may_cross = not must_be_local and constraints.rules.path != "local"
    pair = _best_pair(prefill, decode, prediction, constraints) if may_cross else None
    if pair is None:
        if constraints.rules.path == "pd" and may_cross:
            note = "their KV layouts differ; " if prefill and decode else ""
            raise _no_worker(candidates, constraints, note)
        pool = decode or prefill
        if not pool:
            raise _no_worker(candidates, constraints)
        if constraints.rules.path == "local":
            reason = "path local is forced"
        elif is_single:
            reason = "a single token is not handed over"
        elif constraints.must_be_local:
            reason = "choices that have output stay together"
        else:
            reason = f"{len(prefill)} prefill and {len(decode)} decode workers match"
        return _local(prediction.local(pool, MAX_SHOWN), prediction, reason, ())
    if constraints.rules.path == "pd":
        return _across(pair, prediction, "path pd is forced", ())
    local = _serving_alone(decode, pair, prediction, constraints)
    across = prediction.cost(pair.sender, pair.receiver.worker_id)
    found = choose_path(across, _local_costs(local, prediction), constraints.rules)
    if found.local is None:
        return _across(pair, prediction, found.reason, local)
    chosen = found.local.worker_id
    best = sorted(local, key=lambda c: c.worker_id != chosen)
    return _local(best, prediction, found.reason, pair.costs)


@dataclass(frozen=True, slots=True)
class _Pair:
    sender: Candidate
    receiver: Candidate
    costs: tuple[Cost, ...]
    """Of the cheapest senders."""


def _across(
    pair: _Pair, prediction: Prediction, reason: str, local: Sequence[Candidate]
) -> Placement:
    return Placement(
        Path.PD,
        pair.sender.descriptor,
        pair.receiver.descriptor,
        reason,
        prediction.uncached_tokens(pair.sender),
        prediction.most_held_blocks,
        pair.costs,
        _local_costs(local, prediction),
        prediction.fetch(pair.sender),
    )


def _local(
    best: Sequence[Candidate], prediction: Prediction, reason: str, across: tuple[Cost, ...]
) -> Placement:
    chosen = best[0].descriptor
    uncached_tokens = prediction.uncached_tokens(best[0])
    costs = _local_costs(best, prediction)
    fetch = prediction.fetch(best[0])
    num_held = prediction.most_held_blocks
    return Placement(
        Path.LOCAL, chosen, chosen, reason, uncached_tokens, num_held, across, costs, fetch
    )


def _local_costs(best: Sequence[Candidate], prediction: Prediction) -> tuple[Cost, ...]:
    return tuple(prediction.cost(c) for c in best)


def _serving_alone(
    decode: Sequence[Candidate],
    pair: _Pair,
    prediction: Prediction,
    constraints: PlacementConstraints,
) -> Sequence[Candidate]:
    """Find the decode workers that could serve a request alone, the best first.

    They compute little, or less than the sender: for a short prompt this is every one of them, for
    a long one the holders of its prefix. And the receiver, at which the fewest sequences decode.
    """
    num_tokens = prediction.uncached_tokens(pair.sender)
    limit = max(constraints.rules.local_below_tokens, num_tokens)
    local = prediction.local(prediction.computing_less(decode, limit), MAX_SHOWN)
    if all(c is not pair.receiver for c in local):
        local = [*local[: MAX_SHOWN - 1], pair.receiver]
    return prediction.with_room(local)


def _by_role(
    candidates: Sequence[Candidate], model: str, excluded: frozenset[WorkerId]
) -> tuple[list[Candidate], list[Candidate]]:
    """Split those that serve the model; drop excluded ones where others are left."""
    serving = [c for c in candidates if c.model == model] if model else candidates
    prefill = [c for c in serving if c.is_prefill]
    decode = [c for c in serving if not c.is_prefill]
    if not excluded:
        return prefill, decode
    return _without(prefill, excluded), _without(decode, excluded)


def _without(pool: list[Candidate], excluded: frozenset[WorkerId]) -> list[Candidate]:
    return [c for c in pool if c.worker_id not in excluded] or pool


def _best_pair(
    prefill: list[Candidate],
    decode: list[Candidate],
    prediction: Prediction,
    constraints: PlacementConstraints,
) -> _Pair | None:
    """Find the cheapest prefill worker that has a partner, and the cheapest of its partners.

    Linear in workers: partners are looked up by layout, of which there are few.
    """
    partners: dict[tuple[str, int], list[Candidate]] = {}
    excluded = constraints.incompatible_pairs
    # Nearly always the cheapest has a partner; all are put in order only if of these none has.
    for number in (MAX_SHOWN, len(prefill)):
        best = prediction.senders(prefill, number)
        for sender in best:
            layout = sender.content_digest, sender.block_size_tokens
            if layout not in partners:
                partners[layout] = _partners(layout, decode)
            receivers = partners[layout]
            if excluded:
                incarnation = sender.descriptor.incarnation
                receivers = [
                    c for c in receivers if (incarnation, c.descriptor.incarnation) not in excluded
                ]
            if receivers:
                receiver = prediction.receiver(sender, receivers)
                shown = best[:MAX_SHOWN]
                costs = tuple(prediction.cost(c, receiver.worker_id) for c in shown)
                return _Pair(sender, receiver, costs)
    return None


def _partners(sender: tuple[str, int], decode: Sequence[Candidate]) -> list[Candidate]:
    """Find the workers that KV of one layout can go to: blocks may be joined, or cut up."""
    digest, size = sender
    same = [c for c in decode if c.content_digest == digest]
    sizes = {c.block_size_tokens for c in same}
    fitting = {other for other in sizes if max(size, other) % min(size, other) == 0}
    return same if fitting == sizes else [c for c in same if c.block_size_tokens in fitting]


def _no_worker(
    candidates: Sequence[Candidate], constraints: PlacementConstraints, note: str = ""
) -> NoWorker:
    roles = [c.descriptor.role.value for c in candidates]
    return NoWorker(
        f"no worker for path {constraints.rules.path}: {roles.count('prefill')} prefill and "
        f"{roles.count('decode')} decode workers are live; {note}try again, or raise "
        "pools.*.replicas"
    )
