"""Which storage tiers a worker gets by its config."""

import asyncio
from pathlib import Path

import pytest

from cluster import block_stores
from cluster.block_stores import make_stores
from core.config import BatonConfig, EngineConfig, load_config
from core.errors import ConfigError, ModelLoadError
from core.kv_layout import KVLayout
from core.prefix_changes import StorageTier
from core.session import Role
from kv_storage.disk import disk_block_bytes

ROOT = Path(__file__).parents[3]
LAYOUT = KVLayout("m", "uint8", 2, 1, 64, 4)


def tiers(engine=None, role=Role.DECODE, *, is_published=False, **cache):
    config = BatonConfig.model_validate({"prefix_cache": cache})
    stores = make_stores(config, engine or EngineConfig(), role, LAYOUT, is_published=is_published)
    for one in stores:
        asyncio.run(one.store.close())
    return stores


def test_there_are_none_unless_they_are_given_room():
    assert tiers() == ()


def test_a_budget_in_bytes_becomes_whole_slots(tmp_path):
    host, disk = tiers(
        host_bytes=10 * LAYOUT.block_bytes + 5,
        disk_bytes=1 << 20,
        disk_folder=str(tmp_path),
        disk_min_uses=2,
        pinned_share=0.3,
    )
    assert (host.tier, host.num_slots, host.min_uses, host.max_pinned) == (
        StorageTier.HOST,
        10,
        1,
        3,
    )
    assert (disk.tier, disk.min_uses) == (StorageTier.DISK, 2)
    # A slot takes whole pages, its record, and a share of the header.
    assert (1 << 20) // (4096 * 4) < disk.num_slots < (1 << 20) // 4096
    assert host.changes is None and not list(tmp_path.iterdir()), "nothing is touched yet"
    (host,) = tiers(host_bytes=1 << 20, is_published=True)
    assert host.changes is not None


def test_a_pool_on_a_device_has_tiers_on_prefill_workers_alone():
    device = EngineConfig(device="cuda")
    assert tiers(device, Role.DECODE, host_bytes=1 << 20) == ()
    assert len(tiers(device, Role.PREFILL, host_bytes=1 << 20)) == 1


def test_without_a_prefix_cache_nothing_is_kept():
    assert tiers(EngineConfig(cache_prefixes=False), host_bytes=1 << 20) == ()


def test_more_memory_than_there_is_is_refused(monkeypatch):
    monkeypatch.setattr(block_stores, "available_bytes", lambda: 1 << 20)
    assert len(tiers(host_bytes=1 << 20)) == 1
    with pytest.raises(ModelLoadError, match="host_bytes is 1048577.* 1048576 bytes .*lower it"):
        tiers(host_bytes=(1 << 20) + 1)


def test_a_disk_needs_a_folder():
    with pytest.raises(ConfigError, match="disk_folder is empty; name a folder"):
        load_config(flags={"prefix_cache.disk_bytes": 1}, environment={})


def test_the_documented_room_is_what_the_stores_take():
    """Every row of the table: its model's KV, and what 1 GiB holds of it."""
    text = (ROOT / "docs" / "prefix-index.md").read_text()
    part = text.partition("### How much room")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 3
    for _, layers, heads, size, dtype, *told in rows:
        layout = KVLayout("m", dtype.strip(), int(layers), int(heads), int(size), 16)
        token_bytes = layout.block_bytes // 16
        in_host = (1 << 30) // layout.block_bytes * 16
        in_disk = (1 << 30) // disk_block_bytes(layout) * 16
        assert [int(n.replace(",", "")) for n in told] == [token_bytes, in_host, in_disk]
        extra_bytes = disk_block_bytes(layout) - layout.block_bytes
        assert extra_bytes == pytest.approx(8.5 * 1024, rel=0.06)
