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
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

Array = np.ndarray[Any, Any]
ODD = np.uint64(0x9E3779B97F4A7C15)
OTHER_ODD = np.uint64(0xD6E8FEB86659FD93)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


LINE_WORDS = 8
NOTHING, PLAINLY, PAST_THE_CACHE = 0, 1, 2


@intrinsic
def _copy_line(typing, source, i, target, j):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Copy a cache line past the cache. The target's place must be aligned to 64 bytes, or the process dies.

    An ordinary store first reads the line it is going to overwrite: a third of the traffic for nothing.
    """
    del typing
    signature = types.void(source, i, target, j)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        line = ir.VectorType(ir.IntType(64), LINE_WORDS)

        def place(array, index):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
            return builder.bitcast(builder.gep(data, [arguments[index]]), line.as_pointer())

        store = builder.store(builder.load(place(0, 1), align=8), place(2, 3), align=64)  # type: ignore[no-untyped-call]
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _fence(typing):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Let lines that went past the cache be seen before what follows."""
    del typing

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        del signature, arguments
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@numba.njit(nogil=True, cache=True)
def _move(source, source_at, source_steps, target, target_at, target_steps, rows, size, how, tallies):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, PLR0913
    """Copy parts of `rows` = (outer, inner) rows of `size` words; steps are the words between rows.

    A row is summed where it was read, after it was copied: a source that is overwritten in between shows.
    """
    for part in range(len(source_at)):
        plain = np.uint64(0)
        crossed = np.uint64(0)
        place = np.uint64(0)
        for outer in range(rows[0]):
            for inner in range(rows[1]):
                start = source_at[part] + outer * source_steps[0] + inner * source_steps[1]
                to = target_at[part] + outer * target_steps[0] + inner * target_steps[1]
                if how == PLAINLY:
                    target[to : to + size] = source[start : start + size]
                elif how == PAST_THE_CACHE:
                    for i in range(0, size, LINE_WORDS):
                        _copy_line(source, start + i, target, to + i)
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
    if how == PAST_THE_CACHE:
        _fence()


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
    tallies = np.empty(len(source_at), np.uint64)
    if target is None:
        how, target = NOTHING, np.empty(0, source.dtype)
    elif source.dtype == np.uint64 and _is_aligned(target, target_at, (*target_steps, size)):
        how = PAST_THE_CACHE
    else:
        how = PLAINLY
    _move(_read_only(source), source_at, source_steps, target, target_at, target_steps, rows, size, how, tallies)
    return tallies


def _is_aligned(target: Array, target_at: Array, words: tuple[int, ...]) -> bool:
    """True if every row begins on a cache line and is made of whole ones."""
    is_whole = target.ctypes.data % (8 * LINE_WORDS) == 0 and not any(n % LINE_WORDS for n in words)
    return is_whole and not (target_at % LINE_WORDS).any()


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
