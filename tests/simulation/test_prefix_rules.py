"""The prefix index from pool to view, on virtual time, over a store that fails and forgets."""

import asyncio
import random

import pytest
from support.indexed_pool import KEY, SIZE, TURN_S, Worker, agrees, following

from core.block_hash import DIGEST_BYTES, BlockHash
from core.clocks import LoopClock
from core.prefix_changes import PrefixChange
from prefix_index import publisher as publisher_module
from prefix_index.entries import Batch, EntryCodec
from prefix_index.feed import PrefixFeed
from prefix_index.view import PrefixView
from simulation.loop import run_virtual
from simulation.prefix_store import MemoryPrefixStore, Mishap

PROMPT = list(range(40))


def test_stored_and_evicted_blocks_are_seen_within_50_ms():
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store, num_blocks=16)
        async with following(worker, store=store) as (feed, _):
            hashes = worker.compute(PROMPT)
            await asyncio.sleep(0.05)
            assert feed.view.match(hashes) == {worker.life[0]: 10}
            worker.compute([n + 1000 for n in PROMPT])
            await asyncio.sleep(0.05)
            assert feed.view.match(hashes) == {worker.life[0]: 6}
            worker.pool.drop_cache()
            await asyncio.sleep(1.0)
            assert feed.view.match(hashes) == {} and feed.view.num_entries == 0
            assert not feed.refused

    run_virtual(main())


def test_a_router_that_comes_later_reads_the_whole_content():
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        worker.compute(PROMPT)
        async with following(worker, store=store):
            hashes = worker.compute([9, *PROMPT])
            await asyncio.sleep(TURN_S)
            second = PrefixFeed(
                store, PrefixView(), lambda: {worker.life}, EntryCodec(KEY), LoopClock()
            )
            await second.read()
            assert second.view.match(hashes) == {worker.life[0]: 10}
            agrees(second, worker)

    run_virtual(main())


def test_a_batch_that_lay_in_the_store_is_shown_as_lag_and_one_from_before_is_not():
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        worker.compute(PROMPT)
        async with following(worker, store=store) as (feed, _):
            worker.compute([9, *PROMPT])
            await asyncio.sleep(TURN_S)
            assert 0.0 < feed.lag_s < 0.05
            later = PrefixFeed(
                store, PrefixView(), lambda: {worker.life}, EntryCodec(KEY), LoopClock()
            )
            await later.read()
            await later.read()
            assert later.view.num_entries and later.report()["lag_s"] == 0.0, "old, and not late"
            worker.compute([8, *PROMPT])
            await asyncio.sleep(0.7)
            await later.read()
            assert 0.6 < later.report()["lag_s"] < 0.75
            await asyncio.sleep(11.0)
            assert later.lag_s == 0.0

    run_virtual(main())


def test_what_is_old_is_no_lag_however_many_reads_it_takes(monkeypatch):
    """A store gives so many entries a read; a router that reads a whole content again has old ones
    before it."""

    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        async with following(worker, store=store):
            for n in range(5):
                worker.compute([n, *PROMPT])
                await asyncio.sleep(TURN_S)
            read = store.read_log

            async def read_one(positions, wait_s):
                return {life: log[:1] for life, log in (await read(positions, wait_s)).items()}

            monkeypatch.setattr(store, "read_log", read_one)
            await asyncio.sleep(5.0)
            later = PrefixFeed(
                store, PrefixView(), lambda: {worker.life}, EntryCodec(KEY), LoopClock()
            )
            num_reads = 0
            while later.view.num_entries < worker.pool.num_cached:
                await later.read()
                num_reads += 1
            assert num_reads > 2
            assert later.lag_s == 0.0

    run_virtual(main())


@pytest.mark.parametrize("mode", ["down", "slow"])
def test_a_store_that_was_away_is_up_to_date_5_s_after_its_return(mode):
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        async with following(worker, store=store) as (feed, _):
            worker.compute(PROMPT)
            await asyncio.sleep(TURN_S)
            store.mode = mode
            hashes = worker.compute([9, *PROMPT])
            await asyncio.sleep(60.0)
            assert store.num_refused > 10 and feed.state == "down" and feed.age_s > 50
            assert feed.view.num_entries == 10, "the view stays as it was"
            store.mode = "ok"
            await asyncio.sleep(5.0)
            assert feed.view.match(hashes) == {worker.life[0]: 10}
            assert feed.state == "ok" and feed.age_s < 1
            agrees(feed, worker)

    run_virtual(main())


@pytest.mark.parametrize("call", ["append", "read_log"])
def test_a_bug_at_either_end_is_logged_and_the_index_goes_on(monkeypatch, caplog, call):
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        async with following(worker, store=store) as (feed, _):
            whole = getattr(store, call)
            bitten = []

            async def broken(*arguments):
                if not bitten:
                    bitten.append(call)
                    raise ValueError("a bug of ours")
                return await whole(*arguments)

            monkeypatch.setattr(store, call, broken)
            worker.compute(PROMPT)
            await asyncio.sleep(5.0)
            assert bitten
            agrees(feed, worker)
            assert worker.found and feed.state == "ok"

    run_virtual(main())
    assert any("failed" in record.message and record.exc_info for record in caplog.records)


def test_an_emptied_store_is_filled_again_within_5_s():
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        async with following(worker, store=store) as (feed, _):
            worker.compute(PROMPT)
            await asyncio.sleep(TURN_S)
            store.empty()
            hashes = worker.compute([9, *PROMPT])
            await asyncio.sleep(5.0)
            agrees(feed, worker)
            late = PrefixFeed(
                store, PrefixView(), lambda: {worker.life}, EntryCodec(KEY), LoopClock()
            )
            await late.read()
            assert late.view.match(hashes) == {worker.life[0]: 10}

    run_virtual(main())


@pytest.mark.parametrize("mishap", [Mishap.LOST, Mishap.SWAPPED, Mishap.ANSWER_LOST])
def test_a_batch_that_is_lost_or_late_is_noticed_by_its_number_and_made_good(mishap):
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        async with following(worker, store=store) as (feed, _):
            store.mishaps[mishap] = 1
            worker.compute(PROMPT)
            await asyncio.sleep(TURN_S)
            worker.compute([9, *PROMPT])
            await asyncio.sleep(5.0)
            assert +store.happened == {mishap: 1} and feed.num_gaps >= 1
            agrees(feed, worker)

    run_virtual(main())


def test_a_batch_that_was_lost_is_noticed_by_the_one_behind_it():
    """Between two renewals, after which the newest batch is where it should be."""

    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        async with following(worker, store=store) as (feed, _):
            await asyncio.sleep(0.3)
            store.mishaps[Mishap.LOST] = 1
            worker.compute(PROMPT)
            await asyncio.sleep(0.04)
            worker.compute([9, *PROMPT])
            await asyncio.sleep(5.0)
            assert +store.happened == {Mishap.LOST: 1}
            agrees(feed, worker)

    run_virtual(main())


def test_each_gap_in_a_log_is_counted_once_and_what_is_behind_it_applied():
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        async with following(worker, store=store) as (feed, _):
            last = feed.num_batches + 1  # the whole content that a worker begins with is number 1
            found = []
            for number in (last + 2, last + 3, last + 5):
                change = PrefixChange([BlockHash(bytes([number]) * DIGEST_BYTES)])
                store.forge(worker.life, EntryCodec(KEY).batch(worker.life, Batch(number, change)))
                await asyncio.sleep(0.01)
                found.append((feed.num_gaps, feed.view.num_entries))
            return found

    assert run_virtual(main()) == [(1, 1), (1, 2), (2, 3)]


def test_a_pool_that_is_lost_while_the_publisher_rests_is_published_at_once():
    """Nothing came or went of which a batch could tell: it is the whole content that is due."""

    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        async with following(worker, store=store) as (feed, _):
            await asyncio.sleep(TURN_S)
            worker.compute(PROMPT)
            await asyncio.sleep(publisher_module.BATCH_S / 2)
            assert feed.view.num_entries == 10
            worker.pool.drop_cache()
            await asyncio.sleep(0.05)
            return feed.view.num_entries

    assert run_virtual(main()) == 0


def test_a_batch_that_was_lost_is_noticed_by_an_idle_worker_too():
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        async with following(worker, store=store) as (feed, _):
            store.mishaps[Mishap.LOST] = 1
            worker.compute(PROMPT)
            await asyncio.sleep(5.0)
            assert +store.happened == {Mishap.LOST: 1}
            agrees(feed, worker)

    run_virtual(main())


def test_a_batch_that_comes_twice_or_late_is_not_applied_over_what_came_after_it():
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store, num_blocks=16)
        async with following(worker, store=store) as (feed, _):
            worker.compute(PROMPT)
            await asyncio.sleep(TURN_S)
            old = store.log_of(worker.life)[-1][1]
            worker.compute([n + 1000 for n in PROMPT])
            await asyncio.sleep(TURN_S)
            agrees(feed, worker)
            store.forge(worker.life, old)
            await asyncio.sleep(1.0)
            agrees(feed, worker)

    run_virtual(main())


def test_more_changes_than_are_kept_make_one_whole_content():
    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store, max_changes=8)
        async with following(worker, store=store) as (feed, _):
            num_wholes = worker.publisher.num_wholes
            worker.compute(PROMPT)
            await asyncio.sleep(1.0)
            assert worker.publisher.num_wholes == num_wholes + 1
            agrees(feed, worker)

    run_virtual(main())


def test_the_log_never_outgrows_what_is_kept_of_it(monkeypatch):
    monkeypatch.setattr(publisher_module, "MAX_BATCHES_SINCE_WHOLE", 5)

    async def main():
        store = MemoryPrefixStore()
        worker = Worker(store)
        async with following(worker, store=store) as (feed, _):
            num_wholes = worker.publisher.num_wholes
            for turn in range(20):
                worker.compute([turn, *PROMPT[:8]])
                await asyncio.sleep(TURN_S)
            assert worker.publisher.num_wholes >= num_wholes + 3
            assert feed.num_gaps == 0 and feed.num_wholes == 1, "who follows needs no whole"
            agrees(feed, worker)

    run_virtual(main())


@pytest.mark.parametrize("seed", range(15))
def test_whatever_happens_to_the_store_the_view_agrees_5_s_later(seed):
    rng = random.Random(seed)

    async def main():
        store = MemoryPrefixStore()
        workers = [Worker(store, f"w{n}", num_blocks=24, max_changes=30) for n in range(3)]
        async with following(*workers, store=store) as (feed, _):
            for _ in range(60):
                kind = rng.randrange(12)
                worker = rng.choice(workers)
                if kind < 6:
                    worker.compute([rng.randrange(3) for _ in range(SIZE * rng.randrange(1, 6))])
                elif kind == 6:
                    store.mode = rng.choice(["down", "slow", "ok", "ok"])
                elif kind == 7:
                    store.empty()
                elif kind == 8:
                    store.mishaps[rng.choice(list(Mishap))] += 1
                elif kind == 9:
                    worker.pool.drop_cache()
                else:
                    store.forge(worker.life, rng.randbytes(rng.randrange(60)))
                await asyncio.sleep(rng.choice([0.0, 0.01, 0.1, 2.0]))
            store.mode = "ok"
            store.mishaps.clear()
            await asyncio.sleep(6.0)
            agrees(feed, *workers)

    run_virtual(main())
