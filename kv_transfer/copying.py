"""Moves parts of KV and sums them up in the same pass, at the speed of memory.

Owns one compiled kernel and the checksum it computes. Does not know pools, grids or frames. Called by
`kv_transfer.resharding`. It holds no lock of the interpreter, so the loop beside it goes on.

The checksum of a part is two sums over its words: of the words, and of the products of their halves
after each word was crossed with its place (the idea of XXH3 and of NH, RFC 4418). One changed word
always changes the first; words that change together or trade places change the second. It guards
against damage and mix-ups, not against an enemy: peers prove who they are by TLS.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

Array = np.ndarray[Any, Any]
ODD = np.uint64(0x9E3779B97F4A7C15)
OTHER_ODD = np.uint64(0xD6E8FEB86659FD93)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


@numba.njit(nogil=True, cache=True)
def _move(source, source_at, source_steps, target, target_at, target_steps, rows, size, writes, tallies):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0913
    """Copy parts of `rows` = (outer, inner) rows of `size` words; steps are the words between rows."""
    for part in range(len(source_at)):
        plain = np.uint64(0)
        crossed = np.uint64(0)
        place = np.uint64(0)
        for outer in range(rows[0]):
            for inner in range(rows[1]):
                start = source_at[part] + outer * source_steps[0] + inner * source_steps[1]
                if writes:
                    to = target_at[part] + outer * target_steps[0] + inner * target_steps[1]
                    target[to : to + size] = source[start : start + size]
                first = np.uint64(0)
                second = np.uint64(0)
                for i in range(size):
                    word = np.uint64(source[start + i])
                    mixed = word ^ ((place + np.uint64(i)) * ODD)
                    first += word
                    second += (mixed & LOW) * (mixed >> HALF)
                plain += first
                crossed += second
                place += np.uint64(size)
        folded = (plain ^ (crossed >> np.uint64(29))) * ODD
        tallies[part] = folded ^ (folded >> HALF) ^ (crossed * OTHER_ODD)


def move(
    source: Array, source_at: Array, source_steps: tuple[int, int],
    target: Array | None, target_at: Array, target_steps: tuple[int, int], rows: tuple[int, int], size: int,
) -> Array:  # fmt: skip
    """Copy parts from one array of words to another and return their tallies, uint64 [n].

    Args:
        source: uint64 or uint8 [any], not changed.
        source_at: int64 [n], first word of each part.
        source_steps: Words between outer and inner rows of a part.
        target: As `source`; None: nothing is written.
        target_at: int64 [n].
        target_steps: As `source_steps`.
        rows: Outer and inner rows of a part.
        size: Words of a row.
    """
    if target is None:
        target = np.empty(0, source.dtype)
        writes = False
    else:
        writes = True
    tallies = np.empty(len(source_at), np.uint64)
    _move(
        _read_only(source), source_at, source_steps, target, target_at, target_steps, rows, size, writes, tallies
    )  # fmt: skip
    return tallies


def _read_only(array: Array) -> Array:
    """One type for all sources, so that the kernel is compiled once."""
    view = array.view()
    view.flags.writeable = False
    return view


def warm() -> None:
    """Compile the kernel, or load it, before the first transfer needs it."""
    words = np.zeros(8, np.uint64)
    at = np.zeros(1, np.int64)
    move(words, at, (8, 8), np.zeros(8, np.uint64), at, (8, 8), (1, 1), 8)


def bind(tallies: Array, seed: int, *identity: Array) -> Array:
    """Bind tallies to what they claim to belong to: any other claim gives another checksum.

    Args:
        tallies: uint64 [n].
        seed: What all of them share.
        identity: Integers [n] each.

    Returns:
        Checksums, uint64 [n].
    """
    bound = np.full(len(tallies), seed & (2**64 - 1), np.uint64)
    for numbers in (*identity, tallies):
        bound = (bound ^ numbers.astype(np.uint64)) * ODD
        bound ^= bound >> HALF
    return bound
