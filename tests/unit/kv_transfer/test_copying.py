"""The kernel that copies and sums KV: every way a row can go gives the sums of plain arithmetic."""

import numpy as np
import pytest

from kv_transfer import copying
from kv_transfer.copying import move

MASK = 2**64 - 1
ODD, OTHER_ODD = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93


def checksum(words):
    """The checksum of a part, as the module's docstring says it, in Python's integers."""
    plain = crossed = 0
    for place, word in enumerate(int(w) for w in words):
        mixed = word ^ (place * ODD & MASK)
        plain += word
        crossed += (mixed & 0xFFFFFFFF) * (mixed >> 32)
    plain, crossed = plain & MASK, crossed & MASK
    folded = (plain ^ (crossed >> 29)) * ODD & MASK
    return folded ^ (folded >> 32) ^ (crossed * OTHER_ODD & MASK)


def aligned(size, shift):
    """uint64 [size] that begins `shift` words after a cache line."""
    memory = np.zeros(size + 16, np.uint64)
    begin = (-memory.ctypes.data // 8) % 8 + shift
    return memory[begin : begin + size]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shift", [0, 3], ids=["aligned", "not"])
@pytest.mark.parametrize(("rows", "size"), [((1, 1), 64), ((2, 4), 8), ((2, 3), 5), ((1, 2), 1)])
def test_copies_and_sums_are_those_of_plain_arithmetic(rows, size, shift, threads, monkeypatch):
    monkeypatch.setattr(copying, "MIN_SHARED_FRAGMENTS", 4)
    rng = np.random.default_rng(1)
    source = rng.integers(0, 2**64, 4096, dtype=np.uint64)
    steps = (rows[1] * 2 * size, 2 * size)
    at = np.arange(9) * 256
    targets, to = aligned(4096, shift), at[::-1].copy()
    got = move(source, at, steps, targets, to, steps, rows, size, threads)
    only = move(source, at, steps, None, at, steps, rows, size, threads)
    for n, (begin, end) in enumerate(zip(at, to, strict=True)):
        places = [
            outer * steps[0] + inner * steps[1]
            for outer in range(rows[0])
            for inner in range(rows[1])
        ]
        words = np.concatenate([source[begin + p : begin + p + size] for p in places])
        assert got[n] == only[n] == checksum(words)
        assert (np.concatenate([targets[end + p : end + p + size] for p in places]) == words).all()


def test_bytes_that_are_no_words_go_one_by_one():
    source = np.random.default_rng(2).integers(0, 256, 300, dtype=np.uint8)
    target, at = np.zeros(300, np.uint8), np.array([0, 100])
    got = move(source, at, (50, 25), target, at, (50, 25), (2, 2), 25)
    assert [int(g) for g in got] == [checksum(source[:100]), checksum(source[100:200])]
    assert (target[:200] == source[:200]).all() and not target[200:].any()
