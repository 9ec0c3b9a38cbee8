"""What is written below a pool, and what is loaded back for whom; without a byte."""

import pytest

from core.errors import InvariantViolation
from core.prefix_changes import StorageTier
from core.stored_block import StorageFault
from core.types import GenerateRequest, SamplingParams
from engine.scheduling import storage_tiers
from engine.scheduling.block_origins import BlockOrigins
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_tables import Limits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.storage_tiers import StorageTiers, Tier
from engine.scheduling.tier_book import TierBook

SIZE = 4
HOST, DISK = StorageTier.HOST, StorageTier.DISK


class Engine:
    """A pool of 16 blocks with tiers; `compute` makes a prompt's blocks cached."""

    def __init__(self, *, disk_min_uses=1, host_slots=50, weights=None):
        self.pool = BlockPool(16)
        self.origins = BlockOrigins(16, "m", weights=weights)
        self.scheduler = Scheduler(self.pool, Limits(SIZE, 64, 8, 400), "m", origins=self.origins)
        self.tiers = StorageTiers(
            self.pool,
            self.scheduler.tables,
            self.origins,
            {
                DISK: Tier(TierBook(50, SIZE), 0.001, disk_min_uses),
                HOST: Tier(TierBook(host_slots, SIZE), 0.0001),
            },
        )

    def sequence(self, tokens, *, tier="standard", keeps_prefix=False, **sampling):
        request = GenerateRequest(
            "r",
            "",
            tuple(tokens),
            SamplingParams(max_tokens=1, **sampling),
            0,
            1e9,
            tier=tier,
            keeps_prefix=keeps_prefix,
        )
        return self.scheduler.new_sequence(request, 0, (0,), (), 0.0)

    def compute(self, tokens, **how):
        sequence = self.sequence(tokens, **how)
        tables = self.scheduler.tables
        hits = tables.find_prefix(sequence)
        num_new = tables.blocks_for(len(tokens)) - len(hits)
        tables.allocate(sequence, hits, num_new, num_spare=0)
        sequence.num_computed_tokens = len(tokens)
        tables.register(sequence)
        tables.free(sequence)

    def write_all(self):
        written = []
        while writings := self.tiers.pick_writes(3):
            for writing in writings:
                self.tiers.end_write(writing, None)
            written += writings
        return written

    def check(self):
        self.pool.check()
        self.tiers.check()


def prompt(n, blocks=5):
    return [100 * n + i for i in range(blocks * SIZE + 1)]


def full(engine):
    """Two prompts that leave no more than a third of the pool free."""
    engine.compute(prompt(1))
    engine.compute(prompt(2))


def test_nothing_is_written_while_much_is_free():
    engine = Engine()
    engine.compute(prompt(1))
    assert engine.pool.num_free == 11 and engine.tiers.pick_writes(3) == []


@pytest.mark.parametrize(
    ("num_blocks", "ahead", "num_written"), [(8, 99, 0), (9, 99, 9), (12, 4, 0), (13, 4, 4)]
)
def test_blocks_are_written_once_fewer_are_free_than_are_looked_at(
    monkeypatch, num_blocks, ahead, num_written
):
    """Half of the pool at most: of 16 blocks, with 8 free and with 7."""
    monkeypatch.setattr(storage_tiers, "AHEAD_BLOCKS", ahead)
    engine = Engine()
    engine.compute(range(num_blocks * SIZE))
    assert len({w.block_id for w in engine.write_all()}) == num_written


def test_no_more_blocks_are_chosen_once_there_are_as_many_copies_as_asked_for():
    engine = Engine()
    full(engine)
    assert [len(engine.tiers.pick_writes(n)) for n in (3, 4)] == [4, 4], "each to two tiers"


@pytest.mark.parametrize("fault", [StorageFault.FOREIGN, StorageFault.NO_SPACE])
def test_a_block_that_could_not_be_written_leaves_its_slot_unless_a_strangers_file_is_there(fault):
    engine = Engine()
    full(engine)
    writing = engine.tiers.pick_writes(1)[0]
    engine.tiers.end_write(writing, fault)
    book = engine.tiers.tiers[HOST].book
    num_slots = 50 - (fault is StorageFault.FOREIGN)
    assert (writing.tier, book.num_slots, book.num_free) == (HOST, num_slots, num_slots)
    assert engine.tiers.counts.faults == {(HOST, fault): 1}
    assert not engine.tiers.counts.written_blocks
    engine.tiers.check()


def test_what_leaves_next_is_written_to_each_tier_once():
    engine = Engine()
    full(engine)
    written = engine.write_all()
    assert [(w.tier, w.entry.block.depth) for w in written[:4]] == [
        (HOST, 4),
        (DISK, 4),
        (HOST, 3),
        (DISK, 3),
    ], "tails first, as the pool evicts them"
    assert len(engine.tiers.tiers[HOST].book) == len(engine.tiers.tiers[DISK].book) == 10
    assert engine.tiers.counts.written_blocks == {HOST: 10, DISK: 10}
    assert engine.write_all() == []
    engine.check()


def test_blocks_that_the_pool_keeps_are_written_last_but_written():
    """They leave the pool last; a worker that starts again has none of what was in its pool."""
    engine = Engine()
    engine.compute(prompt(1), keeps_prefix=True)
    engine.compute(prompt(2))
    kept = engine.pool.num_blocks // 8
    written = [w.block_id for w in engine.write_all() if w.tier is HOST]
    assert len(written) == len(set(written)) == 10
    assert engine.pool.allocate(engine.pool.num_available)[-kept:] == written[-kept:]


def test_a_block_goes_to_disk_after_enough_sequences_had_it():
    engine = Engine(disk_min_uses=2)
    full(engine)
    assert {w.tier for w in engine.write_all()} == {HOST}
    engine.compute(prompt(1))
    to_disk = [w.entry.block.depth for w in engine.write_all() if w.tier is DISK]
    assert to_disk == [4, 3, 2, 1, 0], "those of the first prompt"


def test_what_is_not_worth_a_place_in_one_tier_may_be_in_the_next():
    engine = Engine()
    engine.tiers.tiers[HOST].min_uses = 2
    full(engine)
    assert {w.tier for w in engine.write_all()} == {DISK}


def test_a_block_that_was_given_away_during_its_copy_is_not_kept():
    engine = Engine()
    full(engine)
    [first, *others] = writings = engine.tiers.pick_writes(3)
    engine.pool.allocate(engine.pool.num_free + 1)  # takes the block that leaves first
    still = [engine.tiers.is_still(writing) for writing in writings]
    assert not still[0] and all(still[len(engine.tiers.tiers) :])
    engine.tiers.end_write(first, StorageFault.REPLACED)
    for writing in others:
        engine.tiers.end_write(writing, None)
    assert engine.tiers.tiers[first.tier].book.find(first.entry.block) is None
    assert engine.tiers.counts.faults[first.tier, StorageFault.REPLACED] == 1
    engine.tiers.check()


def loaded(engine, tokens, faults=None, token_s=1.0):
    """Load what is stored of a prompt; returns blocks cached, or None if nothing was tried."""
    loading = engine.tiers.begin_load(engine.sequence(tokens), token_s)
    if loading is None:
        return None
    return engine.tiers.end_load(loading, faults or [None] * len(loading.sources))


def stored(**how):
    """An engine whose pool has forgotten the first prompt, and whose tiers have not."""
    engine = Engine(**how)
    full(engine)
    engine.write_all()
    engine.compute(prompt(3))
    engine.compute(prompt(4))
    engine.write_all()
    assert engine.scheduler.tables.find_prefix(engine.sequence(prompt(1))) == []
    return engine


def test_what_was_loaded_is_found_in_the_pool():
    engine = stored()
    assert loaded(engine, prompt(1)) == 5
    sequence = engine.sequence(prompt(1))
    assert len(engine.scheduler.tables.find_prefix(sequence)) == 5
    assert +engine.tiers.counts.hit_blocks == {HOST: 5}
    uses = [entry.num_uses for entry in engine.tiers.tiers[HOST].book._slots if entry]
    assert sorted(uses) == [1] * (len(uses) - 5) + [2] * 5
    assert engine.pool.num_held == 0 and engine.tiers.num_loading == 0
    engine.check()


def test_the_last_token_of_a_prompt_is_left_to_compute():
    assert loaded(stored(), prompt(1)[: 5 * SIZE]) == 4


def test_the_books_of_every_tier_are_compared():
    for tier in (HOST, DISK):
        engine = Engine()
        engine.tiers.tiers[tier].book.num_slots += 1
        with pytest.raises(InvariantViolation):
            engine.tiers.check()


def test_a_fault_ends_the_load_there_and_the_block_is_forgotten():
    engine = stored()
    assert loaded(engine, prompt(1), [None, None, StorageFault.DAMAGED]) == 2
    assert len(engine.scheduler.tables.find_prefix(engine.sequence(prompt(1)))) == 2
    assert engine.tiers.counts.faults[HOST, StorageFault.DAMAGED] == 1
    # The next time the disk has it.
    assert loaded(engine, prompt(1)) == 3
    assert engine.tiers.counts.hit_blocks == {HOST: 4, DISK: 1}
    engine.check()


def test_a_pool_that_lost_its_memory_takes_nothing_of_a_load():
    engine = stored()
    loading = engine.tiers.begin_load(engine.sequence(prompt(1)), 1.0)
    engine.pool.drop_cache()
    assert engine.tiers.end_load(loading, [None] * 5) == 0
    assert engine.scheduler.tables.find_prefix(engine.sequence(prompt(1))) == []
    engine.check()


def test_computing_is_chosen_where_it_is_cheaper():
    engine = stored()
    assert loaded(engine, prompt(1), token_s=0.000_001) is None
    assert engine.tiers.counts.num_computed_instead == 1
    engine.tiers.learn(HOST, 5, 500.0)
    assert loaded(engine, prompt(1), token_s=1.0) is None
    assert loaded(engine, prompt(1), token_s=0.0) == 5, "before a step was measured"


@pytest.mark.parametrize(("token_s", "is_loaded"), [(0.125, False), (0.126, True)])
def test_what_takes_as_long_to_load_as_to_compute_is_computed(token_s, is_loaded):
    """Five blocks of four tokens, half a second each."""
    engine = stored()
    engine.tiers.tiers[HOST].block_s = 0.5
    assert (loaded(engine, prompt(1), token_s=token_s) is not None) is is_loaded


def test_a_load_moves_what_a_block_takes_by_a_quarter_of_the_difference():
    engine = Engine()
    engine.tiers.tiers[HOST].block_s = 1.0
    engine.tiers.learn(HOST, 2, 10.0)
    assert engine.tiers.tiers[HOST].block_s == 2.0
    assert engine.tiers.tiers[DISK].block_s == 0.001


def test_a_load_behind_others_waits_for_them_and_so_may_cost_more_than_computing():
    engine = stored()
    first = engine.tiers.begin_load(engine.sequence(prompt(1)), 1.0)
    # Five blocks of 4 tokens in 0.5 ms, and in 1 ms behind five others.
    assert loaded(engine, prompt(2), token_s=0.000_04) is None
    engine.tiers.end_load(first, [None] * 5)
    assert loaded(engine, prompt(2), token_s=0.000_04) is not None
    engine.check()


def test_a_load_takes_no_block_that_its_own_beginning_needs():
    engine = stored()
    loaded(engine, prompt(1), [None, None, StorageFault.TRUNCATED])
    engine.tiers.learn(HOST, 1, 0.0)
    pool = engine.pool
    hits = engine.scheduler.tables.find_prefix(engine.sequence(prompt(1)))
    assert len(hits) == 2
    for block_id in hits:  # used just now: they are the last that others are given
        pool.share(block_id)
    pool.free(hits)
    taken = pool.allocate(pool.num_available - 3)
    loading = engine.tiers.begin_load(engine.sequence(prompt(1)), 1.0)
    assert (loading.hits, len(loading.block_ids)) == (hits, 1)
    engine.tiers.end_load(loading, [None])
    pool.free(taken)
    assert pool.num_held == 0
    engine.check()


def test_a_load_takes_no_more_than_half_of_the_pool():
    engine = stored()
    first = engine.tiers.begin_load(engine.sequence(prompt(1)), 1.0)
    second = engine.tiers.begin_load(engine.sequence(prompt(2)), 1.0)
    assert (len(first.block_ids), len(second.block_ids)) == (5, 3)
    assert engine.tiers.begin_load(engine.sequence(prompt(2)), 1.0) is None
    for loading in (first, second):
        engine.tiers.end_load(loading, [None] * len(loading.block_ids))
    engine.check()


@pytest.mark.parametrize("how", [{"prompt_logprobs": 1}, {}], ids=["scored", "other scope"])
def test_prompts_that_may_not_share_load_nothing(how):
    engine = stored()
    sequence = engine.sequence(prompt(1), **how)
    if not how:
        object.__setattr__(sequence.request, "scope", "another")
    assert engine.tiers.begin_load(sequence, 1.0) is None


def test_equal_tokens_after_another_beginning_are_not_loaded():
    engine = stored()
    other = [7] * SIZE + prompt(1)[SIZE:]
    assert loaded(engine, other) is None


def test_blocks_of_a_class_that_counts_less_leave_first():
    engine = Engine(host_slots=8, weights={"batch": 0.1})
    engine.compute(prompt(1), tier="batch")
    engine.compute(prompt(2))
    engine.write_all()
    book = engine.tiers.tiers[HOST].book
    depths = {}
    for n in (1, 2):
        sequence = engine.sequence(prompt(n))
        chain = engine.origins.chain(sequence, 5)
        depths[n] = sum(digest in book._entries for digest in chain[1:])
    assert depths == {1: 3, 2: 5}
