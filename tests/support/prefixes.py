"""A view of the prefix cache without an index: what the pools hold at this moment, or a lie.

Owns the view, and how a test makes one worker the holder and another one the chosen. Called by the
tests under `tests/simulation` and `tests/component`.
"""

from core.ids import RunId
from router.prompt_prefixes import PromptPrefixes
from simulation.shape import HASH_KEY


class PoolsView:
    """A `HeldBlocks` over workers of this process."""

    is_empty = False

    def __init__(self, workers):
        """`workers()` are those that live."""
        self.workers = workers
        self.claims = {}
        """Leading blocks by worker id, whatever the pool says."""

    def match(self, block_hashes):
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


def follow(cluster):
    """Let the routers of a simulated cluster see what its workers hold."""
    view = PoolsView(lambda: list(cluster.units.values()))
    for router in cluster.routers:
        router.attempts._prefixes = PromptPrefixes(view, HASH_KEY, cluster.clock)
    return view


def make_busy(sessions, *names, num_tokens=1_000_000, now_s=0.0):
    """Let a router think that it has sent these workers much; they are chosen for nothing."""
    for session in sessions.all():
        if session.descriptor.worker_id in names:
            session._load.add(RunId("busy"), num_tokens, now_s)
