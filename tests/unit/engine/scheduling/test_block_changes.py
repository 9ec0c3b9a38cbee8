"""What a pool tells of its cached blocks, and the bound on what is kept of it."""

import random

import pytest

from core.block_hash import BlockHash, block_hash, root_hash
from engine.scheduling.block_changes import BlockChanges
from engine.scheduling.block_pool import BlockPool


def name(number):
    return BlockHash(number.to_bytes(16, "little"))


def fresh(max_changes=1000):
    changes = BlockChanges(max_changes)
    changes.begin_whole()
    return changes


def test_the_last_word_on_each_block_is_kept_oldest_first():
    changes = fresh()
    changes.stored(name(1))
    changes.stored(name(2))
    changes.evicted(name(1))
    changes.stored(name(3))
    assert changes.take(2) == ([name(2)], [name(1)])
    assert changes.take(9) == ([name(3)], [])
    assert changes.take(9) == ([], [])


def test_too_many_changes_are_none_and_the_whole_content_is_due():
    changes = fresh(max_changes=3)
    for number in range(3):
        changes.stored(name(number))
    assert not changes.is_whole_due
    changes.stored(name(0))
    assert len(changes) == 3 and not changes.is_whole_due, "a block counts once"
    changes.stored(name(9))
    assert changes.is_whole_due and len(changes) == 0
    changes.begin_whole()
    assert not changes.is_whole_due


def test_a_dropped_cache_voids_what_was_told():
    changes = fresh()
    changes.stored(name(1))
    changes.dropped()
    assert changes.is_whole_due and changes.take(9) == ([], [])


def test_who_watches_is_called_when_there_is_something_again():
    changes = fresh()
    calls = []
    changes.watch(lambda: calls.append(1))
    changes.stored(name(1))
    changes.stored(name(2))
    assert len(calls) == 1
    changes.take(9)
    changes.dropped()
    assert len(calls) == 2


@pytest.mark.parametrize("seed", range(10))
def test_whoever_follows_the_changes_knows_what_the_pool_finds(seed):
    """Reads the content in slices while it changes, and again after each drop."""
    rng = random.Random(seed)
    changes = BlockChanges(max_changes=40)
    pool = BlockPool(30, changes)
    root = root_hash("m", "t")
    parents = [(pool.remember_root("t"), root)]
    held = []
    known = set()
    num_whole = 0

    def turn():
        kind = rng.random()
        if kind < 0.5 and pool.num_available:
            [block] = pool.allocate(1)
            held.append(block)
            parent, parent_hash = rng.choice(parents[-6:])
            tokens = [rng.randrange(5)] * 4
            child = block_hash(parent_hash, tokens)
            parents.append((pool.register(block, parent, child, tokens), child))
        elif kind < 0.98 and held:
            pool.free([held.pop(rng.randrange(len(held)))])
        elif kind >= 0.98:
            pool.drop_cache()
            del parents[1:]
            parents[0] = (pool.remember_root("t"), root)

    def follow():
        stored, evicted = changes.take(rng.randrange(1, 50))
        known.difference_update(evicted)
        known.update(stored)

    for _ in range(600):
        turn()
        if rng.random() < 0.3:
            if changes.is_whole_due:
                num_whole += 1
                changes.begin_whole()
                known.clear()
                for start in range(0, 30, 7):
                    known.update(pool.registered(range(start, min(start + 7, 30))))
                    turn()
            else:
                follow()
    while changes.is_whole_due or len(changes):
        if changes.is_whole_due:
            changes.begin_whole()
            known = set(pool.registered(range(30)))
        follow()
    assert known == set(pool.registered(range(30)))
    assert num_whole >= 2
    assert known or pool.num_cached == 0


def test_a_second_copy_is_not_told_and_its_end_neither():
    changes = fresh()
    pool = BlockPool(4, changes)
    parent = pool.remember_root("t")
    child = block_hash(root_hash("m", "t"), [1, 2])
    first, second = pool.allocate(2)
    for block in (first, second):
        pool.register(block, parent, child, [1, 2])
    assert changes.take(9) == ([child], [])
    pool.free([second])
    pool.free(pool.allocate(3))
    assert changes.take(9) == ([], [])
    pool.free([first])
    pool.allocate(4)
    assert changes.take(9) == ([], [child])
