"""Kept blocks: who leaves last, within whose share, and who gives way."""

import pytest

from core.errors import InvariantViolation
from engine.scheduling import kept_blocks
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.kept_blocks import KeptBlocks


def keep(kept, owner, *block_ids):
    for block_id in block_ids:
        kept.mark(block_id, owner)
    gave_way = kept.add(block_ids)
    kept.check()
    return gave_way


def test_an_owner_keeps_an_eighth_and_its_oldest_gives_way():
    kept = KeptBlocks(32)
    assert keep(kept, "a", 1, 2, 3, 4) == []
    assert keep(kept, "b", 5) == []
    assert keep(kept, "a", 6, 7) == [1, 2]
    assert kept.check() == [3, 4, 5, 6, 7]
    assert not kept.is_marked(1) and kept.is_marked(3)


def test_all_owners_together_keep_half_and_anybodys_oldest_gives_way():
    kept = KeptBlocks(16)
    for number, owner in enumerate("abcd"):
        assert keep(kept, owner, 2 * number, 2 * number + 1) == []
    assert keep(kept, "e", 8) == [0]
    assert keep(kept, "a", 9) == [1], "its own share is half empty, yet all is full"
    assert kept.check() == [2, 3, 4, 5, 6, 7, 8, 9]


def test_a_block_that_is_used_is_no_longer_the_oldest_and_stays_its_owners():
    kept = KeptBlocks(16)
    keep(kept, "a", 1, 2)
    kept.remove(1)
    assert kept.check() == [2] and kept.is_marked(1)
    kept.mark(1, "b")  # whoever uses it: it has an owner
    assert kept.add([1]) == []
    assert keep(kept, "a", 3) == [2]
    assert kept.take(2) == [1, 3] and not kept.is_marked(3) and kept.num_kept == 0


def test_owners_beyond_those_that_are_counted_keep_nothing(monkeypatch):
    monkeypatch.setattr(kept_blocks, "MAX_OWNERS", 1)
    kept = KeptBlocks(16)
    kept.mark(1, "a")
    kept.mark(2, "b")
    assert kept.is_marked(1) and not kept.is_marked(2)


def test_a_pool_of_few_blocks_keeps_none():
    kept = KeptBlocks(7)
    assert keep(kept, "a", 1) == [1] and kept.check() == []


def test_books_that_do_not_balance_are_an_invariant_violation():
    kept = KeptBlocks(16)
    keep(kept, "a", 1, 2)
    kept.num_kept = 1
    with pytest.raises(InvariantViolation, match="2 blocks are kept, 1 are counted"):
        kept.check()


@pytest.mark.parametrize("damage", ["owner", "count", "share", "all"])
def test_each_book_is_compared(damage):
    kept = KeptBlocks(16)
    keep(kept, "a", 1, 2)
    keep(kept, "b", 3)
    match damage:
        case "owner":  # whose lists are as long as before
            kept._owner_of[2], kept._owner_of[3] = kept._owner_of[3], kept._owner_of[2]
        case "count":
            kept._counts[1] -= 1
        case "share":
            kept._max_of_owner = 1
        case "all":
            kept._max_kept = 2
    with pytest.raises(InvariantViolation):
        kept.check()


def cache(pool, first_token, num_blocks, keeper=None):
    """Compute a prompt of blocks of one token; returns its blocks."""
    parent = pool.remember_root("t")
    blocks = pool.allocate(num_blocks)
    for token, block in enumerate(blocks, first_token):
        parent = pool.register(block, parent, token.to_bytes(2), [token])
    pool.free(blocks, keeper)
    pool.check()
    return blocks


def test_kept_blocks_are_evicted_after_all_others_and_in_their_order():
    pool = BlockPool(32)
    kept = cache(pool, 0, 4, "a")
    plain = cache(pool, 100, 28)
    assert pool.num_cached == 32
    assert pool.evicted_next(28) == plain[::-1]
    assert pool.evicted_next(31) == plain[::-1] + kept[:0:-1]
    assert pool.allocate(28) == plain[::-1]
    assert pool.evicted_next(9) == kept[::-1]
    assert pool.allocate(4) == kept[::-1], "tails first, as among others"


def test_a_tenant_that_keeps_much_takes_no_more_than_its_share_from_others():
    pool = BlockPool(32)
    (mine,) = cache(pool, 0, 1)
    identity = pool.identity(mine)
    for turn in range(20):
        # Six prompts of four blocks come between two uses: fewer than the greedy one leaves over.
        for prompt in range(6):
            cache(pool, 100 + 24 * turn + 4 * prompt, 4, "greedy")
        assert pool.identity(mine) == identity, f"gone in turn {turn}"
        pool.share(mine)
        pool.free([mine])


def test_whoever_frees_a_block_last_it_is_kept_if_one_user_asked():
    pool = BlockPool(16)
    blocks = cache(pool, 0, 2)
    pool.share(blocks[0])
    pool.share(blocks[0])
    pool.free(blocks[:1], "a")
    pool.free(blocks[:1])
    cache(pool, 100, 14)
    assert pool.allocate(15)[-1] != blocks[0] and pool.identity(blocks[0])


def test_what_is_lost_with_the_memory_is_kept_no_more():
    pool = BlockPool(16)
    held, *_ = blocks = cache(pool, 0, 2, "a")
    pool.share(held)
    pool.drop_cache()
    assert pool.num_cached == 0 and not any(map(pool.identity, blocks))
    pool.free([held])
    plain = cache(pool, 100, 16)
    assert pool.num_cached == 16
    assert pool.allocate(16) == plain[::-1], "none of them leaves later than others"
