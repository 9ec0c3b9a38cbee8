"""A request placed on the workers as this router knows them now.

Owns the questions behind one choice: who is there, what each holds of the prompt, and who could
send it. Does not know how costs are compared, or what becomes of a placement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.ports import Clock
from core.types import GenerateRequest
from router.candidate import Candidate
from router.peer_fetches import PeerFetches
from router.placement import Placement, PlacementConstraints, choose
from router.pool_choice import PoolChoice
from router.prompt_prefixes import PromptNames, PromptPrefixes


class Placer:
    """Asks the same for a request that is sent and for one that is only explained."""

    def __init__(
        self,
        read_candidates: Callable[[], Sequence[Candidate]],
        pools: PoolChoice,
        prefixes: PromptPrefixes,
        fetches: PeerFetches,
        clock: Clock,
    ) -> None:
        """Choose among `read_candidates()`, those of them that a request's tier may use."""
        self._read_candidates = read_candidates
        self._pools = pools
        self._prefixes = prefixes
        self._fetches = fetches
        self._clock = clock

    def place(
        self,
        request: GenerateRequest,
        names: PromptNames,
        constraints: PlacementConstraints,
        *,
        may_fetch: bool = True,
    ) -> Placement:
        """Choose path and workers.

        Args:
            request: Tokenized.
            names: Of its prompt's blocks.
            constraints: Of this attempt.
            may_fetch: False: its worker must compute what it lacks.

        Raises:
            NoWorker: No worker can take the request on an allowed path.
        """
        candidates = self._pools.usable(request.tier, self._read_candidates())
        published = self._prefixes.published(names)
        sources = None
        if may_fetch:
            in_pools = self._prefixes.in_pools(names, published)
            sources = self._fetches.sources(candidates, in_pools, constraints)
        held = self._prefixes.held(names, published)
        if self._pools.is_divided:
            usable = {c.worker_id for c in candidates}
            held = {worker: number for worker, number in held.items() if worker in usable}
        now_s = self._clock.now_s()
        return self._pools.place(
            request,
            candidates,
            constraints.excluded,
            lambda some: choose(some, request, constraints, held, now_s=now_s, sources=sources),
        )
