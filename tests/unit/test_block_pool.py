"""The books of a block pool balance under any history."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core.block_hash import block_hash, root_hash
from core.errors import InvariantViolation, PoolExhausted
from engine.block_pool import BlockPool

ROOT = root_hash("model", "tenant")


class PoolMachine(RuleBasedStateMachine):
    """Random allocations, shares, frees and registrations, next to a model of references."""

    @initialize(size=st.integers(1, 12))
    def make(self, size):
        self.pool, self.references, self.registered = BlockPool(size), {}, 0

    @rule(count=st.integers(0, 6))
    def allocate(self, count):
        available = self.pool.num_available
        if count > available:
            with pytest.raises(PoolExhausted):
                self.pool.allocate(count)
            assert self.pool.num_available == available
            return
        generations = [self.pool.generation(b) for b in range(self.pool.num_blocks)]
        for block in self.pool.allocate(count):
            assert block not in self.references, "a block was given out twice"
            assert self.pool.generation(block) == generations[block] + 1
            self.references[block] = 1

    @rule(data=st.data())
    def share(self, data):
        if self.references:
            block = data.draw(st.sampled_from(sorted(self.references)))
            self.pool.share(block)
            self.references[block] += 1

    @rule(data=st.data())
    def free(self, data):
        if self.references:
            block = data.draw(st.sampled_from(sorted(self.references)))
            self.pool.free([block])
            self.references[block] -= 1
            if not self.references[block]:
                del self.references[block]

    @rule(data=st.data(), token=st.integers(0, 5))
    def register_and_find(self, data, token):
        if self.references:
            block = data.draw(st.sampled_from(sorted(self.references)))
            identity = block_hash(ROOT, [token])
            self.pool.register(block, identity, [token])
            found = self.pool.find(identity, [token])
            assert found is not None or block in self.pool._identity, (
                "a block keeps its first identity"
            )
            assert self.pool.find(identity, [token + 100]) is None, (
                "tokens are compared, not only hashes"
            )

    @rule(token=st.integers(0, 5))
    def hit(self, token):
        block = self.pool.find(block_hash(ROOT, [token]), [token])
        if block is not None:
            self.pool.share(block)
            self.references[block] = self.references.get(block, 0) + 1

    @invariant()
    def books_balance(self):
        if hasattr(self, "pool"):
            self.pool.check()
            assert self.pool.num_held == len(self.references)
            assert (
                self.pool.num_free + self.pool.num_cached + self.pool.num_held
                == self.pool.num_blocks
            )


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_block_freed_twice_is_an_invariant_violation():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(InvariantViolation, match="more often than referenced"):
        pool.free(blocks)


def test_the_least_recently_used_block_is_evicted_and_a_prefix_outlives_its_tail():
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    hashes, parent = [], ROOT
    for i, block in enumerate(blocks):
        parent = block_hash(parent, [i])
        hashes.append(parent)
        pool.register(block, parent, [i])
    pool.free(blocks)
    pool.allocate(1)
    assert [pool.find(h, [i]) is not None for i, h in enumerate(hashes)] == [True, True, False]


def test_a_planted_leak_is_seen_by_check():
    pool = BlockPool(4)
    pool._free.popleft()
    with pytest.raises(InvariantViolation, match="do not add up"):
        pool.check()


def test_hashes_depend_on_parent_tokens_scope_model_and_key():
    base = block_hash(root_hash("m", "t"), [1, 2])
    others = [
        block_hash(root_hash("m", "t"), [2, 1]), block_hash(root_hash("m", "u"), [1, 2]),
        block_hash(root_hash("n", "t"), [1, 2]), block_hash(root_hash("m", "t", b"key"), [1, 2]),
        block_hash(block_hash(root_hash("m", "t"), [0]), [1, 2]),
    ]  # fmt: skip
    assert len({base, *others}) == 6
    assert root_hash("ab", "c") != root_hash("a", "bc")
