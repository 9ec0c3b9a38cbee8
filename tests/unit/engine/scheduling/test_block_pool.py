"""A block pool's books under any history, next to plain dicts and lists that keep the same ones."""

from collections import OrderedDict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from core.errors import InvariantViolation, PoolExhausted
from engine.scheduling.block_identities import NO_IDENTITY
from engine.scheduling.block_pool import BlockPool

SCOPES = ("red", "blue", "green")


counts = st.integers(0, 6)


tokens = st.integers(0, 2)


class PoolMachine(RuleBasedStateMachine):
    """The model keeps orders in lists and contents in dicts, keyed by the parent and the tokens.

    All names are one of two, so that most blocks meet others in their bucket.
    """

    @initialize(size=st.integers(1, 9) | st.integers(16, 24))
    def make(self, size):
        self.pool = BlockPool(size)
        self.free_order = list(range(size))
        self.cached_order = []
        self.kept_order = []
        self.owners = {}  # marked block -> for whom it is kept
        self.references = [0] * size
        self.generations = [0] * size
        self.identities = {}  # block -> its serial number
        self.blocks = {}  # (parent's serial number, token) -> block
        self.roots = OrderedDict()
        self.given = []  # every serial number that was ever given

    def held(self):
        return [b for b, count in enumerate(self.references) if count]

    def anonymize(self, block):
        del self.identities[block]
        self.blocks = {key: b for key, b in self.blocks.items() if b != block}

    @rule(count=counts)
    def allocate(self, count):
        order = self.free_order + self.cached_order + self.kept_order
        if count > len(order):
            with pytest.raises(PoolExhausted, match=f"needed {count} blocks, {len(order)} of"):
                self.pool.allocate(count)
            return
        assert self.pool.allocate(count) == order[:count]
        for block in order[:count]:
            if block in self.free_order:
                self.free_order.remove(block)
            else:
                order = self.kept_order if block in self.kept_order else self.cached_order
                order.remove(block)
                self.owners.pop(block, None)
                self.anonymize(block)
            self.references[block] = 1
            self.generations[block] += 1

    @rule(data=st.data())
    def share(self, data):
        block = data.draw(st.integers(0, self.pool.num_blocks - 1))
        if block in self.free_order:
            with pytest.raises(InvariantViolation, match=f"block {block} is free"):
                self.pool.share(block)
            return
        self.pool.share(block)
        self.references[block] += 1
        for order in (self.cached_order, self.kept_order):
            if block in order:
                order.remove(block)

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def free(self, data):
        table = data.draw(st.lists(st.sampled_from(self.held()), unique=True, max_size=6))
        keeper = data.draw(st.sampled_from([None, None, "", "red", "blue", "green", "grey"]))
        self.pool.free(table, keeper)
        gave_way = []
        for block in reversed(table):
            self.references[block] -= 1
            if block in self.identities and keeper is not None:
                self.owners.setdefault(block, keeper)
            if self.references[block] == 0 and block not in self.identities:
                self.owners.pop(block, None)
                self.free_order.append(block)
            elif self.references[block] == 0 and block in self.owners:
                gave_way += self.keep(block)
            elif self.references[block] == 0:
                self.cached_order.append(block)
        self.cached_order += gave_way

    def keep(self, block):
        """An owner has at most an eighth of the pool, all of them half."""
        self.kept_order.append(block)
        owned = [b for b in self.kept_order if self.owners[b] == self.owners[block]]
        if len(owned) > self.pool.num_blocks // 8:
            oldest = owned[0]
        elif len(self.kept_order) > self.pool.num_blocks // 2:
            oldest = self.kept_order[0]
        else:
            return []
        self.kept_order.remove(oldest)
        del self.owners[oldest]
        return [oldest]

    @rule(data=st.data())
    def free_too_often(self, data):
        unreferenced = self.free_order + self.cached_order + self.kept_order
        if unreferenced:
            with pytest.raises(InvariantViolation, match="more often than referenced"):
                self.pool.free([data.draw(st.sampled_from(unreferenced))])

    @rule(scope=st.sampled_from(SCOPES))
    def remember_root(self, scope):
        serial = self.pool.remember_root(scope)
        if scope in self.roots:
            assert serial == self.roots[scope]
        else:
            self.give(serial)
        self.roots[scope] = serial
        self.roots.move_to_end(scope)
        if len(self.roots) > self.pool.num_blocks:
            self.roots.popitem(last=False)

    @precondition(lambda self: self.held() and self.given)
    @rule(data=st.data(), token=tokens)
    def register(self, data, token):
        block = data.draw(st.sampled_from(self.held()))
        parent = data.draw(st.sampled_from(self.given))
        serial = self.pool.register(block, parent, self.name(token), [token])
        if block in self.identities:
            assert serial == self.identities[block], "a block keeps its first identity"
        elif (parent, token) in self.blocks:
            assert serial == self.identities[self.blocks[parent, token]]
        else:
            self.give(serial)
            self.identities[block] = serial
            self.blocks[parent, token] = block

    @precondition(lambda self: self.given)
    @rule(data=st.data(), token=tokens)
    def find(self, data, token):
        parent = data.draw(st.sampled_from(self.given))
        found = self.pool.find(parent, self.name(token), [token])
        assert found == self.blocks.get((parent, token))

    @rule()
    def drop_cache(self):
        self.pool.drop_cache()
        self.free_order += self.cached_order + self.kept_order
        for block in self.kept_order:
            del self.owners[block]
        self.cached_order = []
        self.kept_order = []
        self.identities = {}
        self.blocks = {}

    def give(self, serial):
        assert serial not in (NO_IDENTITY, *self.given), "a number was given twice"
        self.given.append(serial)

    @staticmethod
    def name(token):
        return bytes([token % 2])

    @invariant()
    def books_are_those_of_the_model(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        blocks = range(self.pool.num_blocks)
        assert [self.pool.references(b) for b in blocks] == self.references
        assert [self.pool.generation(b) for b in blocks] == self.generations
        assert [self.pool.identity(b) for b in blocks] == [
            self.identities.get(b, NO_IDENTITY) for b in blocks
        ]
        names = {b: self.name(token) for (_, token), b in self.blocks.items()}
        assert [self.pool.block_hash(b) for b in blocks] == [names.get(b) for b in blocks]
        assert self.pool.num_free == len(self.free_order)
        num_cached = len(self.cached_order) + len(self.kept_order)
        assert self.pool.num_cached == num_cached
        assert self.pool.num_held == len(self.held())
        assert self.pool.num_available == len(self.free_order) + num_cached
        assert {s: self.pool.root(s) for s in SCOPES} == {
            s: self.roots.get(s, NO_IDENTITY) for s in SCOPES
        }


TestPool = PoolMachine.TestCase


TestPool.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
