"""Which blocks a storage tier holds, and in which order they leave."""

import random

import pytest

from core.block_hash import BlockHash
from core.errors import InvariantViolation
from core.stored_block import ChainDigest, StoredBlock
from engine.scheduling.block_changes import BlockChanges
from engine.scheduling.tier_book import DEEP_TOKENS, STALE_RANKS, TierBook, recompute_cost

SIZE = 16


def block(name, depth=0):
    return StoredBlock(ChainDigest(b"p" * 32), name.encode(), BlockHash(name.encode()), depth)


def held(book, name, depth=0, *, chain=1, uses=1, weight=1.0):
    """Enter a block; returns it."""
    one = block(name, depth)
    entry = book.admit(one, chain, uses, weight)
    book.written(entry)
    return one


def names(book, *blocks):
    return [one.tokens.decode() for one in blocks if book.find(one)]


def test_a_block_is_found_when_it_is_written_and_not_before():
    changes = BlockChanges()
    book = TierBook(2, SIZE, changes=changes)
    entry = book.admit(block("a"), 1, 1, 1.0)
    assert book.find(block("a")) is None and book.has(block("a"))
    assert changes.take(9) == ([], []) and book.registered(range(2)) == []
    book.written(entry)
    assert book.find(block("a")) is entry
    assert changes.take(9) == ([b"a"], []) and book.registered(range(2)) == [b"a"]
    assert book.admit(block("a"), 1, 1, 1.0) is None
    book.drop(entry)
    assert book.find(block("a")) is None and book.num_free == 2
    assert changes.take(9) == ([], [b"a"]) and book.registered(range(2)) == []
    book.check()


def test_other_content_under_the_same_digest_is_not_found(monkeypatch):
    """Nobody can make two contents with one digest; if somebody could, they would be told apart."""
    book = TierBook(2, SIZE)
    mine = held(book, "a")
    other = StoredBlock(mine.parent, b"b", mine.name, mine.depth)
    object.__setattr__(other, "digest", mine.digest)
    assert book.find(mine) is not None and book.find(other) is None


def test_the_block_used_longest_ago_leaves_first():
    book = TierBook(3, SIZE)
    a, b, c = (held(book, name) for name in "abc")
    book.use([book.find(a)], 1.0)
    d = held(book, "d")
    e = held(book, "e")
    assert names(book, a, b, c, d, e) == ["a", "d", "e"]
    assert book.num_evicted == 2
    book.check()


def test_of_one_prompt_the_tail_leaves_before_the_head():
    book = TierBook(8, SIZE)
    chain = [held(book, f"c{depth}", depth, chain=8) for depth in reversed(range(8))][::-1]
    book.use([book.find(one) for one in chain], 1.0)
    for i in range(3):
        held(book, f"new {i}", chain=8)
    assert names(book, *chain) == [f"c{depth}" for depth in range(5)]


def test_a_block_ranks_by_the_age_of_the_tier_and_by_its_cost_times_its_weight():
    """The age is blocks written and used by slots; a block after so many tokens costs 2."""
    deep = DEEP_TOKENS // SIZE
    assert recompute_cost(0) == 1.0 and recompute_cost(DEEP_TOKENS) == 2.0
    book = TierBook(4, SIZE)
    first = book.find(held(book, "first", deep, chain=deep, weight=3.0))
    assert first.rank == 0.25 + 3.0 * 2.0
    second = book.find(held(book, "second", weight=0.5, chain=0))
    assert second.rank == 0.5 + 0.5
    book.use([first, second], 1.0)
    assert (first.rank, first.weight, first.num_uses) == (1.0 + 3.0 * 2.0, 3.0, 2)
    assert (second.rank, second.weight, second.num_uses) == (1.0 + 2.0, 1.0, 2), "as the last one"
    book.use([second], 8.0)
    assert (second.rank, second.weight) == (1.25 + 8.0, 8.0)
    book.use([first], 1.0)
    assert first.rank == 1.5 + 3.0 * 2.0


def test_ranks_that_no_longer_count_are_swept():
    book = TierBook(4, SIZE)
    used = held(book, "used")
    num_ranks = []
    for _ in range(1_000):
        book.use([book.find(used)], 1.0)
        num_ranks.append(len(book._ranks))
    assert max(num_ranks) == STALE_RANKS * 2, "for the one block, and one more"
    assert min(num_ranks) == 1


def test_a_use_by_a_class_that_counts_less_takes_nothing_from_a_block():
    book = TierBook(3, SIZE)
    a, b, c = (held(book, name, weight=4.0) for name in "abc")
    book.use([book.find(a)], 0.25)
    d = held(book, "d", weight=4.0)
    assert names(book, a, b, c, d) == ["a", "c", "d"]


def test_a_use_in_a_short_prompt_takes_nothing_from_a_block_of_a_long_one():
    book = TierBook(2, SIZE)
    long = held(book, "long", chain=4_096)
    short = held(book, "short", chain=400)
    book.use([book.find(long)], 1.0)
    new = held(book, "new", chain=400)
    assert names(book, long, short, new) == ["long", "new"]


def test_what_costs_more_to_compute_stays_longer_but_not_for_ever():
    book = TierBook(4, SIZE)
    long = held(book, "long", chain=4_096)
    for i in range(10):
        held(book, f"short {i}", chain=1)
    assert names(book, long) == ["long"]
    for i in range(200):
        held(book, f"later {i}", chain=1)
    assert names(book, long) == []


def test_blocks_of_a_class_that_counts_less_leave_first():
    book = TierBook(4, SIZE)
    standard = [held(book, f"s{i}") for i in range(2)]
    batch = [held(book, f"b{i}", weight=0.25) for i in range(2)]
    held(book, "x", weight=0.25)
    held(book, "y", weight=0.25)
    assert names(book, *standard, *batch) == ["s0", "s1"]


def test_what_many_use_is_pinned_within_the_quota():
    book = TierBook(4, SIZE, pin_uses=3, max_pinned=2)
    pinned = [held(book, f"p{i}", uses=3) for i in range(3)]
    assert book.num_pinned == 2
    for i in range(40):
        held(book, f"new {i}")
    assert names(book, *pinned) == ["p0", "p1"]
    book.drop(book.find(pinned[0]))
    assert book.num_pinned == 1
    book.check()


def test_a_block_is_pinned_once_with_the_use_that_makes_it_due():
    book = TierBook(4, SIZE, pin_uses=3, max_pinned=2)
    entry = book.find(held(book, "a"))
    num_pinned = []
    for _ in range(3):
        book.use([entry], 1.0)
        num_pinned.append(book.num_pinned)
    assert num_pinned == [0, 1, 1]
    plain = TierBook(4, SIZE, max_pinned=2)
    held(plain, "a", uses=100)
    assert plain.num_pinned == 0


def test_a_slot_is_kept_while_somebody_copies_out_of_it():
    book = TierBook(2, SIZE)
    a = held(book, "a")
    entry = book.find(a)
    book.hold(entry)
    for i in range(5):
        held(book, f"new {i}")
    assert names(book, a) == ["a"]
    book.drop(entry)
    assert book.num_free == 0, "its slot is read still"
    book.check()
    book.release(entry)
    assert book.num_free == 1
    book.check()


def test_a_slot_of_many_readers_comes_free_once_with_the_last_of_them():
    book = TierBook(2, SIZE)
    entry = book.find(held(book, "a"))
    for _ in range(2):
        book.hold(entry)
    for _ in range(2):  # both found it damaged
        book.drop(entry)
    for num_free in (1, 2):
        book.release(entry)
        assert book.num_free == num_free
        book.check()


def test_nothing_is_admitted_while_every_slot_is_read():
    book = TierBook(1, SIZE)
    entry = book.find(held(book, "a"))
    book.hold(entry)
    assert book.admit(block("b"), 1, 1, 1.0) is None
    book.release(entry)
    assert book.admit(block("b"), 1, 1, 1.0) is not None


def test_a_slot_that_cannot_be_written_is_given_up():
    book = TierBook(2, SIZE)
    book.lose(book.admit(block("a"), 1, 1, 1.0))
    assert book.num_slots == 1 and book.num_free == 1
    book.check()


def test_what_an_earlier_life_left_is_found_in_its_slot():
    book = TierBook(4, SIZE)
    found = [(2, block("a")), (3, block("a")), (2, block("b")), (0, block("c"))]
    assert book.restore(found) == 2
    first = book.find(block("a"))
    assert first.slot == 2 and book.find(block("c")).slot == 0
    assert (first.rank, first.num_uses, first.weight) == (1.0, 1, 1.0)
    assert not book.find(block("b")) and book.num_free == 2
    book.check()


def test_a_full_disk_is_entered_without_a_search_for_each_slot():
    """A disk of 100 GB holds half a million blocks, and the worker does nothing else meanwhile."""
    compared = []

    class Slot(int):
        __hash__ = int.__hash__

        def __eq__(self, other):
            compared.append(other)
            return int(self) == other

    num_slots = 200
    book = TierBook(num_slots, SIZE)
    book._free = list(map(Slot, book._free))
    assert book.restore((slot, block(str(slot))) for slot in range(num_slots)) == num_slots
    assert len(compared) <= 2 * num_slots and book.num_free == 0
    book.check()


def test_pinned_blocks_are_not_looked_at_again_when_others_leave(monkeypatch):
    book = TierBook(40, SIZE, pin_uses=2, max_pinned=20)
    pinned = [held(book, f"p{i}", uses=2) for i in range(20)]
    for i in range(20):
        held(book, f"a{i}")
    looked_at = []
    counts = TierBook._counts
    monkeypatch.setattr(
        TierBook, "_counts", staticmethod(lambda one: looked_at.append(one) or counts(one))
    )
    for i in range(10):
        held(book, f"b{i}")
    assert len(names(book, *pinned)) == 20 and book.num_evicted == 10
    assert len(looked_at) <= 20 + 10, "each pinned one once at most"
    book.check()


def test_unbalanced_books_are_noticed():
    book = TierBook(2, SIZE)
    held(book, "a")
    book._free.append(book.find(block("a")).slot)
    with pytest.raises(InvariantViolation, match="do not add up"):
        book.check()


@pytest.mark.parametrize("damage", ["slots", "one slot twice", "both", "free twice", "pinned"])
def test_each_book_is_compared(damage):
    book = TierBook(6, SIZE)
    first, second = (book.find(held(book, name)) for name in "ab")
    match damage:
        case "slots":
            book.num_slots += 1
        case "one slot twice":
            second.slot = first.slot
        case "both":
            second.slot = book._free[0]
        case "free twice":
            book._free[0] = book._free[1]
        case "pinned":
            book.num_pinned += 1
    with pytest.raises(InvariantViolation, match="do not add up"):
        book.check()


def test_books_balance_whatever_happens():
    rng = random.Random(5)
    book = TierBook(20, SIZE, pin_uses=4, max_pinned=5)
    writing, reading = [], []
    for step in range(5_000):
        name = f"{rng.randrange(60)}"
        depth = rng.randrange(6)
        match rng.randrange(7):
            case 0 | 1:
                weight = rng.choice([0.25, 1.0, 4.0])
                entry = book.admit(block(name, depth), depth + 1, rng.randrange(1, 4), weight)
                if entry is not None:
                    writing.append(entry)
            case 2 | 3 if writing:
                book.written(writing.pop(rng.randrange(len(writing))))
            case 4 if writing:
                book.drop(writing.pop())
            case 5 if (entry := book.find(block(name, depth))) is not None:
                book.use([entry], 1.0)
                book.hold(entry)
                reading.append(entry)
            case 6 if reading:
                entry = reading.pop(rng.randrange(len(reading)))
                if rng.random() < 0.2:
                    book.drop(entry)
                book.release(entry)
        book.check()
        assert len(book._ranks) <= 4 * (len(book) + 2), step
