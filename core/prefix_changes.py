"""What a worker publishes of its cached blocks.

Owns the storage tiers and the one form in which stored and evicted blocks travel from a worker's
pool to a router's view. Does not know pools, stores or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from core.block_hash import BlockHash


class StorageTier(IntEnum):
    """Where a worker keeps a block; the numbers go over the wire."""

    POOL = 0
    HOST = 1
    DISK = 2

    @property
    def label(self) -> str:
        """As metrics, events and reports name it."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class PrefixChange:
    """What one storage tier of one worker holds more and less than before.

    No hash is in both lists: of a block that came and went within one change, the end counts.
    """

    stored: Sequence[BlockHash] = ()
    evicted: Sequence[BlockHash] = ()
    tier: StorageTier = StorageTier.POOL
    is_whole: bool = False
    """True: `stored` is all that the worker holds in any tier, and what was known is void."""
