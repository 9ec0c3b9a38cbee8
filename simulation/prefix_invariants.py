"""What must hold of cached prefixes and of what routers know of them.

Owns the checks:

    C1 a block's name stands for one scope's tokens, and a hit stays within its scope
    C2 once the store has been well for 5 s, each router knows exactly what its workers cache
    C3 a worker that is no member is in no router's view
    C4 the cached tokens of a request's usage are those that its worker found

Does not know faults, nor whether an answer is right: a wrong block shows there (I1).
"""

from __future__ import annotations

import asyncio

from core.block_hash import BlockHash
from core.prefix_changes import StorageTier
from core.types import Path, RequestEnded
from engine.scheduling.sequence import Sequence
from router.placement import Placement
from router.prompt_prefixes import PromptNames
from router.request_state import RequestState
from simulation.cluster import SimCluster
from simulation.observers import ClusterObserver
from simulation.report import Report

SETTLED_S = 5.0
"""How long the store must have been well for views to be exact."""
FORGOTTEN_S = 2.0
"""How long a router that runs may go on naming a worker that has left: while the store fails, it
looks at the members once a second."""


class PrefixWatch(ClusterObserver):
    """Knows which scope every name belongs to, and what each worker found for each run."""

    def __init__(self, cluster: SimCluster, report: Report) -> None:
        """Look on from now; `look` is to be called a few times a second."""
        cluster.observers.join(self)
        self._cluster = cluster
        self._report = report
        self._scopes: dict[BlockHash, str] = {}
        self._found: dict[str, list[int]] = {}
        """Tokens that were found for a run, each time that a worker began it."""
        self._gone_since_s: dict[tuple[str, str], float] = {}

    # --- C1, C4: with every block and every request -----------------------------------------------

    def block_stored(self, node: str, scope: str, name: BlockHash) -> None:
        """C1: nobody else's block has this name."""
        owner = self._scopes.setdefault(name, scope)
        if owner != scope:
            self._report.violated(f"C1 {node}: a block of {scope!r} is named as one of {owner!r}")

    def blocks_found(self, node: str, sequence: Sequence, block_ids: list[int]) -> None:
        """C1: what a sequence builds upon is of its own scope."""
        unit = self._cluster.units[node]
        scope = sequence.request.scope
        for block_id in block_ids:
            name = unit.pool.block_hash(block_id)
            if name is None or self._scopes.get(name) != scope:
                self._report.violated(
                    f"C1 {node}: {sequence.request.request_id} of {scope!r} found a block of "
                    f"{self._scopes.get(name or BlockHash(b''))!r}"
                )
        num_tokens = len(block_ids) * sequence.block_size_tokens
        self._found.setdefault(sequence.request.request_id, []).append(num_tokens)

    def placed(
        self, router: str, run: RequestState, names: PromptNames, placement: Placement
    ) -> None:
        """C1: a router asks for blocks of the request's own scope."""
        scope = run.request.scope
        for name in (name for some in names.values() for name in some):
            if self._scopes.get(name, scope) != scope:
                self._report.violated(
                    f"C1 {router}: {run.run_id} of {scope!r} asks for a block of "
                    f"{self._scopes[name]!r}"
                )
        self._report.led += placement.uncached_tokens < len(run.request.token_ids)

    def request_ended(self, run: RequestState, ended: RequestEnded) -> None:
        """C4: no more and no less than what was found."""
        # Beyond the prompt there may be output that the request came with.
        most = len(run.request.token_ids)
        found = [min(tokens, most) for tokens in self._found.pop(run.run_id, [])]
        cached_tokens = run.usage().cached_tokens
        self._report.hits += cached_tokens > 0
        # Alone on one worker, and begun once: then there is one figure that it can be.
        is_plain = run.placement is not None and run.placement.path is Path.LOCAL
        is_plain = is_plain and ended.error is None and len(run.attempts) == 1 == len(found)
        if cached_tokens not in (found if is_plain else (0, *found)):
            self._report.violated(
                f"C4 {run.run_id}: {cached_tokens} cached tokens are reported, workers found "
                f"{found}"
            )

    # --- C3: now and then -------------------------------------------------------------------------

    def look(self) -> None:
        """C3: entries of the dead match nothing."""
        now_s = asyncio.get_running_loop().time()
        members = {member.worker_id for member in self._cluster.membership.members()}
        known = {
            (router.name, worker): None
            for router in self._cluster.routers
            if router.is_alive and router.name not in self._cluster.paused
            for worker in router.view.workers()
            if worker not in members
        }
        self._gone_since_s = {key: self._gone_since_s.get(key, now_s) for key in known}
        for (router, worker), since_s in self._gone_since_s.items():
            if now_s - since_s > FORGOTTEN_S:
                self._report.violated(
                    f"C3 {router}: {worker} is no member for {FORGOTTEN_S:g} s, and matches still"
                )


def check_views(cluster: SimCluster, report: Report) -> None:
    """C2: nothing is computed, and the store is well for `SETTLED_S`."""
    if not cluster.shape.engine.cache_prefixes:
        return
    for router in cluster.routers:
        num_entries = router.view.workers()
        for node, unit in cluster.units.items():
            worker = unit.descriptor.worker_id
            cached = set(unit.pool.registered(range(unit.pool.num_blocks)))
            missing = [n for n in cached if StorageTier.POOL not in router.view.tiers(worker, n)]
            if missing or num_entries.get(worker, 0) != len(cached):
                report.violated(
                    f"C2 {router.name}: {num_entries.get(worker, 0)} blocks of {node} are known, "
                    f"it caches {len(cached)}, of which {len(missing)} are unknown"
                )
