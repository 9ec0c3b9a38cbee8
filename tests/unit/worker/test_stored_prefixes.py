"""Copies between a pool and the storage tiers below it: how many at a time, and who waits."""

import asyncio
import logging
from types import SimpleNamespace

import pytest

from core.block_hash import BlockHash
from core.clocks import LoopClock
from core.prefix_changes import StorageTier
from core.stored_block import ChainDigest, StorageFault, StoredBlock
from engine.scheduling.storage_tiers import Loading, TierCounts, Writing
from engine.scheduling.tier_book import Entry
from simulation.loop import run_virtual
from worker.stored_prefixes import MAX_WRITE_BLOCKS, StoredPrefixes

HOST, DISK = StorageTier.HOST, StorageTier.DISK
DAMAGED = StorageFault.DAMAGED


def entry(number):
    block = StoredBlock(ChainDigest(b"p" * 32), b"t", BlockHash(bytes([number])), number)
    return Entry(block, 100 + number, 0.0, 1, 1.0)


class Store:
    """Copies take `copy_s` for each call; the blocks of `faults`, by id, fail."""

    def __init__(self):
        self.copy_s, self.faults, self.calls, self.error = 0.0, {}, [], None
        self.is_closed = False

    async def _copy(self, copies):
        self.calls.append([copy.block_id for copy in copies])
        await asyncio.sleep(self.copy_s)
        if self.error is not None:
            raise self.error
        return [self.faults.get(copy.block_id) for copy in copies]

    async def read(self, copies, kv):
        found = await self._copy(copies)
        num_good = next((i for i, fault in enumerate(found) if fault), len(found))
        return found[: num_good + 1]

    async def write(self, copies, kv, is_still):
        assert all(map(is_still, copies))
        return await self._copy(copies)

    async def close(self):
        self.is_closed = True


class World:
    """Stored prefixes over books that do as they are told and note what was done."""

    def __init__(self):
        self.stores = {HOST: Store(), DISK: Store()}
        self.loading, self.writings = None, []
        self.asked, self.ended, self.learned, self.submitted, self.arrived = [], [], [], [], []
        self.written, self.num_wakes = [], 0
        self.kv = SimpleNamespace(generation=1)
        self.counts = TierCounts()
        tiers = SimpleNamespace(
            counts=self.counts,
            begin_load=lambda sequence, token_s: self.asked.append(token_s) or self.loading,
            end_load=self.end_load,
            learn=lambda *args: self.learned.append(args),
            pick_writes=self.pick_writes,
            end_write=lambda writing, fault: self.written.append((writing.block_id, fault)),
            is_still=lambda writing: True,
        )
        stores = [SimpleNamespace(tier=tier, store=one) for tier, one in self.stores.items()]
        components = SimpleNamespace(stores=stores, kv=self.kv, clock=LoopClock())
        self.scheduler = SimpleNamespace(
            may_grant_blocks=True,
            budget=SimpleNamespace(token_s=0.5),
            note_arrived=lambda blocks: self.arrived.append(list(blocks)),
        )
        self.stored = StoredPrefixes(tiers, components, self.scheduler, self.wake)

    def wake(self):
        self.num_wakes += 1

    def pick_writes(self, max_blocks):
        assert max_blocks == MAX_WRITE_BLOCKS
        picked, self.writings = self.writings, []
        return picked

    def end_load(self, loading, faults):
        self.ended.append(faults)
        return sum(fault is None for fault in faults)

    def load(self, *runs, compute_s=0.5):
        """Load blocks 0, 1, ... in runs of (tier, how many)."""
        tiers = [tier for tier, count in runs for _ in range(count)]
        sources = [(tier, entry(number)) for number, tier in enumerate(tiers)]
        if sources:
            ids = list(range(len(sources)))
            self.loading = Loading(None, [], ids, sources, 0, compute_s)
        self.stored.load(None, lambda: self.submitted.append(asyncio.get_running_loop().time()))


def test_without_anything_to_load_a_prompt_is_submitted_at_once():
    async def main():
        world = World()
        world.load()
        assert world.submitted == [0.0] and world.asked == [0.5]
        world.scheduler.may_grant_blocks = False
        world.load((HOST, 1))
        assert world.submitted == [0.0] * 2 and world.asked == [0.5], "a step reads free blocks"
        await asyncio.sleep(1.0)
        assert world.stores[HOST].calls == world.ended == [] and world.num_wakes == 0

    run_virtual(main())


def test_blocks_are_read_tier_by_tier_and_eight_at_a_time():
    async def main():
        world = World()
        world.stores[HOST].copy_s = 0.02
        world.load((HOST, 10), (DISK, 1), (HOST, 1))
        assert world.submitted == []
        await asyncio.sleep(1.0)
        assert world.stores[HOST].calls == [list(range(8)), [8, 9], [11]]
        assert world.stores[DISK].calls == [[10]]
        steps = [(tier, count, round(took_s, 6)) for tier, count, took_s in world.learned]
        assert steps == [(HOST, 8, 0.02), (HOST, 2, 0.02), (DISK, 1, 0.0), (HOST, 1, 0.02)]
        assert world.ended == [[None] * 12] and world.arrived == [list(range(12))]
        assert world.submitted == [pytest.approx(0.06)], "once, when they are here"
        assert (world.num_wakes, world.counts.num_late) == (1, 0)

    run_virtual(main())


def test_reading_ends_at_the_first_fault_which_is_logged_once_for_each_kind(caplog):
    caplog.set_level(logging.INFO)

    async def main():
        world = World()
        world.stores[HOST].faults = {1: DAMAGED}
        world.load((HOST, 3), (DISK, 1))
        await asyncio.sleep(1.0)
        assert world.ended == [[None, DAMAGED]] and world.arrived == [[0]]
        assert world.stores[DISK].calls == world.learned == []
        first = len(caplog.records)
        world.load((HOST, 3))
        await asyncio.sleep(1.0)
        again = len(caplog.records)
        world.stores[DISK].faults = {0: DAMAGED}
        world.load((DISK, 3))
        await asyncio.sleep(1.0)
        return first, again, len(caplog.records)

    assert run_virtual(main()) == (1, 1, 2)


@pytest.mark.parametrize(
    ("compute_s", "waits_s"), [(0.001, 0.02), (0.5, 0.5), (2.5, 2.0), (0.0, 2.0)]
)
def test_a_prompt_waits_as_long_as_computing_would_take_within_bounds(compute_s, waits_s):
    async def main():
        world = World()
        world.stores[HOST].copy_s = 10.0
        world.load((HOST, 9), compute_s=compute_s)
        await asyncio.sleep(30.0)
        assert world.submitted == [waits_s] and world.counts.num_late == 1
        assert world.stores[HOST].calls == [list(range(8))], "the ninth is not read"
        assert world.ended == [[None] * 8] and world.num_wakes == 1

    run_virtual(main())


@pytest.mark.parametrize("has_read", [False, True])
def test_what_was_read_before_the_memory_was_replaced_is_none(has_read, caplog):
    caplog.set_level(logging.INFO)

    async def main():
        world = World()
        world.stores[HOST].copy_s = 0.1
        world.stores[HOST].error = None if has_read else OSError("gone")
        world.load((HOST, 2))
        await asyncio.sleep(0.05)
        world.kv.generation = 2
        await asyncio.sleep(1.0)
        assert world.ended == [[StorageFault.REPLACED] if has_read else []]
        assert world.arrived == [[]] and world.submitted == [pytest.approx(0.1)]

    run_virtual(main())
    assert len(caplog.records) == (0 if has_read else 1), "a rank that died is no fault of a store"


def writings(tier, *block_ids):
    return [Writing(tier, entry(number), number, 1) for number in block_ids]


def test_blocks_are_written_one_batch_after_the_other_until_there_are_none(caplog):
    async def main():
        world = World()
        world.stores[HOST].copy_s = world.stores[DISK].copy_s = 0.1
        world.stores[DISK].faults = {2: StorageFault.NO_SPACE}
        world.writings = [*writings(HOST, 1, 2), *writings(DISK, 1, 2)]
        world.stored.write_back()
        await asyncio.sleep(0.05)
        world.writings = writings(DISK, 3)
        world.stored.write_back()
        assert world.stores[HOST].calls == [[1, 2]] and world.stores[DISK].calls == []
        await asyncio.sleep(1.0)
        assert world.stores[HOST].calls == [[1, 2]] and world.stores[DISK].calls == [[1, 2], [3]]
        assert world.written == [
            (1, None),
            (2, None),
            (1, None),
            (2, StorageFault.NO_SPACE),
            (3, None),
        ]
        world.writings = writings(HOST, 4)
        world.stored.write_back()
        await world.stored.stop()
        assert world.written[-1] == (4, None), "what is being copied is waited for"
        assert [r.event for r in caplog.records] == ["storage_failed"], "behind one that is fine"
        assert all(store.is_closed for store in world.stores.values())
        world.writings = writings(HOST, 5)
        world.stored.write_back()
        await asyncio.sleep(1.0)
        assert world.stores[HOST].calls == [[1, 2], [4]], "nothing begins any more"

    run_virtual(main())


def test_of_a_store_that_breaks_no_block_is_there_and_the_next_store_is_tried(caplog):
    async def main():
        world = World()
        world.stores[HOST].error = ValueError("a bug")
        world.writings = [*writings(HOST, 1), *writings(DISK, 2)]
        world.stored.write_back()
        await asyncio.sleep(1.0)
        return world.written

    assert run_virtual(main()) == [(1, StorageFault.UNREACHABLE), (2, None)]
    assert "a bug" in caplog.text


def test_copies_that_hang_are_waited_for_five_seconds_when_the_worker_stops():
    async def main():
        world = World()
        world.stores[HOST].copy_s = 60.0
        world.writings = writings(HOST, 1)
        world.stored.write_back()
        await world.stored.stop()
        assert asyncio.get_running_loop().time() == 5.0 and world.stores[HOST].is_closed

    run_virtual(main())
