"""The prefix index shows what each storage tier of a worker holds, on virtual time."""

import asyncio

from core.block_hash import DIGEST_BYTES, BlockHash, block_hashes, root_hash
from core.clocks import LoopClock
from core.ids import Incarnation, WorkerId
from core.prefix_changes import StorageTier
from core.stored_block import ChainDigest, StoredBlock
from engine.scheduling.block_changes import BlockChanges
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.tier_book import TierBook
from prefix_index.entries import EntryCodec, entry_key
from prefix_index.feed import PrefixFeed
from prefix_index.publisher import Content, PrefixPublisher
from prefix_index.view import PrefixView
from simulation.loop import run_virtual
from simulation.prefix_store import MemoryPrefixStore

CODEC = EntryCodec(entry_key("a secret of sufficient length"))
LIFE = (WorkerId("prefill-a"), Incarnation(1))
SIZE = 4
PROMPT = list(range(40))
POOL, DISK = StorageTier.POOL, StorageTier.DISK


class Worker:
    """A pool of 64 blocks, a disk of 8, and what publishes both."""

    def __init__(self, store):
        pool_changes, disk_changes = BlockChanges(), BlockChanges()
        self.pool = BlockPool(64, pool_changes)
        self.disk = TierBook(8, SIZE, changes=disk_changes)
        contents = {
            POOL: Content(pool_changes, self.pool.registered, 64),
            DISK: Content(disk_changes, self.disk.registered, 8),
        }
        self.publisher = PrefixPublisher(store, LIFE, contents, CODEC, LoopClock())

    def compute(self):
        names = block_hashes(root_hash("m", "t"), PROMPT, SIZE)
        identity = self.pool.remember_root("t")
        taken = self.pool.allocate(len(names))
        for index, (block, name) in enumerate(zip(taken, names, strict=True)):
            own = PROMPT[index * SIZE : (index + 1) * SIZE]
            identity = self.pool.register(block, identity, name, own)
        self.pool.free(taken)
        return names

    def keep(self, name, number):
        block = StoredBlock(ChainDigest(b"p" * 32), bytes([number]), name, 0)
        self.disk.written(self.disk.admit(block, 1, 1, 1.0))


def test_each_storage_tier_is_published_by_itself():
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        me = LIFE[0]
        names = worker.compute()
        worker.keep(names[0], 0)
        feed = PrefixFeed(store, PrefixView(), lambda: {LIFE}, CODEC, LoopClock())
        tasks = [asyncio.create_task(one.run()) for one in (worker.publisher, feed)]
        await asyncio.sleep(1.0)
        # From the whole content.
        assert feed.view.tiers(me, names[0]) == (POOL, DISK)
        assert feed.view.tiers(me, names[1]) == (POOL,)
        # From batches.
        worker.keep(names[1], 1)
        await asyncio.sleep(0.1)
        assert feed.view.tiers(me, names[1]) == (POOL, DISK)
        # The pool's loss takes nothing from the disk.
        worker.pool.drop_cache()
        await asyncio.sleep(1.0)
        assert feed.view.tiers(me, names[0]) == (DISK,)
        assert feed.view.match(names) == {me: 2}
        for index in range(8):
            worker.keep(BlockHash(bytes([index]) * DIGEST_BYTES), 10 + index)
        await asyncio.sleep(0.1)
        assert feed.view.match(names) == {}, "others took their slots"
        assert feed.view.num_entries == 8
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run_virtual(main())
