"""Sizes and settings of a simulated cluster.

Owns them and their defaults. Does not know nodes, loads or faults.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.block_hash import hash_key
from core.config import (
    EngineConfig,
    PlacementConfig,
    RouterConfig,
    TierConfig,
    TransferConfig,
    default_tiers,
)

VOCABULARY = 97
"""Each token is one character."""
CLUSTER_KEY = "the secret of a simulated cluster"
HASH_KEY = hash_key(CLUSTER_KEY)


@dataclass(slots=True)
class ClusterShape:
    """Sizes of a simulated cluster."""

    prefill: int = 2
    decode: int = 2
    routers: int = 1
    engine: EngineConfig = field(
        default_factory=lambda: EngineConfig(
            block_size_tokens=4, num_blocks=64, max_step_tokens=32, max_sequences=16
        )
    )
    router: RouterConfig = field(default_factory=RouterConfig)
    placement: PlacementConfig = field(
        default_factory=lambda: PlacementConfig(path="auto", local_below_tokens=12)
    )
    transfer: TransferConfig = field(default_factory=lambda: TransferConfig(frame_bytes=4096))
    tiers: dict[str, TierConfig] = field(default_factory=default_tiers)
    has_quota_store: bool = True
    """False: each router counts alone."""
    layers: int = 3
    step_s: float = 0.008
    token_s: float = 0.0005
    latency_s: tuple[float, float] = (0.0001, 0.002)
    max_model_len: int = 200
    max_message_bytes: int | None = None
    spawn_s: float = 0.05
    load_s: float = 0.45
    host_blocks: int = 0
    """Blocks that each worker keeps in host memory below its pool; 0: no such tier."""
    disk_blocks: int = 0
    """The same on a disk, which the next worker of the role takes over."""
    copy_block_s: float = 0.0002
    """To copy a block out of the pool or into it."""
    slow: float = 1.0
    """How many times slower the first decode worker is than the others."""
