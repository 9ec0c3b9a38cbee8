"""Blocks kept below the pool, on virtual time: what is loaded is exact, what fails is computed."""

import asyncio

import pytest
from support.virtual import ask, run, unit

from core.config import EngineConfig, PlacementConfig
from core.prefix_changes import StorageTier
from core.session import Role
from core.stored_block import StorageFault
from core.types import SamplingParams

SIZE = 4
ENGINE = EngineConfig(block_size_tokens=SIZE, num_blocks=40, max_step_tokens=32, max_sequences=8)
PROMPTS = [tuple(range(1 + i, 81 + i)) for i in range(4)]
"""Each fills half of the pool."""
HOST = {"host_blocks": 200}
DISK = {"disk_blocks": 200}
BOTH = {"host_blocks": 30, "disk_blocks": 200}


def tiered(scenario, **shape):
    return run(scenario, **{"engine": ENGINE, **shape})


async def ask_all(cluster, prompts=PROMPTS, **sampling):
    """One after the other; returns the tokens of each, and how many were cached."""
    got = []
    for number, prompt in enumerate(prompts):
        tokens, ended = await ask(cluster, f"r{number}-{cluster.num_steps}", prompt, **sampling)
        assert ended.error is None
        got.append((tokens, ended.timing.cached_tokens))
    return got


def computed(prompts=PROMPTS, **sampling):
    return [tokens for tokens, _ in tiered(lambda c: ask_all(c, prompts, **sampling))]


def stored(cluster, role=Role.PREFILL):
    return unit(cluster, role).stored.tiers


@pytest.mark.parametrize("shape", [HOST, DISK, BOTH], ids=["host", "disk", "both"])
@pytest.mark.parametrize("path", ["pd", "local"])
def test_what_the_pool_evicted_is_loaded_and_changes_no_token(shape, path):
    async def scenario(cluster):
        first = await ask_all(cluster)
        second = await ask_all(cluster)
        role = Role.PREFILL if path == "pd" else Role.DECODE
        return first, second, stored(cluster, role).counts

    placement = PlacementConfig(path=path)
    first, second, counts = tiered(scenario, **shape, placement=placement)
    expected = computed()
    assert [tokens for tokens, _ in first] == expected
    assert [tokens for tokens, _ in second] == expected
    # All but the last token's block: 80 tokens are 20 blocks, of which 19 may be cached.
    assert [cached for _, cached in second] == [19 * SIZE] * 4
    assert sum(counts.hit_blocks.values()) >= 4 * 15
    assert set(counts.faults) <= {(t, StorageFault.REPLACED) for t in StorageTier}


def test_without_tiers_the_same_prompts_are_computed_again():
    async def scenario(cluster):
        await ask_all(cluster)
        return await ask_all(cluster)

    assert [cached for _, cached in tiered(scenario)] == [0] * 4


def test_a_disk_outlives_its_worker():
    async def scenario(cluster):
        await ask_all(cluster)
        node = next(n for n, u in cluster.units.items() if u.descriptor.role is Role.PREFILL)
        await cluster.kill(node)
        await cluster.add(Role.PREFILL)
        await asyncio.sleep(1.0)
        return await ask_all(cluster, PROMPTS[:1]), stored(cluster).counts

    (second, *_), counts = tiered(scenario, **DISK)
    assert second == (computed()[0], 19 * SIZE)
    assert counts.hit_blocks == {StorageTier.DISK: 19}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda content: content[:-1], StorageFault.TRUNCATED),
        (lambda content: bytes([content[0] ^ 1]) + content[1:], StorageFault.DAMAGED),
    ],
    ids=["truncated", "flipped"],
)
def test_a_damaged_block_is_computed_and_counted(change, fault):
    async def scenario(cluster):
        await ask_all(cluster)
        tiers = stored(cluster)
        disk = next(iter(cluster.disks.values()))
        # The sixth block of the first prompt: five before it stand.
        [slot] = [
            slot
            for slot, (block, _, _) in disk.slots.items()
            if block.depth == 5 and block.tokens[:4] == (21).to_bytes(4, "little")
        ]
        disk.damage(slot, change)
        again = await ask_all(cluster, PROMPTS[:1])
        return again, tiers.counts

    [again], counts = tiered(scenario, **DISK)
    assert again == (computed()[0], 5 * SIZE)
    assert counts.faults[StorageTier.DISK, fault] == 1


def test_a_foreign_block_in_a_slot_is_computed():
    async def scenario(cluster):
        await ask_all(cluster)
        disk = next(iter(cluster.disks.values()))
        slots = list(disk.slots)
        # Every slot holds what another should hold.
        disk.slots = dict(zip(slots, [disk.slots[s] for s in reversed(slots)], strict=True))
        return await ask_all(cluster), stored(cluster).counts

    again, counts = tiered(scenario, **DISK)
    assert [tokens for tokens, _ in again] == computed()
    assert counts.faults[StorageTier.DISK, StorageFault.FOREIGN] == 4
    assert not counts.hit_blocks


def test_a_full_disk_costs_hits_alone():
    async def scenario(cluster):
        for disk in cluster.disks.values():
            disk.write_fault = lambda: StorageFault.NO_SPACE
        await ask_all(cluster)
        return await ask_all(cluster), stored(cluster).counts

    again, counts = tiered(scenario, **DISK)
    assert [tokens for tokens, _ in again] == computed()
    assert counts.faults[StorageTier.DISK, StorageFault.NO_SPACE] > 0
    assert not counts.hit_blocks


NUM_STORED = 19
"""Blocks of a prompt on the disk."""


def test_a_load_that_takes_longer_than_computing_is_not_waited_for():
    async def scenario(cluster):
        await ask_all(cluster)
        began_at = cluster.clock.now_s()
        await ask(cluster, "fast", PROMPTS[0], max_tokens=1)
        took_s = cluster.clock.now_s() - began_at
        for disk in cluster.disks.values():
            disk.copy_s = 0.2
        await ask_all(cluster, PROMPTS[1:])
        began_at = cluster.clock.now_s()
        tokens, ended = await ask(cluster, "slow", PROMPTS[0])
        slow_s = cluster.clock.now_s() - began_at
        await asyncio.sleep(8 * 0.2)  # what was being read when it was too late
        num_held = unit(cluster, Role.PREFILL).pool.num_held
        return took_s, slow_s, tokens, ended, stored(cluster).counts, num_held

    took_s, slow_s, tokens, ended, counts, num_held = tiered(scenario, **DISK)
    assert num_held == 0, "what nobody waits for any more holds no blocks"
    assert ended.error is None and tokens == computed()[0]
    assert counts.num_late >= 1
    assert slow_s < NUM_STORED * 0.2, "the load was not waited for"


def test_once_loads_were_slow_computing_is_chosen_at_once():
    async def scenario(cluster):
        await ask_all(cluster)
        tiers = stored(cluster)
        for tier in tiers.tiers.values():
            tier.block_s = 1.0
        reads = [disk.num_read for disk in cluster.disks.values()]
        again = await ask_all(cluster)
        assert reads == [disk.num_read for disk in cluster.disks.values()]
        return again, tiers.counts

    again, counts = tiered(scenario, **DISK)
    assert [tokens for tokens, _ in again] == computed()
    assert counts.num_computed_instead >= 3 and not counts.hit_blocks


@pytest.mark.parametrize("delay_s", [0.005, 0.02, 0.05, 0.5, 0.7])
def test_ranks_that_die_during_a_load_leave_nothing_of_it(delay_s):
    """Whatever the load wrote lies in memory that is gone, or in blocks nobody else has."""

    async def scenario(cluster):
        await ask_all(cluster)
        node = next(n for n, u in cluster.units.items() if u.descriptor.role is Role.PREFILL)
        for disk in cluster.disks.values():
            disk.copy_s = 0.05
        tasks = [
            asyncio.get_running_loop().create_task(ask(cluster, f"x{i}", prompt, max_tokens=20))
            for i, prompt in enumerate(PROMPTS)
        ]
        await asyncio.sleep(delay_s)
        cluster.runners[node].die_between_steps()
        got = await asyncio.gather(*tasks)
        again = await ask_all(cluster, max_tokens=20)
        return got, again

    got, again = tiered(scenario, **DISK)
    expected = computed(max_tokens=20)
    assert [tokens for tokens, ended in got if ended.error is None] == expected
    assert [tokens for tokens, _ in again] == expected


def test_a_request_that_is_cancelled_while_its_blocks_are_loaded_leaves_nothing():
    async def scenario(cluster):
        await ask_all(cluster)
        for disk in cluster.disks.values():
            disk.copy_s = 0.02
        params = SamplingParams(max_tokens=12, temperature=0.0)
        request = cluster.request("gone", PROMPTS[0], params, timeout_s=0.05)
        await cluster.generate(request)
        unit(cluster, Role.PREFILL).pool.check()
        stored(cluster).check()
        return stored(cluster).counts

    tiered(scenario, **DISK)  # `run` checks that nothing is held or copied at the end


def test_others_go_on_while_a_prompt_is_loaded():
    async def scenario(cluster):
        await ask_all(cluster)
        for disk in cluster.disks.values():
            disk.copy_s = 0.01
        tiers = stored(cluster)
        slow = asyncio.get_running_loop().create_task(ask(cluster, "slow", PROMPTS[0]))
        await asyncio.sleep(0.02)
        assert tiers.num_loading > 0
        tokens, ended = await ask(cluster, "short", (90, 91, 92), max_tokens=2)
        assert ended.error is None and tiers.num_loading > 0
        return await slow

    tokens, ended = tiered(scenario, **DISK)
    assert ended.error is None and tokens == computed()[0]


def test_scopes_share_nothing_in_the_tiers():
    async def scenario(cluster):
        await ask_all(cluster)
        params = SamplingParams(max_tokens=12, temperature=0.0)
        request = cluster.request("other", PROMPTS[0], params, scope="another tenant")
        events = await cluster.generate(request)
        return events[-1], stored(cluster).counts

    ended, counts = tiered(scenario, **DISK)
    assert ended.error is None and ended.timing.cached_tokens == 0 and not counts.hit_blocks
