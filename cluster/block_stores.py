"""The storage tiers of a real worker, as its config has them.

Owns their composition, their sizes, and what is refused of both. Does not know which blocks go
there.
"""

from __future__ import annotations

import time
from pathlib import Path

from core.block_hash import hash_key
from core.config import BatonConfig, EngineConfig, PrefixCacheConfig
from core.errors import ConfigError, ModelLoadError
from core.kv_layout import KVLayout
from core.ports import BlockStore
from core.prefix_changes import StorageTier
from core.session import Role
from engine.scheduling.block_changes import BlockChanges
from kv_storage.disk import DiskStore, check_writable, disk_block_bytes
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
    """Make the tiers that the config gives room; touches no file yet.

    Args:
        config: Of the cluster.
        engine: Of the worker's pool.
        role: The worker's.
        layout: Of its KV.
        is_published: The prefix index shows what the tiers hold.

    Raises:
        ConfigError: As `check_tiers`, but for the folder.
        ModelLoadError: There is not so much memory.
    """
    cache = config.prefix_cache
    if not _has_tiers(engine, role):
        return ()
    _check_room(cache, role, layout)
    made: list[tuple[StorageTier, BlockStore, int, float, int]] = []
    if num_slots := cache.host_bytes // layout.block_bytes:
        _check_memory(cache.host_bytes)
        host = HostStore(layout, num_slots)
        made.append((StorageTier.HOST, host, num_slots, HOST_BYTES_PER_S, 1))
    if num_slots := cache.disk_bytes // disk_block_bytes(layout):
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


def check_tiers(
    cache: PrefixCacheConfig, engine: EngineConfig, role: Role, layout: KVLayout
) -> None:
    """Refuse room for less than a block, and a folder that cannot be written to.

    A worker that runs is less strict: it leaves a disk alone that refuses, and tries again.

    Raises:
        ConfigError: Names the setting.
    """
    if not _has_tiers(engine, role):
        return
    _check_room(cache, role, layout)
    if cache.disk_bytes:
        try:
            check_writable(Path(cache.disk_folder).expanduser())
        except OSError as error:
            raise ConfigError(
                f"prefix_cache.disk_folder is {cache.disk_folder}, which cannot be written to: "
                f"{error.strerror}; name a folder of this user on a local disk, or set "
                "prefix_cache.disk_bytes to 0"
            ) from error


def _check_room(cache: PrefixCacheConfig, role: Role, layout: KVLayout) -> None:
    for name, num_bytes, block_bytes in (
        ("host_bytes", cache.host_bytes, layout.block_bytes),
        ("disk_bytes", cache.disk_bytes, disk_block_bytes(layout)),
    ):
        if 0 < num_bytes < block_bytes:
            raise ConfigError(
                f"prefix_cache.{name} is {num_bytes}, and one block of a {role.value} worker's KV "
                f"takes {block_bytes} bytes there; raise it, or set it to 0 for none"
            )


def _has_tiers(engine: EngineConfig, role: Role) -> bool:
    return engine.cache_prefixes and exports_kv(engine, role)


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
