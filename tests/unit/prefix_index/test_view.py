"""The router's view of who holds which blocks."""

import random

import pytest

from core.block_hash import BlockHash, block_hash, root_hash
from core.ids import Incarnation, WorkerId
from core.prefix_changes import PrefixChange, StorageTier
from prefix_index import view as view_module
from prefix_index.view import PrefixView

A, B = WorkerId("prefill-a"), WorkerId("prefill-b")
ONE, TWO = Incarnation(1), Incarnation(2)


def chain(num_blocks, scope="t"):
    parent = root_hash("m", scope)
    hashes = []
    for index in range(num_blocks):
        parent = block_hash(parent, [index] * 4)
        hashes.append(parent)
    return hashes


CHAIN = chain(600)


def stored(*hashes, **more):
    return PrefixChange(stored=hashes, **more)


def evicted(*hashes, **more):
    return PrefixChange(evicted=hashes, **more)


def test_leading_blocks_are_counted_for_each_worker():
    view = PrefixView()
    view.apply(A, ONE, stored(*CHAIN[:3], CHAIN[4]))
    view.apply(B, ONE, stored(*CHAIN[:500]))
    assert view.match(CHAIN) == {A: 3, B: 500}
    assert view.match(CHAIN[:2]) == {A: 2, B: 2}
    assert view.match(chain(5, "u")) == {}
    assert view.match([]) == {}
    assert view.match(CHAIN[1:4]) == {A: 2, B: 3}


def test_evicted_blocks_are_held_no_more():
    view = PrefixView()
    view.apply(A, ONE, stored(*CHAIN[:4]))
    view.apply(A, ONE, evicted(CHAIN[1], CHAIN[1], CHAIN[9]))
    assert view.match(CHAIN) == {A: 1}
    assert view.num_entries == 3
    view.apply(B, ONE, evicted(*CHAIN[:4]))
    assert view.match(CHAIN) == {A: 1}


def test_a_prefix_may_lie_in_several_tiers():
    view = PrefixView()
    view.apply(A, ONE, stored(*CHAIN[:2]))
    view.apply(A, ONE, stored(*CHAIN[1:5], tier=StorageTier.DISK))
    assert view.match(CHAIN) == {A: 5}
    assert view.tiers(A, CHAIN[1]) == (StorageTier.POOL, StorageTier.DISK)
    assert view.tiers(B, CHAIN[1]) == ()
    assert view.has_stored and view.match(CHAIN, StorageTier.POOL) == {A: 2}
    view.apply(A, ONE, evicted(*CHAIN[:2]))
    assert view.match(CHAIN) == {}
    assert view.match(CHAIN[1:]) == {A: 4}
    assert view.match(CHAIN[1:], StorageTier.POOL) == {}
    view.apply(A, ONE, evicted(*CHAIN[1:5], tier=StorageTier.DISK))
    assert not view.has_stored


def test_each_leading_block_lies_in_the_fastest_of_its_tiers():
    pool, disk = StorageTier.POOL, StorageTier.DISK
    view = PrefixView()
    view.apply(A, ONE, stored(*CHAIN[:2]))
    view.apply(A, ONE, stored(*CHAIN[1:4], *CHAIN[5:], tier=disk))
    assert view.leading_tiers(A, CHAIN) == [pool, pool, disk, disk]
    assert view.leading_tiers(A, CHAIN[3:]) == [disk]
    assert view.leading_tiers(B, CHAIN) == []
    view.forget(A)
    assert view.leading_tiers(A, CHAIN) == []


def test_a_whole_change_replaces_all_tiers():
    view = PrefixView()
    view.apply(A, ONE, stored(*CHAIN[:5]))
    view.apply(A, ONE, stored(*CHAIN[:5], tier=StorageTier.HOST))
    view.apply(A, ONE, stored(*CHAIN[:2], is_whole=True))
    assert view.match(CHAIN) == {A: 2}
    view.apply(A, ONE, PrefixChange(is_whole=True))
    assert view.match(CHAIN) == {}


def test_the_next_incarnation_voids_the_one_before_for_good():
    view = PrefixView()
    view.apply(A, ONE, stored(*CHAIN[:5]))
    view.apply(A, TWO, stored(*CHAIN[:2]))
    assert view.match(CHAIN) == {A: 2}
    view.apply(A, ONE, stored(*CHAIN[:9]))
    assert view.match(CHAIN) == {A: 2}


def test_of_lives_that_have_ended_the_oldest_is_remembered_no_more(monkeypatch):
    monkeypatch.setattr(view_module, "MAX_ENDED_LIVES", 2)
    view = PrefixView()
    for incarnation in (1, 2, 3, 4):
        view.apply(A, Incarnation(incarnation), stored(CHAIN[0]))
    for incarnation in (2, 3):
        view.apply(A, Incarnation(incarnation), stored(*CHAIN[:9]))
        assert view.match(CHAIN) == {A: 1}
    view.apply(A, ONE, stored(*CHAIN[:9]))
    assert view.match(CHAIN) == {A: 9}


def test_a_forgotten_worker_matches_nothing_and_its_entries_leave_in_slices():
    view = PrefixView()
    view.apply(A, ONE, stored(*CHAIN[:500]))
    view.apply(B, ONE, stored(*CHAIN[:300]))
    view.forget(A)
    view.forget(A)
    assert view.match(CHAIN) == {B: 300}
    assert view.num_leaving == 500
    assert view.sweep(100) == 400
    assert view.match(CHAIN) == {B: 300}
    assert view.sweep(1000) == 0
    assert view.num_entries == 300
    view.apply(A, ONE, stored(CHAIN[0]))
    assert view.match(CHAIN) == {A: 1, B: 300}


@pytest.mark.parametrize("num_asked", [511, 512, 513, 519, 520, 521, 600])
def test_prefixes_without_gaps_are_counted_exactly_at_any_length(num_asked):
    view = PrefixView()
    held = {WorkerId(f"w{n}"): n for n in (1, 300, 511, 512, 513, 516, 520, 521, 527, 599, 600)}
    for worker, count in held.items():
        view.apply(worker, ONE, stored(*CHAIN[:count]))
    expected = {worker: min(count, num_asked) for worker, count in held.items()}
    assert view.match(CHAIN[:num_asked]) == expected


def test_hashes_of_other_lengths_are_known_too():
    view = PrefixView()
    short = [BlockHash(bytes([n])) for n in range(5)]
    view.apply(A, ONE, stored(*short, CHAIN[0]))
    assert view.match(short) == {A: 5}
    assert view.match([CHAIN[0]]) == {A: 1}
    assert view.match([CHAIN[0], short[1]]) == {A: 2}


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_changes_leaves_what_simple_sets_hold(seed, monkeypatch):
    monkeypatch.setattr(view_module, "SLICE_BLOCKS", 3)
    monkeypatch.setattr(view_module, "MAX_SHARED_SETS", 2)
    rng = random.Random(seed)
    view = PrefixView()
    workers = [WorkerId(f"w{n}") for n in range(5)]
    books = {}
    incarnations = dict.fromkeys(workers, 1)
    for _ in range(300):
        worker = rng.choice(workers)
        tier = rng.choice(list(StorageTier))
        some = tuple(rng.sample(CHAIN[:12], rng.randrange(1, 8)))
        kind = rng.choice(["stored"] * 4 + ["evicted"] * 2 + ["whole", "forget", "restart"])
        if kind == "forget":
            view.forget(worker)
            books.pop(worker, None)
            continue
        if kind == "restart":
            incarnations[worker] += 1
            books.pop(worker, None)
        if kind == "whole":
            books[worker] = {}
        held = books.setdefault(worker, {}).setdefault(tier, set())
        held.difference_update(some) if kind == "evicted" else held.update(some)
        change = PrefixChange(
            () if kind == "evicted" else some,
            some if kind == "evicted" else (),
            tier,
            kind == "whole",
        )
        view.apply(worker, Incarnation(incarnations[worker]), change)
        expected = {}
        for name, tiers in books.items():
            union = set().union(*tiers.values())
            count = next((i for i, h in enumerate(CHAIN[:12]) if h not in union), 12)
            if count:
                expected[name] = count
        assert view.match(CHAIN[:12]) == expected
        in_pools = {}
        for name, tiers in books.items():
            held = tiers.get(StorageTier.POOL, set())
            count = next((i for i, h in enumerate(CHAIN[:12]) if h not in held), 12)
            if count:
                in_pools[name] = count
        assert view.match(CHAIN[:12], StorageTier.POOL) == in_pools
        assert view.num_entries == sum(len(s) for t in books.values() for s in t.values())
