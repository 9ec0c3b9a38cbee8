"""What all nodes of a simulated cluster share.

Owns the wire, the members, the stores, the ids, the traps and the observers of one run. Does not
know nodes.
"""

from __future__ import annotations

import random

from core.clocks import LoopClock
from core.ids import Ids
from core.kv_layout import KVLayout
from prefix_index.entries import EntryCodec, entry_key
from simulation.block_store import MemoryBlockStore
from simulation.network import Hub
from simulation.observers import Observers
from simulation.ports import MemoryStore, StaticMembership
from simulation.prefix_store import MemoryPrefixStore
from simulation.quota_record import Troubles
from simulation.quota_store import MemoryQuotaStore
from simulation.rare_choices import RareChoices
from simulation.shape import CLUSTER_KEY, ClusterShape
from simulation.sizes import message_bytes
from simulation.traps import Traps

QUOTA_CALL_S = (0.0002, 0.003)
"""Each way."""


class World:
    """Everything that is not on a node."""

    def __init__(self, shape: ClusterShape, seed: int) -> None:
        """Derive all randomness of a run from its seed."""
        self.shape = shape
        self.rng = random.Random(seed)
        # Ids have randomness of their own: one latency more or less must not change them.
        self.ids = Ids(random.Random(seed + 1))
        self.hub = Hub(self.rng, shape.latency_s, shape.max_message_bytes, message_bytes)
        self.membership = StaticMembership()
        self.store = MemoryStore()
        self.prefix_store = MemoryPrefixStore()
        # Quotas have randomness of their own, too: a trial without limits is as it was.
        self.quota_rng = random.Random(f"quotas in {seed}")
        self.quota_ids = Ids(self.quota_rng)
        self.quota_troubles = Troubles(has_store=shape.has_quota_store)
        self.quota_store = MemoryQuotaStore(
            lambda: self.quota_rng.uniform(*QUOTA_CALL_S),
            lambda: self.quota_troubles.note(self.clock.now_s()),
        )
        self.codec = EntryCodec(entry_key(CLUSTER_KEY))
        self.clock = LoopClock()
        self.rare_choices = RareChoices(self.rng)
        self.traps = Traps()
        self.observers = Observers()
        self.disks: dict[str, MemoryBlockStore] = {}
        """By the node that has it, or had it last."""
        self.layout = KVLayout("hash", "uint8", shape.layers, 1, 8, shape.engine.block_size_tokens)
