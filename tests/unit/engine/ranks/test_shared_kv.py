"""A pool that no memory is there for is refused in words before anything is started."""

import os

import pytest
import torch
from support.process_cluster import ROOT

from core.config import EngineConfig
from core.errors import ModelLoadError
from engine.checkpoint.model_spec import read_model
from engine.ranks import rank, rank_group
from process import shared_memory as segments


@pytest.mark.parametrize(
    ("meminfo", "limit", "used", "left"),
    [
        ("MemFree: 1 kB\nMemAvailable:   2048 kB\n", "", "", 2 << 20),
        ("MemAvailable: 2048 kB\n", "max", "4096", 2 << 20),
        ("MemAvailable: 2048 kB\n", "1048576", "4096", (1 << 20) - 4096),
        ("MemAvailable: 2048 kB\n", "4096", "8192", 0),
        ("", "", "", None),
    ],
)
def test_memory_is_what_machine_and_container_have_left(tmp_path, meminfo, limit, used, left):
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(meminfo)
    if limit:
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text(used + "\n")
    assert segments.available_bytes(tmp_path) == left


def test_a_pool_without_memory_is_refused_with_the_largest_that_fits(monkeypatch):
    spec = read_model(ROOT / "models" / "baton-tiny", "float32", 0, "")

    def check(num_blocks):
        rank_group.RankGroup(spec, EngineConfig(num_blocks=num_blocks)).check_memory()

    block_bytes = spec.layout(EngineConfig().block_size_tokens, 1).pool_bytes(1)
    monkeypatch.setattr(rank_group, "available_bytes", lambda: 100 * block_bytes + 1)
    check(100)
    with pytest.raises(ModelLoadError) as refused:
        check(101)
    assert str(101 * block_bytes) in refused.value.message
    assert f"{100 * block_bytes + 1} bytes of memory left" in refused.value.message
    assert refused.value.message.endswith("lower engine.num_blocks to at most 100")
    monkeypatch.setattr(rank_group, "available_bytes", lambda: None)
    check(101)


@pytest.mark.parametrize(("free_blocks", "loads"), [((100,), 0), ((101, 100), 1)])
def test_a_pool_without_memory_on_its_gpu_is_refused_before_it_is_made(
    monkeypatch, free_blocks, loads
):
    """Before the weights are loaded if it cannot fit at all, else when they have taken theirs."""
    spec = read_model(ROOT / "models" / "baton-tiny", "float32", 0, "")
    engine = EngineConfig(num_blocks=101, device="cuda", threads=torch.get_num_threads())
    setup = rank_group.RankGroup(spec, engine)._setup | {"rank": 0}
    block_bytes = spec.layout(engine.block_size_tokens, 1).pool_bytes(1)
    gpu = torch.device("cuda", 1)
    free_bytes = [blocks * block_bytes for blocks in free_blocks]
    asked, loaded = [], []
    monkeypatch.setattr(rank, "_device", lambda kind, index: gpu)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (asked.append(device), (free_bytes.pop(0), 0))[1]
    )
    monkeypatch.setattr("engine.model.model.Model", lambda *_: loaded.append(1))
    kv_fd = segments.create_segment(101 * block_bytes)
    with pytest.raises(ModelLoadError) as refused:
        rank._load(setup, kv_fd, memoryview(b""))
    os.close(kv_fd)
    assert (len(loaded), set(asked), free_bytes) == (loads, {gpu}, [])
    assert f"cuda:1 has {100 * block_bytes} bytes of memory left" in refused.value.message
    assert refused.value.message.endswith("lower engine.num_blocks to at most 100")
    assert rank._free_bytes(torch.device("cpu")) is None, "the worker has asked"
