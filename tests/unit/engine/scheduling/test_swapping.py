"""Preempted sequences and storage tiers: written ahead, pinned, loaded back or computed."""

import asyncio
from types import SimpleNamespace

import pytest
from support.stepping import request

from core.kv_layout import KVLayout
from core.prefix_changes import StorageTier
from core.stored_block import StorageFault
from engine.scheduling.block_origins import BlockOrigins
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_tables import Limits
from engine.scheduling.events import BlocksReserved, Sampled, SwapInBegun
from engine.scheduling.order import ArrivalOrder
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Status
from engine.scheduling.step_planner import Step
from engine.scheduling.storage_tiers import StorageTiers, Tier
from engine.scheduling.tier_book import TierBook
from simulation.hash_runner import HashModel, MemoryKV

SIZE = 4
HOST = StorageTier.HOST
LONG = {"max_tokens": 60, "ignore_eos": True}


class Engine:
    """A scheduler over the hash model with one tier, stepped and copied by hand."""

    def __init__(self, num_blocks=24, num_slots=64, block_s=0.0, order=None):
        layout = KVLayout("m", "uint8", 2, 1, 8, SIZE)
        self.pool = BlockPool(num_blocks)
        origins = BlockOrigins(num_blocks, layout.content_digest)
        limits = Limits(SIZE, 32, 8, 400)
        self.scheduler = Scheduler(
            self.pool, limits, layout.content_digest, order=order, origins=origins
        )
        self.kv = MemoryKV(layout, num_blocks)
        self.layout = layout
        self.model = HashModel(layout, self.kv, 50, self._wait, lambda plan: 0.0)
        self.book = TierBook(num_slots, SIZE)
        scheduler = self.scheduler
        self.tiers = StorageTiers(
            self.pool,
            scheduler.tables,
            origins,
            {HOST: Tier(self.book, block_s)},
            scheduler.blocks.preempted_next,
        )
        scheduler.swapping.use(self.tiers)
        self.slots = {}
        self.tokens = {}
        self.plan = None

    async def _wait(self, seconds):
        return None

    def sequence(self, name, prompt, tier="standard", **sampling):
        wish = request(name, prompt, tier, **{**LONG, **sampling})
        return self.scheduler.new_sequence(wish, 1, tuple(range(wish.sampling.n)), (), 0.0)

    def submit(self, *args, **sampling):
        sequence = self.sequence(*args, **sampling)
        self.scheduler.submit(sequence)
        return sequence

    def views(self, block_id):
        return [self.kv.view(layer, block_id, 0) for layer in range(self.layout.num_layers)]

    def write(self):
        """Copy what leaves next, to the end."""
        num_written = 0
        while writings := self.tiers.pick_writes(5):
            for writing in writings:
                self.slots[writing.entry.slot] = list(map(bytes, self.views(writing.block_id)))
                self.tiers.end_write(writing, None)
            num_written += len(writings)
        return num_written

    def read(self, loading, faults=None):
        """Copy a load's blocks into the pool; returns how many are there."""
        sources = zip(loading.block_ids, loading.sources, strict=True)
        for block_id, (_, entry) in sources:
            for view, taken in zip(self.views(block_id), self.slots[entry.slot], strict=True):
                view[:] = taken
        return self.tiers.end_load(loading, faults or [None] * len(loading.sources))

    def step(self):
        """Plan and execute; returns the loads that begin."""
        self.plan = plan = self.scheduler.plan(0.0)
        begun = [e.loading for e in self.scheduler.take_events() if isinstance(e, SwapInBegun)]
        result = asyncio.run(self.model.execute(plan, lambda *_: None))
        for event in self.scheduler.commit(plan, result, 0.0):
            assert isinstance(event, Sampled)
            out = self.tokens.setdefault((event.sequence.request.request_id, event.choice), [])
            assert event.position == len(out)
            out.append(event.token.token_id)
        self.check()
        return begun

    def check(self):
        self.pool.check()
        self.tiers.check()

    def run(self):
        """Step to the end, writing and loading as a worker does."""
        while self.scheduler.has_work or self.scheduler.arriving:
            self.write()
            for loading in self.step():
                self.read(loading)
                self.scheduler.swapping.end(loading)
        assert self.pool.num_held == self.tiers.num_awaited == self.book.num_swapped == 0
        return self.tokens


def preempted(engine, num_tokens=13, num_lost=None, **sampling):
    """Preempt a sequence of so many computed tokens, whose blocks were written out.

    Its last `num_lost` full blocks leave the pool; None: all of them.
    """
    sequence = engine.submit("a", range(1, 11), **sampling)
    while sequence.num_computed_tokens < num_tokens:
        engine.step()
    # As if the pool were full: then blocks of running sequences are looked at.
    hog = engine.pool.allocate(engine.pool.num_free)
    engine.write()
    engine.scheduler.preempt(sequence)
    engine.check()
    num_left = engine.pool.num_cached - num_lost if num_lost else 0
    engine.pool.free(engine.pool.allocate(engine.pool.num_available - num_left))
    engine.pool.free(hog)
    assert engine.pool.num_cached == num_left
    return sequence


def alone(**sampling):
    engine = Engine(num_blocks=200)
    engine.submit("a", range(1, 11), **sampling)
    return engine.run()


def test_blocks_of_a_running_sequence_are_written_while_it_runs_once_the_pool_is_short():
    engine = Engine()
    sequence = engine.submit("a", range(1, 11))
    while sequence.num_computed_tokens < 13:
        engine.step()
    assert engine.write() == 0, "half of the pool is free"
    engine.pool.allocate(engine.pool.num_free)
    assert engine.write() == 3 and engine.write() == 0
    assert sequence.status is Status.RUNNING and engine.book.num_swapped == 0


def test_who_would_be_preempted_first_is_written_first():
    engine = Engine(num_blocks=40)
    old, young = (engine.submit(name, [n] * 10) for n, name in enumerate(("old", "young"), 1))
    engine.step()
    full = {s: s.block_table[:2] for s in (old, young)}
    assert engine.scheduler.blocks.preempted_next(9) == full[young] + full[old]
    assert engine.scheduler.blocks.preempted_next(3) == full[young] + full[old][:1]
    # Its client does not read.
    old.credit = 0
    assert engine.scheduler.blocks.preempted_next(9) == full[old] + full[young]


def test_a_preempted_sequence_goes_on_behind_the_blocks_that_are_loaded():
    engine = Engine()
    sequence = preempted(engine)
    assert engine.book.num_swapped == engine.tiers.num_awaited == 3
    (loading,) = engine.step()
    assert sequence.status is Status.LOADING and engine.plan.items == ()
    assert (len(loading.hits), len(loading.block_ids)) == (0, 3)
    assert engine.book.num_swapped == 0, "held by the load"
    assert engine.read(loading) == 3
    engine.scheduler.swapping.end(loading)
    assert sequence.status is Status.RUNNING and sequence.num_computed_tokens == 12
    engine.step()
    (item,) = engine.plan.items
    assert (item.start, len(item.token_ids)) == (12, 2), "the tail alone is computed"
    assert engine.run() == alone()
    assert engine.tiers.counts.swapped_in_blocks == {HOST: 3}


def test_blocks_that_the_pool_still_has_are_not_loaded():
    engine = Engine()
    sequence = engine.submit("a", range(1, 11))
    while sequence.num_computed_tokens < 13:
        engine.step()
    engine.scheduler.preempt(sequence)
    assert engine.step() == [] and sequence.status is Status.RUNNING
    assert engine.plan.items[0].start == 12
    assert engine.run() == alone()


def test_only_what_the_pool_has_lost_is_loaded():
    engine = Engine()
    sequence = preempted(engine, num_lost=1)
    hits = engine.scheduler.tables.find_prefix(sequence)
    (loading,) = engine.step()
    assert (sequence.block_table[:2], len(loading.block_ids)) == (hits, 1)
    assert engine.read(loading) == 1
    engine.scheduler.swapping.end(loading)
    assert sequence.num_computed_tokens == 12
    engine.step()
    assert len(engine.scheduler.tables.find_prefix(sequence)) == 3, "others find it, too"
    assert engine.run() == alone()


def test_a_swap_in_loads_no_more_than_half_of_the_pool():
    """A store that hangs keeps what is loaded for ever."""
    engine = Engine()
    sequence = preempted(engine, num_tokens=57)
    (loading,) = engine.step()
    assert len(loading.block_ids) == 12 < sequence.num_tokens // SIZE
    engine.scheduler.swapping.end(loading)
    assert engine.pool.num_available == 12
    # While it hangs nothing more is loaded.
    engine.scheduler.cancel(sequence)
    other = engine.submit("b", range(2, 12))
    engine.step()
    assert engine.write() == 2
    engine.scheduler.preempt(other)
    engine.pool.free(engine.pool.allocate(engine.pool.num_available))
    assert engine.step() == [] and engine.plan.items[0].start == 0
    engine.read(loading)
    engine.run()


@pytest.mark.parametrize("num_read", [0, 2])
def test_what_fails_to_come_is_computed(num_read):
    engine = Engine()
    preempted(engine)
    (loading,) = engine.step()
    assert engine.read(loading, [None] * num_read + [StorageFault.DAMAGED]) == num_read
    engine.scheduler.swapping.end(loading)
    engine.step()
    assert engine.plan.items[0].start == num_read * SIZE
    assert engine.run() == alone()


def test_one_whose_blocks_are_late_gives_them_up_and_is_computed():
    """A thread may still write to them."""
    engine = Engine()
    sequence = preempted(engine)
    (loading,) = engine.step()
    engine.scheduler.swapping.end(loading)
    assert sequence.status is Status.WAITING and engine.pool.num_held == 3
    assert engine.step() == [] and engine.plan.items[0].start == 0
    assert set(sequence.block_table).isdisjoint(loading.block_ids)
    assert engine.read(loading) == 0 and engine.pool.num_held == len(sequence.block_table)
    assert not engine.tiers.counts.swapped_in_blocks, "nobody went on with them"
    assert engine.run() == alone()


def test_one_that_is_cancelled_while_it_loads_leaves_its_blocks_to_the_load():
    engine = Engine()
    sequence = preempted(engine)
    (loading,) = engine.step()
    engine.scheduler.cancel(sequence)
    assert engine.pool.num_held == 3
    assert engine.read(loading) == 0
    engine.scheduler.swapping.end(loading)
    assert sequence.is_finished and engine.pool.num_held == engine.tiers.num_loading == 0
    engine.check()


def test_a_pool_that_lost_its_memory_takes_nothing_of_a_swap_in():
    engine = Engine()
    sequence = preempted(engine)
    (loading,) = engine.step()
    assert engine.scheduler.fail_all() == [sequence]
    assert engine.read(loading) == 0
    assert engine.pool.num_held == engine.pool.num_cached == engine.tiers.num_awaited == 0


def test_one_that_is_cancelled_while_it_waits_pins_nothing_any_more():
    engine = Engine()
    engine.scheduler.cancel(preempted(engine))
    assert engine.book.num_swapped == engine.tiers.num_awaited == 0
    engine.check()


def test_what_is_cheaper_to_compute_is_computed():
    engine = Engine(block_s=5.0)
    sequence = preempted(engine)
    engine.scheduler.swapping._budget = SimpleNamespace(token_s=1.0)
    assert engine.step() == [] and sequence.status is Status.RUNNING
    assert engine.tiers.counts.num_computed_instead == 1
    assert engine.run() == alone()


def test_a_load_does_not_begin_in_a_step_that_copies_from_a_block_that_may_be_free():
    """It would write to that block before the ranks have read it."""
    engine = Engine()
    sequence = preempted(engine)
    start = engine.scheduler._planner._start
    assert not start(sequence, Step(0.0, 9, copies=[(3, 5)]))
    assert sequence.status is Status.WAITING and engine.pool.num_held == 0
    assert not start(sequence, Step(0.0, 9)) and sequence.status is Status.LOADING


@pytest.mark.parametrize("sampling", [{}, {"n": 3, "temperature": 1.0, "presence_penalty": 0.5}])
def test_many_that_take_each_others_blocks_get_the_tokens_of_a_large_pool(sampling):
    def all_of(num_blocks):
        engine = Engine(num_blocks)
        for n in range(4):
            engine.submit(f"r{n}", range(n, n + 10), max_tokens=24, **sampling)
        return engine, engine.run()

    tight, tokens = all_of(30)
    roomy, expected = all_of(400)
    assert tokens == expected
    assert roomy.scheduler.num_preemptions == 0 < tight.scheduler.num_preemptions
    assert tight.tiers.counts.swapped_in_blocks[HOST] > 0


@pytest.mark.parametrize("arrives", [False, True], ids=["prompt", "hand-over"])
def test_batch_work_is_swapped_out_for_a_chat_within_one_step(arrives):
    """The plan after the chat's arrival gives it what the batch sequence had: no step between."""
    engine = Engine(num_blocks=16, order=ArrivalOrder({"batch": 60.0}))
    batch = engine.submit("batch", range(1, 21), "batch", max_tokens=40)
    while batch.num_computed_tokens < 41:
        engine.step()
        engine.write()
    chat = engine.sequence("chat", range(30, 60), max_tokens=2)
    needed = engine.scheduler.tables.blocks_for(chat.num_tokens)
    assert needed > engine.pool.num_available, "blocks are short"
    num_preemptions = engine.scheduler.num_preemptions

    (engine.scheduler.submit_arrival if arrives else engine.scheduler.submit)(chat)
    engine.scheduler.reserve_in_turn(0.0)
    plan = engine.scheduler.plan(0.0)

    assert batch.status is Status.WAITING and batch.block_table == []
    assert engine.scheduler.num_preemptions == num_preemptions + 1
    assert engine.book.num_swapped == batch.num_swapped_blocks == 10, "output included"
    (event, *others) = engine.scheduler.take_events() or [None]
    if arrives:
        assert isinstance(event, BlocksReserved) and event.sequence is chat and not others
        assert chat.status is Status.ARRIVING
    else:
        assert [item.sequence_key for item in plan.items] == [chat.key]
