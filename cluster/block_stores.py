"""The storage tiers of a real worker, as its config has them.

Owns their composition and sizes. Does not know which blocks go there.
"""

from __future__ import annotations

import time
from pathlib import Path

from core.block_hash import hash_key
from core.config import BatonConfig, EngineConfig
from core.errors import ModelLoadError
from core.kv_layout import KVLayout
from core.ports import BlockStore
from core.prefix_changes import StorageTier
from core.session import Role
from engine.scheduling.block_changes import BlockChanges
from kv_storage.disk import DiskStore, slots_for
from kv_storage.host import HostStore
from process.shared_memory import available_bytes
from worker.components import TierStore

HOST_BYTES_PER_S = 2e9
DISK_BYTES_PER_S = 5e8
"""Assumed until a load was measured."""


def make_stores(
    config: BatonConfig,
    engine: EngineConfig,
    role: Role,
    layout: KVLayout,
    *,
    is_published: bool,
) -> tuple[TierStore, ...]:
    """Make the tiers that the config gives room for at least one block.

    Args:
        config: Of the cluster.
        engine: Of the worker's pool.
        role: The worker's.
        layout: Of its KV.
        is_published: The prefix index shows what the tiers hold.

    Raises:
        ModelLoadError: There is not so much memory.
    """
    cache = config.prefix_cache
    if not engine.cache_prefixes or not exports_kv(engine, role):
        return ()
    made: list[tuple[StorageTier, BlockStore, int, float, int]] = []
    if num_slots := cache.host_bytes // layout.block_bytes:
        _check_memory(cache.host_bytes)
        host = HostStore(layout, num_slots)
        made.append((StorageTier.HOST, host, num_slots, HOST_BYTES_PER_S, 1))
    if cache.disk_bytes and (num_slots := slots_for(layout, cache.disk_bytes)):
        key = hash_key(config.security.cluster_key)
        folder = Path(cache.disk_folder).expanduser()
        disk = DiskStore(layout, num_slots, folder, key, time.monotonic)
        made.append((StorageTier.DISK, disk, num_slots, DISK_BYTES_PER_S, cache.disk_min_uses))
    return tuple(
        TierStore(
            tier,
            store,
            num_slots,
            bytes_per_s,
            min_uses=min_uses,
            pin_uses=cache.pin_uses,
            max_pinned=int(num_slots * cache.pinned_share),
            changes=BlockChanges() if is_published else None,
        )
        for tier, store, num_slots, bytes_per_s, min_uses in made
    )


def exports_kv(engine: EngineConfig, role: Role) -> bool:
    """Return True if a worker's own process can read what its ranks compute.

    A device copies it to the worker's memory for hand-overs alone: for every step of every answer
    it would cost more than a prefix that is fetched or loaded now and then saves.
    """
    return engine.device == "cpu" or role is Role.PREFILL


def _check_memory(host_bytes: int) -> None:
    """Refuse what would get some process killed when it is touched, perhaps hours later."""
    left_bytes = available_bytes()
    if left_bytes is not None and host_bytes > left_bytes:
        raise ModelLoadError(
            f"prefix_cache.host_bytes is {host_bytes}, and this machine has {left_bytes} bytes of "
            "memory left; lower it"
        )
