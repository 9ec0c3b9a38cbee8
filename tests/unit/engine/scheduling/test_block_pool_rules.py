"""A block pool's rules one by one: who is evicted, what has a name, what is refused."""

import pytest

from core.block_hash import block_hash, root_hash
from core.errors import InvariantViolation, PoolExhausted
from engine.scheduling.block_changes import BlockChanges
from engine.scheduling.block_identities import NO_IDENTITY
from engine.scheduling.block_pool import BlockPool

ROOT = root_hash("model", "tenant")


def chain(pool, blocks, scope="tenant", first=0):
    """Register blocks as one chain with the tokens `first`, `first + 1` and so on."""
    parent = pool.remember_root(scope)
    name = ROOT
    for token, block in enumerate(blocks, first):
        name = block_hash(name, [token])
        parent = pool.register(block, parent, name, [token])


def walk(pool, num_blocks, scope="tenant", first=0):
    """Find such a chain again, as far as it is known."""
    found = []
    parent = pool.root(scope)
    name = ROOT
    for token in range(first, first + num_blocks):
        name = block_hash(name, [token])
        block = pool.find(parent, name, [token])
        if block is None:
            break
        found.append(block)
        parent = pool.identity(block)
    return found


def test_blocks_are_given_out_all_or_none():
    pool = BlockPool(3)
    held, cached = pool.allocate(2)
    chain(pool, [cached])
    pool.free([cached])
    with pytest.raises(PoolExhausted, match="needed 3 blocks, 2 of 3 are available"):
        pool.allocate(3)
    assert (pool.num_free, pool.num_cached, pool.num_held) == (1, 1, 1)
    assert walk(pool, 1) == [cached]
    assert pool.allocate(2) == [2, cached] and pool.references(held) == 1
    pool.check()


def test_a_block_freed_twice_is_an_invariant_violation_and_leaves_good_books():
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.free([first])
    with pytest.raises(InvariantViolation, match=f"block {first} was freed more often"):
        pool.free([first, second])
    assert (pool.num_free, pool.num_held, pool.references(second)) == (3, 0, 0)
    pool.check()


def test_the_least_recently_used_block_is_evicted_and_a_prefix_outlives_its_tail():
    pool = BlockPool(6)
    old, new = pool.allocate(3), pool.allocate(3)
    chain(pool, old)
    chain(pool, new, first=10)
    pool.free(old)
    pool.free(new)
    assert pool.allocate(2) == [old[2], old[1]]
    assert (walk(pool, 3), walk(pool, 3, first=10)) == (old[:1], new)
    assert pool.allocate(2) == [old[0], new[2]]
    assert (walk(pool, 3), walk(pool, 3, first=10)) == ([], new[:2])


def test_a_hit_makes_a_block_the_last_to_be_evicted():
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for token, block in enumerate(blocks):
        chain(pool, [block], first=token * 10)
    for block in blocks:
        pool.free([block])
    pool.share(blocks[0])
    pool.free([blocks[0]])
    assert pool.allocate(3) == [blocks[1], blocks[2], blocks[0]]


def test_the_same_tokens_after_another_parent_are_another_block_under_any_name():
    pool = BlockPool(4)
    red, blue = pool.allocate(2)
    roots = [pool.remember_root("red"), pool.remember_root("blue")]
    identities = [
        pool.register(red, roots[0], b"same", [7, 7]),
        pool.register(blue, roots[1], b"same", [7, 7]),
    ]
    assert [pool.find(root, b"same", [7, 7]) for root in roots] == [red, blue]
    child = pool.allocate(1)[0]
    pool.register(child, identities[0], b"same", [1, 2])
    assert pool.find(identities[0], b"same", [1, 2]) == child
    assert pool.find(identities[1], b"same", [1, 2]) is None
    assert pool.find(identities[0], b"same", [1, 3]) is None
    assert pool.find(identities[0], b"same", [1]) is None


def test_a_child_is_not_inherited_by_a_parent_that_was_computed_anew():
    """Serial numbers are never given again, not even for the same content in the same block."""
    pool = BlockPool(2)
    parent, child = pool.allocate(2)
    chain(pool, [parent, child])
    before = pool.identity(parent)
    pool.free([parent])
    assert pool.allocate(1) == [parent]
    chain(pool, [parent])
    assert pool.identity(parent) > before
    assert walk(pool, 2) == [parent]


def test_of_two_blocks_with_one_name_the_first_that_is_evicted_is_no_news():
    """The parent was computed anew, and the child after it: the child of before cannot be found."""
    changes = BlockChanges()
    pool = BlockPool(4, changes)
    parent, orphan = pool.allocate(2)
    chain(pool, [parent, orphan])
    child_name = pool.block_hash(orphan)
    pool.free([parent])
    assert parent in pool.allocate(3), "it is evicted"
    pool.free([b for b in range(4) if b != orphan])
    anew = pool.allocate(2)
    chain(pool, anew)
    assert [pool.block_hash(b) for b in (orphan, anew[1])] == [child_name, child_name]
    changes.take(99)
    pool.free([orphan])
    pool.allocate(2)
    assert pool.block_hash(orphan) is None and child_name not in changes.take(99)[1]
    pool.free(anew)
    pool.allocate(2)
    assert child_name in changes.take(99)[1]


@pytest.mark.parametrize("evicted", [0, 1, 2])
def test_a_block_leaves_its_bucket_from_any_place(evicted):
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    root = pool.remember_root("tenant")
    for token, block in enumerate(blocks):
        pool.register(block, root, b"same", [token])
    pool.free([blocks[evicted]])
    assert pool.allocate(1) == [blocks[evicted]]
    found = [pool.find(root, b"same", [token]) for token in range(3)]
    assert found == [None if b == blocks[evicted] else b for b in blocks]
    pool.check()


def test_a_second_copy_stays_anonymous_and_learns_the_identity_of_the_first():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    root = pool.remember_root("tenant")
    identity = pool.register(first, root, b"name", [1])
    assert pool.register(second, root, b"name", [1]) == identity
    assert (pool.identity(second), pool.block_hash(second)) == (NO_IDENTITY, None)
    pool.free([first, second])
    assert (pool.num_free, pool.num_cached) == (1, 1)


def test_a_block_keeps_the_identity_it_has():
    pool = BlockPool(1)
    block = pool.allocate(1)[0]
    root = pool.remember_root("tenant")
    identity = pool.register(block, root, b"a", [1])
    assert pool.register(block, root, b"b", [2]) == identity
    assert (pool.find(root, b"a", [1]), pool.find(root, b"b", [2])) == (block, None)
    assert pool.block_hash(block) == b"a"


def test_no_more_roots_are_remembered_than_there_are_blocks_and_the_one_unused_longest_goes():
    pool = BlockPool(2)
    block = pool.allocate(1)[0]
    chain(pool, [block], scope="a")
    first = pool.remember_root("a")
    pool.remember_root("b")
    assert pool.remember_root("a") == first
    pool.remember_root("c")
    assert (pool.root("a"), pool.root("b")) == (first, NO_IDENTITY)
    pool.remember_root("d")
    pool.remember_root("e")
    assert pool.root("a") == NO_IDENTITY and walk(pool, 1, scope="a") == []
    assert pool.remember_root("a") > first and walk(pool, 1, scope="a") == []


def test_dropping_the_cache_frees_what_was_cached_in_its_order_and_holds_what_was_held():
    pool = BlockPool(5)
    blocks = pool.allocate(4)
    chain(pool, blocks)
    pool.free(blocks[1:])
    pool.drop_cache()
    pool.drop_cache()  # nothing is left to drop
    pool.check()
    assert (pool.num_free, pool.num_cached, pool.num_held) == (4, 0, 1)
    assert pool.identity(blocks[0]) == NO_IDENTITY and walk(pool, 4) == []
    pool.free(blocks[:1])
    assert pool.num_cached == 0
    assert pool.allocate(5) == [4, 3, 2, 1, 0]
    chain(pool, [4, 3])
    assert walk(pool, 3) == [4, 3]
    pool.check()


def test_what_may_not_be_registered_is_refused():
    pool = BlockPool(3)
    held, other = pool.allocate(2)
    root = pool.remember_root("tenant")
    with pytest.raises(InvariantViolation, match="block 2 is not held"):
        pool.register(2, root, b"name", [1, 2])
    with pytest.raises(InvariantViolation, match="no parent"):
        pool.register(held, NO_IDENTITY, b"name", [1, 2])
    pool.register(held, root, b"name", [1, 2])
    with pytest.raises(InvariantViolation, match="equally many tokens"):
        pool.register(other, root, b"name", [1, 2, 3])
    assert [pool.identity(b) > NO_IDENTITY for b in (held, other)] == [True, False]
    pool.check()


# --- its own check ------------------------------------------------------------------------------


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
