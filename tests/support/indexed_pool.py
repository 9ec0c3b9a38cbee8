"""Workers whose pools a prefix index follows, without anything that serves.

Owns the pool with its publisher, and a feed that reads what they write.
"""

import asyncio
from contextlib import asynccontextmanager

from core.block_hash import block_hashes, root_hash
from core.clocks import LoopClock
from core.ids import Incarnation, WorkerId
from core.prefix_changes import StorageTier
from engine.scheduling.block_changes import BlockChanges
from engine.scheduling.block_pool import BlockPool
from prefix_index.entries import EntryCodec, entry_key
from prefix_index.feed import PrefixFeed
from prefix_index.publisher import Content, PrefixPublisher
from prefix_index.view import PrefixView

KEY = entry_key("a secret of sufficient length")
ROOT = root_hash("m", "t")
SIZE = 4
TURN_S = 0.1
"""More than a batch and its reading take."""


class Worker:
    """A pool with a publisher; `compute` fills blocks as a finished prompt would."""

    def __init__(self, store, name="prefill-a", incarnation=1, num_blocks=64, max_changes=1000):
        self.life = (WorkerId(name), Incarnation(incarnation))
        self.changes = BlockChanges(max_changes)
        self.pool = BlockPool(num_blocks, self.changes)
        self.publisher = PrefixPublisher(
            store,
            self.life,
            {StorageTier.POOL: Content(self.changes, self.pool.registered, num_blocks)},
            EntryCodec(KEY),
            LoopClock(),
        )

    def compute(self, tokens):
        hashes = block_hashes(ROOT, tokens, SIZE)
        identity = self.pool.remember_root("t")
        taken = self.pool.allocate(len(hashes))
        for index, (block, name) in enumerate(zip(taken, hashes, strict=True)):
            own = tokens[index * SIZE : (index + 1) * SIZE]
            identity = self.pool.register(block, identity, name, own)
        self.pool.free(taken)
        return hashes

    @property
    def found(self):
        return set(self.pool.registered(range(self.pool.num_blocks)))


@asynccontextmanager
async def following(*workers, store, key=KEY):
    """Publishers and one feed, running; yields the feed and the set of members."""
    members = {worker.life for worker in workers}
    feed = PrefixFeed(store, PrefixView(), lambda: members, EntryCodec(key), LoopClock())
    tasks = [asyncio.create_task(one.run()) for one in (*(w.publisher for w in workers), feed)]
    try:
        await asyncio.sleep(1.0)
        yield feed, members
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def agrees(feed, *workers):
    """The view holds exactly what the workers would find."""
    for worker in workers:
        for name in worker.found:
            assert worker.life[0] in feed.view.match([name])
    assert feed.view.num_entries == sum(len(worker.found) for worker in workers)
