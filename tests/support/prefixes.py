"""A view of the prefix cache without an index: what the pools hold at this moment, or a lie.

Owns the view, and how a test makes one worker the holder and another one the chosen. Called by the
tests of fetches under `tests/simulation`.
"""

import asyncio

from core.config import EngineConfig, PlacementConfig
from core.ids import RunId
from core.prefix_changes import StorageTier
from core.session import Role
from core.types import SamplingParams
from simulation.shape import HASH_KEY
from support.virtual import ask, run

LONG = tuple(1 + n * 7 % 90 for n in range(150))
TAIL = (*LONG[:140], 3, 1, 4, 1, 5, 9, 2, 6, 5, 3)
"""The same but for its end: 35 blocks of 4 tokens are shared."""
SHARED = 140
ENGINE = EngineConfig(block_size_tokens=4, num_blocks=160, max_step_tokens=64, max_sequences=16)
FETCHES = PlacementConfig(path="pd")
LOCAL = PlacementConfig(path="local")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


class PoolsView:
    """A `PublishedBlocks` over workers of this process."""

    is_empty = False
    has_stored = False

    def __init__(self, workers):
        """`workers()` are those that live."""
        self.workers = workers
        self.claims = {}
        """Leading blocks by worker id, whatever the pool says."""

    def match(self, block_hashes, tier=None):
        found = {}
        for worker in self.workers():
            pool = worker.pool
            known = set(pool.registered(range(pool.num_blocks)))
            num_held = next(
                (at for at, name in enumerate(block_hashes) if name not in known),
                len(block_hashes),
            )
            worker_id = worker.descriptor.worker_id
            num_blocks = self.claims.get(worker_id, num_held)
            if num_blocks:
                found[worker_id] = min(num_blocks, len(block_hashes))
        return found

    def leading_tiers(self, worker, block_hashes):
        return [StorageTier.POOL] * self.match(block_hashes).get(worker, 0)


def look_at(attempts, view, hash_key=HASH_KEY):
    """Let a router's placement see what `view` says; it was composed without one."""
    attempts._prefixes._view = view
    attempts._prefixes._hash_key = hash_key


def follow(cluster):
    """Let the routers of a simulated cluster see what its workers hold."""
    view = PoolsView(lambda: list(cluster.units.values()))
    for router in cluster.routers:
        look_at(router.attempts, view)
    return view


def make_busy(sessions, *names, num_tokens=1_000_000, now_s=0.0):
    """Let a router think that it has sent these workers much; they are chosen for nothing."""
    for session in sessions.all():
        if session.descriptor.worker_id in names:
            session._load.add(RunId("busy"), num_tokens, now_s)


def fetching(scenario, **shape):
    return run(scenario, **{"engine": ENGINE, "placement": FETCHES, "prefill": 2, **shape})


def plain(prompt, **shape):
    """The answer of a cluster that fetches nothing."""
    return run(lambda c: ask(c, prompt=prompt), engine=ENGINE, **shape)[0]


def ids(cluster, role):
    return [u.descriptor.worker_id for u in cluster.units.values() if u.descriptor.role is role]


def by_id(cluster, worker_id):
    return next(u for u in cluster.units.values() if u.descriptor.worker_id == worker_id)


async def held_elsewhere(cluster, role=Role.PREFILL, prompt=LONG):
    """One worker has computed a prompt; those of its role that did not are free, it is not."""
    follow(cluster)
    await ask(cluster, "first", prompt)
    await asyncio.sleep(0.5)
    view = cluster.orchestrator._attempts._prefixes._view
    [holder] = [
        u.descriptor.worker_id
        for u in cluster.units.values()
        if u.descriptor.role is role and u.pool.num_cached
    ]
    make_busy(cluster.sessions, holder)
    return holder, view


def is_frame(message):
    return isinstance(message, bytes) and message[:1] == b"\x05"


def is_between_prefill(stream):
    ends = (stream.node, stream.peer.node)
    return stream.kind == "fetch" and all(node.startswith("prefill") for node in ends)
