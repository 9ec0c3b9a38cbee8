"""Damaged books of a block pool are seen by its own check."""

import pytest

from core.block_hash import block_hash, root_hash
from core.errors import InvariantViolation
from engine.scheduling.block_pool import BlockPool

ROOT = root_hash("model", "tenant")


def chain(pool, blocks, scope="tenant", first=0):
    """Register blocks as one chain with the tokens `first`, `first + 1` and so on."""
    parent = pool.remember_root(scope)
    name = ROOT
    for token, block in enumerate(blocks, first):
        name = block_hash(name, [token])
        parent = pool.register(block, parent, name, [token])


def lose_a_free_block(pool):
    pool._lists.remove(pool.num_blocks - 1)


def lose_a_cached_block(pool):
    pool._lists.remove(1)


def free_a_held_block(pool):
    pool._lists.extend(pool._free, [0])
    pool._num_free += 1


def list_a_block_twice(pool):
    pool._lists.extend(pool._free, [1])


def forget_a_reference(pool):
    pool._references[0] -= 1


def make_a_cached_block_anonymous(pool):
    pool._identities.forget(1)


def unlink_a_registered_block(pool):
    pool._identities._chains[pool._identities._bucket(pool.block_hash(1))] = -1


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_free_block, lose_a_cached_block, free_a_held_block, list_a_block_twice,
        forget_a_reference, make_a_cached_block_anonymous, unlink_a_registered_block,
    ],
)  # fmt: skip
def test_damaged_books_are_seen_by_check(damage):
    pool = BlockPool(4)
    held, cached = pool.allocate(2)
    chain(pool, [cached])
    pool.free([cached])
    pool.check()
    assert (held, cached) == (0, 1)
    damage(pool)
    with pytest.raises(InvariantViolation):
        pool.check()
