"""Entries of the prefix index that nobody, another cluster or an earlier life has written.

On virtual time, over a store in which they lie. They are counted and change nothing.
"""

import asyncio
import random

from support.indexed_pool import KEY, TURN_S, Worker, agrees, following

from core.block_hash import DIGEST_BYTES, BlockHash
from core.clocks import LoopClock
from core.ids import Incarnation
from core.prefix_changes import PrefixChange
from prefix_index.entries import Batch, EntryCodec, entry_key
from prefix_index.feed import PrefixFeed
from prefix_index.view import PrefixView
from simulation.loop import run_virtual
from simulation.prefix_store import MemoryPrefixStore

PROMPT = list(range(40))


def test_entries_of_a_worker_that_is_no_member_are_forgotten_and_not_read():
    async def main():
        store = MemoryPrefixStore()
        workers = [Worker(store, "prefill-a"), Worker(store, "prefill-b")]
        async with following(*workers, store=store) as (feed, members):
            hashes = [worker.compute(PROMPT) for worker in workers][0]
            await asyncio.sleep(TURN_S)
            assert len(feed.view.match(hashes)) == 2
            members.discard(workers[0].life)
            workers[0].compute([9, *PROMPT])
            await asyncio.sleep(1.0)
            assert feed.view.match(hashes) == {workers[1].life[0]: 10}
            reborn = Worker(store, "prefill-a", incarnation=2)
            members.add(reborn.life)
            task = asyncio.create_task(reborn.publisher.run())
            reborn.compute(PROMPT[:8])
            await asyncio.sleep(2.0)
            assert feed.view.match(hashes) == {workers[1].life[0]: 10, reborn.life[0]: 2}
            task.cancel()

    run_virtual(main())


def test_forged_entries_are_counted_and_change_nothing():
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        other = Worker(store, "prefill-b")
        rng = random.Random(1)
        async with following(worker, other, store=store) as (feed, _):
            worker.compute(PROMPT)
            await asyncio.sleep(TURN_S)
            name = BlockHash(b"x" * DIGEST_BYTES)
            fake = EntryCodec(b"guess").batch(worker.life, Batch(10**6, PrefixChange([name])))
            foreign = store.log_of(worker.life)[-1][1]
            for entry in (b"", b"x" * 20, rng.randbytes(500), fake, foreign[:-1], foreign[:-16]):
                store.forge(worker.life, entry)
            store.forge(other.life, foreign)
            await asyncio.sleep(1.0)
            assert feed.refused == {"malformed": 2, "forged": 5}
            assert feed.view.match([name]) == {}
            store.forge(worker.life, foreign)
            await asyncio.sleep(1.0)
            assert feed.refused.total() == 7 and feed.num_gaps == 0, "a repeated batch is known"
            agrees(feed, worker, other)

    run_virtual(main())


def test_a_head_that_another_has_written_is_replaced_for_those_who_come_later():
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        worker.compute(range(12))
        async with following(worker, store=store):
            store._of(worker.life).head = b"?" * 40
            await asyncio.sleep(1.5)
            late = PrefixFeed(
                store, PrefixView(), lambda: {worker.life}, EntryCodec(KEY), LoopClock()
            )
            reading = asyncio.create_task(late.run())
            await asyncio.sleep(2.5)
            agrees(late, worker)
            reading.cancel()

    run_virtual(main())


def test_entries_of_a_workers_earlier_life_are_refused_in_the_log_of_this_one():
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store, incarnation=2)
        async with following(worker, store=store) as (feed, _):
            worker.compute(PROMPT)
            await asyncio.sleep(TURN_S)
            name = BlockHash(b"x" * DIGEST_BYTES)
            earlier = (worker.life[0], Incarnation(1))
            for number in range(20):
                change = PrefixChange([name], worker.pool.registered(range(4)))
                store.forge(worker.life, EntryCodec(KEY).batch(earlier, Batch(number, change)))
            await asyncio.sleep(1.0)
            assert feed.refused == {"forged": 20} and feed.num_gaps == 0
            agrees(feed, worker)

    run_virtual(main())


def test_an_index_of_another_cluster_is_not_taken():
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        async with following(worker, store=store, key=entry_key("another secret.......")) as (
            feed,
            _,
        ):
            worker.compute(PROMPT)
            await asyncio.sleep(1.0)
            assert feed.view.num_entries == 0 and feed.refused["forged"] >= 1

    run_virtual(main())
