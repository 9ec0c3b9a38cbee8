"""Hits from host memory and from a disk equal a cold run, token for token, with a real model."""

import asyncio
import random
import time

import pytest
from support.in_process_cluster import InProcessCluster
from support.models import TINY

from core.config import EngineConfig
from core.prefix_changes import StorageTier
from core.session import Role
from core.stored_block import StorageFault
from engine.scheduling.storage_tiers import StorageTiers
from kv_storage.disk import DiskStore
from kv_storage.host import HostStore
from worker import stored_prefixes
from worker.components import TierStore

pytestmark = pytest.mark.sampled(2)

RNG = random.Random(11)
SIZE = 16
PROMPTS = [[RNG.randrange(256) for _ in range(250)] for _ in range(4)]
"""15 full blocks each, of which the pool holds those of two."""
SAMPLED = {"temperature": 0.9, "seed": 3, "n": 2}
NUM_SLOTS = 200


def engine(size=1, block=SIZE):
    return EngineConfig(
        block_size_tokens=block,
        num_blocks=640 // block,
        max_step_tokens=64,
        tensor_parallel_size=size,
    )


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A busy machine must not turn a hit into a computed prompt: that is exact as well."""
    monkeypatch.setattr(stored_prefixes, "MIN_LOAD_WAIT_S", 30.0)
    monkeypatch.setattr(stored_prefixes, "MAX_LOAD_WAIT_S", 30.0)
    monkeypatch.setattr(StorageTiers, "learn", lambda *_: None)


def tiers(folder, *names, key=b"key", num_slots=NUM_SLOTS):
    """Make the storage tiers of each worker, which has a folder of its role."""

    def make(layout, role):
        made = {
            StorageTier.HOST: lambda: HostStore(layout, num_slots),
            StorageTier.DISK: lambda: DiskStore(
                layout, num_slots, folder / role.value, key, time.monotonic
            ),
        }
        return tuple(TierStore(tier, made[tier](), num_slots, 1e12) for tier in names)

    return make


async def answers(stores=lambda layout, role: (), prompts=PROMPTS, rounds=2, **how):
    """Ask for every prompt, again and again; returns the tokens and cached tokens by round."""
    how = {"engine": engine(), "path": "local", **how}
    async with InProcessCluster(TINY, stores=stores, **how) as house:
        got = []
        for _ in range(rounds):
            row = []
            for prompt in prompts:
                for wish in ({}, SAMPLED):
                    reply = await house.ask(prompt, max_tokens=6, ignore_eos=True, **wish)
                    assert reply.ended.error is None
                    row.append((reply.tokens, reply.ended.timing.cached_tokens))
                await at_rest(house)
            got.append(row)
        counts = [unit.stored.tiers.counts for unit in house.units if unit.stored]
        return [[tokens for tokens, _ in row] for row in got], got[-1], counts


async def at_rest(house):
    """Until nothing is copied any more, so that each round finds what the one before wrote."""
    async with asyncio.timeout(60):
        while any(unit.stored and unit.stored._tasks for unit in house.units):
            await asyncio.sleep(0.005)


def first_asked(row):
    """Cached tokens of the first question about each prompt: the second hits the pool."""
    return [cached for _, cached in row[::2]]


BOTH = (StorageTier.HOST, StorageTier.DISK)


@pytest.mark.parametrize("path", ["local", "pd"])
@pytest.mark.parametrize("names", [BOTH[:1], BOTH[1:], BOTH], ids=["host", "disk", "both"])
async def test_stored_blocks_give_the_tokens_of_a_cold_run(tmp_path, names, path):
    cold, row, _ = await answers(path=path)
    assert first_asked(row) == [0] * 4, "the pool alone forgets them"
    got, row, counts = await answers(tiers(tmp_path, *names), path=path)
    assert got == cold
    assert min(first_asked(row)) >= 14 * SIZE
    role_counts = counts[0] if path == "pd" else counts[1]
    assert role_counts.hit_blocks[names[0]] >= 4 * 14
    assert not any(fault is not StorageFault.REPLACED for _, fault in role_counts.faults)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "block"), [(2, 16), (1, 8), (2, 32)])
async def test_every_split_and_block_size(tmp_path, dtype, size, block):
    how = {"engine": engine(size, block), "dtype": dtype}
    cold, _, _ = await answers(**how)
    got, row, _ = await answers(tiers(tmp_path, StorageTier.DISK), **how)
    assert got == cold and min(first_asked(row)) >= 200


async def test_a_pool_on_a_device_loads_what_was_stored(tmp_path):
    how = {"path": "pd", "staged": True}
    cold, _, _ = await answers(**how)

    def prefill_alone(layout, role):
        return tiers(tmp_path, StorageTier.HOST)(layout, role) if role is Role.PREFILL else ()

    got, row, _ = await answers(prefill_alone, **how)
    assert got == cold and min(first_asked(row)) >= 14 * SIZE


async def test_the_next_worker_finds_the_disk_of_the_one_before(tmp_path):
    cold, _, _ = await answers(rounds=1)
    disk = tiers(tmp_path, StorageTier.DISK)
    await answers(disk)
    got, row, counts = await answers(disk, rounds=1)
    assert got == cold
    assert min(first_asked(row)[:2]) >= 14 * SIZE, "from its first request on"
    assert counts[1].hit_blocks[StorageTier.DISK] >= 2 * 14


async def test_another_cluster_key_finds_nothing(tmp_path):
    cold, _, _ = await answers(rounds=1)
    await answers(tiers(tmp_path, StorageTier.DISK))
    got, row, _ = await answers(tiers(tmp_path, StorageTier.DISK, key=b"other"), rounds=1)
    assert got == cold and first_asked(row) == [0] * 4


@pytest.mark.parametrize("harm", ["flipped", "truncated", "reordered"])
async def test_harmed_files_change_no_token(tmp_path, harm):
    cold, _, _ = await answers(rounds=1)
    disk = tiers(tmp_path, StorageTier.DISK)
    await answers(disk)
    [path] = (tmp_path / "decode").rglob("*.kv")
    content = bytearray(path.read_bytes())
    match harm:
        case "flipped":  # a bit of each page behind the table
            for at in range(1 << 16, len(content), 4096):
                content[at + 100] ^= 1
        case "truncated":
            del content[len(content) // 100 :]
        case "reordered":
            half = len(content) // 8192 * 4096
            content[1 << 16 :] = content[half:] + content[1 << 16 : half]
    path.write_bytes(content)
    got, row, counts = await answers(disk, rounds=1)
    assert got == cold
    bad = {StorageFault.DAMAGED, StorageFault.TRUNCATED, StorageFault.FOREIGN}
    assert sum(n for (_, fault), n in counts[1].faults.items() if fault in bad) > 0
    assert max(first_asked(row)) < 15 * SIZE
