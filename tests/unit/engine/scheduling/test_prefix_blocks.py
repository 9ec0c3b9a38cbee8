"""Blocks that peers read, and blocks that a peer's KV is written into."""

import pytest

from core.block_hash import block_hashes, root_hash
from core.types import GenerateRequest, SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_tables import Limits
from engine.scheduling.scheduler import Scheduler

SIZE = 4
PROMPT = tuple(range(1, 14))
"""Three blocks and one token."""


def engine(num_blocks=32, **limits):
    pool = BlockPool(num_blocks)
    return Scheduler(pool, Limits(**{**DEFAULTS, **limits}), "m")


ONE_TOKEN = SamplingParams(max_tokens=1)
DEFAULTS = {
    "block_size_tokens": SIZE,
    "max_step_tokens": 64,
    "max_sequences": 8,
    "max_model_len": 100,
}


def cached(scheduler, tokens=PROMPT, scope="t"):
    """Fill the cache as a finished prompt would."""
    pool = scheduler.pool
    hashes = block_hashes(root_hash("m", scope), tokens, SIZE)
    identity = pool.remember_root(scope)
    taken = pool.allocate(len(hashes))
    for index, (block, name) in enumerate(zip(taken, hashes, strict=True)):
        own = tokens[index * SIZE : (index + 1) * SIZE]
        identity = pool.register(block, identity, name, own)
    pool.free(taken)
    return taken


def prefix(scheduler, tokens=PROMPT, scope="t"):
    return scheduler.prefixes.prefix(tuple(tokens), scope)


def test_what_is_cached_is_pinned_by_its_tokens_and_scope():
    scheduler = engine()
    blocks = cached(scheduler)
    prefixes = scheduler.prefixes
    assert prefixes.pin(prefix(scheduler, scope="another")) == []
    assert prefixes.pin(prefix(scheduler, (9, *PROMPT[1:]))) == []
    assert prefixes.pin(prefix(scheduler, (*PROMPT[:8], 99, 98, 97, 96, 95))) == blocks[:2]
    assert prefixes.pin(prefix(scheduler)) == blocks
    assert prefixes.num_read == 5 and scheduler.pool.num_held == 3
    prefixes.unpin(blocks)
    prefixes.unpin(blocks[:2])
    assert prefixes.num_read == 0 and scheduler.pool.num_held == 0
    scheduler.pool.check()


def test_peers_read_no_more_than_half_of_the_pool():
    scheduler = engine(num_blocks=10)
    cached(scheduler)
    pinned = scheduler.prefixes.pin(prefix(scheduler))
    assert len(pinned) == 3
    assert scheduler.prefixes.pin(prefix(scheduler)) == []
    scheduler.prefixes.unpin(pinned)
    assert len(scheduler.prefixes.pin(prefix(scheduler))) == 3


def test_peers_read_and_fill_half_of_the_pool_each_to_the_last_block():
    scheduler = engine(num_blocks=12)
    cached(scheduler)
    pinned = [scheduler.prefixes.pin(prefix(scheduler)) for _ in range(3)]
    assert list(map(len, pinned)) == [3, 3, 0] and scheduler.prefixes.num_read == 6
    for blocks in pinned:
        scheduler.prefixes.unpin(blocks)
    filled = [prefix(scheduler, scope=scope) for scope in ("a", "b", "c")]
    assert [scheduler.prefixes.reserve(one) for one in filled] == [0, 0, None]
    assert scheduler.prefixes.num_reserved == 6


def test_what_arrived_is_cache_and_the_next_prompt_hits_it():
    scheduler = engine()
    cached(scheduler, PROMPT[:4])
    mine = prefix(scheduler)
    assert scheduler.prefixes.reserve(mine) == 1
    assert scheduler.prefixes.num_held(prefix(scheduler)) == 1, "not before it is here"
    table = list(mine.block_table)
    assert len(table) == 3
    scheduler.prefixes.attach(mine)
    assert scheduler.prefixes.num_held(prefix(scheduler)) == 3
    assert scheduler.pool.num_held == 0 and scheduler.prefixes.num_reserved == 0
    request = GenerateRequest("r", "", PROMPT, SamplingParams(max_tokens=4), 1, 0.0, scope="t")
    sequence = scheduler.new_sequence(request, 0, (0,), (), 0.0)
    scheduler.submit(sequence)
    plan = scheduler.plan(0.0)
    assert plan.items[0].start == 12 and sequence.num_prefix_hit_tokens == 12
    assert set(plan.arrived) == set(table[1:]), "a device loads them before the step"
    scheduler.pool.check()


@pytest.mark.parametrize("num_tokens", [10, 11])
def test_a_block_that_is_not_whole_is_no_cache(num_tokens):
    """The peer's blocks may be smaller: 10 tokens are two of ours and a half."""
    scheduler = engine()
    mine = prefix(scheduler, PROMPT[: num_tokens + 1])
    assert scheduler.prefixes.reserve(mine) == 0 and len(mine.block_table) == 3
    scheduler.prefixes.attach(mine)
    assert scheduler.prefixes.num_held(prefix(scheduler)) == 2
    assert scheduler.pool.num_free == 30 and scheduler.pool.num_cached == 2


def test_what_did_not_arrive_is_free_again():
    scheduler = engine()
    mine = prefix(scheduler)
    scheduler.prefixes.reserve(mine)
    assert scheduler.pool.num_held == 3
    for _ in range(2):
        scheduler.prefixes.release(mine)
        assert scheduler.pool.num_free == 32 and scheduler.prefixes.num_reserved == 0


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(8, 2), (9, 2), (10, 3), (13, 3)])
def test_room_is_taken_for_all_tokens_but_the_last(num_tokens, num_blocks):
    mine = prefix(scheduler := engine(), PROMPT[:num_tokens])
    assert scheduler.prefixes.reserve(mine) == 0
    assert len(mine.block_table) == num_blocks


@pytest.mark.parametrize("num_cached", [0, 1])
def test_who_waits_for_blocks_comes_first(num_cached):
    """What is cached takes room, too: it can no longer be evicted for the other."""
    scheduler = engine(num_blocks=12)
    if num_cached:
        cached(scheduler, PROMPT[:SIZE])
    waiting = GenerateRequest("r", "", tuple(range(40)), SamplingParams(max_tokens=1), 1, 0.0)
    sequence = scheduler.new_sequence(waiting, 0, (0,), (), 0.0)
    scheduler.submit(sequence)
    assert scheduler.prefixes.reserve(prefix(scheduler)) is None
    assert scheduler.pool.num_held == 0
    scheduler.cancel(sequence)
    assert scheduler.prefixes.reserve(prefix(scheduler)) == num_cached


@pytest.mark.parametrize(("num_waiting", "have_blocks"), [(0, 0), (36, 0), (37, None)])
def test_room_is_used_to_the_last_block(num_waiting, have_blocks):
    """Three of twelve blocks for the prefix, nine for the one that waits."""
    scheduler = engine(num_blocks=12)
    if num_waiting:
        waiting = GenerateRequest("r", "", tuple(range(num_waiting)), ONE_TOKEN, 1, 0.0)
        scheduler.submit(scheduler.new_sequence(waiting, 0, (0,), (), 0.0))
    else:
        scheduler.pool.allocate(9)
    assert scheduler.prefixes.reserve(prefix(scheduler)) == have_blocks


@pytest.mark.parametrize("why", ["share", "pool", "step"])
def test_no_room_is_a_refusal_and_takes_nothing(why):
    scheduler = engine(num_blocks=10)
    if why == "share":
        scheduler.prefixes.reserve(prefix(scheduler, scope="another"))
    elif why == "pool":
        scheduler.pool.allocate(8)
    else:
        scheduler._sequences.copies_from_free = True
    num_held = scheduler.pool.num_held
    assert scheduler.prefixes.reserve(prefix(scheduler)) is None
    assert scheduler.pool.num_held == num_held
