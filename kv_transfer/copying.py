"""Copies fragments of KV and sums them up in the same pass, at the speed of memory.

Owns one compiled kernel and the checksum it computes. Does not know pools, grids or frames. It
holds no lock of the interpreter, so the loop beside it goes on.

The checksum of a fragment is two sums over its words: of the words, and of the products of their
halves after each word was crossed with its place (the idea of XXH3 and of NH, RFC 4418). One
changed word always changes the first; words that change together or trade places change the second.
It guards against damage and mix-ups, not against an enemy: peers authenticate by TLS.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

Array = np.ndarray[Any, Any]
ODD = np.uint64(0x9E3779B97F4A7C15)
OTHER_ODD = np.uint64(0xD6E8FEB86659FD93)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's names (malloc.h)."""
MIN_SHARED_FRAGMENTS = 32
"""Fewer are not worth waking another thread."""
KEPT_CHUNK_BYTES = 32 << 20
KEPT_BYTES = 256 << 20
LINE_WORDS = 8
PLAINLY, BY_LINES, PAST_THE_CACHE = 0, 1, 2
"""How a row is copied: word by word; plainly, but summed by cache lines; copied and summed by lines
in one loop."""
_WORD = ir.IntType(64)
_INDEX = ir.IntType(32)
_LINE = ir.VectorType(_WORD, LINE_WORDS)


def _line_of(*words: int) -> Any:  # noqa: ANN401 - llvmlite has no types
    """A constant line of eight words, or of one word eight times."""
    every = words * LINE_WORDS if len(words) == 1 else words
    return ir.Constant(_LINE, [ir.Constant(_WORD, word & (2**64 - 1)) for word in every])


def _sum_of_lines(*, copies: bool) -> Any:  # noqa: ANN401
    """Make the loop over the lines of a row, eight words at a time: load, sum, perhaps store.

    The store goes past the cache: an ordinary one first reads the line it is going to overwrite, a
    third of the traffic for nothing. Its place must be aligned to 64 bytes, or the process dies.
    What is summed is what was stored: a source that is overwritten meanwhile shows.
    """

    @intrinsic
    def sum_lines(typing, source, i, target, j, lines, place):  # type: ignore[no-untyped-def]
        del typing
        signature = types.containers.UniTuple(types.uint64, 2)(source, i, target, j, lines, place)

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            def lines_at(array: int, index: int) -> Any:  # noqa: ANN401
                data = context.make_array(signature.args[array])(
                    context, builder, arguments[array]
                ).data
                return builder.bitcast(builder.gep(data, [arguments[index]]), _LINE.as_pointer())

            def add_to(variable: Any, value: Any) -> None:  # noqa: ANN401
                builder.store(builder.add(builder.load(variable), value), variable)

            def total(variable: Any) -> Any:  # noqa: ANN401
                line = builder.load(variable)
                words = [
                    builder.extract_element(line, ir.Constant(_INDEX, n)) for n in range(LINE_WORDS)
                ]
                return functools.reduce(builder.add, words)

            read, written = lines_at(0, 1), lines_at(2, 3)
            begin = builder.mul(arguments[5], ir.Constant(_WORD, int(ODD)))
            one = builder.insert_element(_line_of(0), begin, ir.Constant(_INDEX, 0))
            begins = builder.shuffle_vector(
                one, one, ir.Constant(ir.VectorType(_INDEX, LINE_WORDS), [0] * LINE_WORDS)
            )
            keys = builder.add(begins, _line_of(*(int(ODD) * n for n in range(LINE_WORDS))))
            key = cgutils.alloca_once_value(builder, keys)
            first = cgutils.alloca_once_value(builder, _line_of(0))
            second = cgutils.alloca_once_value(builder, _line_of(0))
            with cgutils.for_range(builder, arguments[4]) as loop:
                words = builder.load(builder.gep(read, [loop.index]), align=8)
                if copies:
                    store = builder.store(words, builder.gep(written, [loop.index]), align=64)
                    store.set_metadata(
                        "nontemporal", builder.module.add_metadata([ir.Constant(_INDEX, 1)])
                    )
                mixed = builder.xor(words, builder.load(key))
                add_to(key, _line_of(int(ODD) * LINE_WORDS))
                add_to(first, words)
                halves = (
                    builder.and_(mixed, _line_of(int(LOW))),
                    builder.lshr(mixed, _line_of(int(HALF))),
                )
                add_to(second, builder.mul(*halves))
            return context.make_tuple(builder, signature.return_type, [total(first), total(second)])

        return signature, generate

    return sum_lines


_copy_and_sum_lines, _sum_lines = _sum_of_lines(copies=True), _sum_of_lines(copies=False)


@intrinsic
def _fence(typing):  # type: ignore[no-untyped-def]
    """Order stores that went past the cache before what follows.

    They are weakly ordered: without it the other process could see a message before its bytes.
    """
    del typing

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        del signature, arguments
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@numba.njit(nogil=True, cache=True)
def _sum_words(source, start, size, place):  # type: ignore[no-untyped-def]
    """The sums of a row that is not made of lines."""
    first = np.uint64(0)
    second = np.uint64(0)
    for i in range(size):
        word = np.uint64(source[start + i])
        mixed = word ^ ((place + np.uint64(i)) * ODD)
        first += word
        second += (mixed & LOW) * (mixed >> HALF)
    return first, second


@numba.njit(nogil=True, cache=True)
def _move(  # type: ignore[no-untyped-def]
    source,
    source_at,
    source_steps,
    target,
    target_at,
    target_steps,
    rows,
    size,
    how,
    has_target,
    tallies,
):
    """Copy fragments of `rows` = (outer, inner) rows of `size` words; steps are words between rows.

    All in one call: to enter the kernel costs more than a small fragment.
    """
    lines = size // LINE_WORDS
    for fragment in range(len(source_at)):
        plain = np.uint64(0)
        crossed = np.uint64(0)
        place = np.uint64(0)
        for outer in range(rows[0]):
            for inner in range(rows[1]):
                start = source_at[fragment] + outer * source_steps[0] + inner * source_steps[1]
                to = target_at[fragment] + outer * target_steps[0] + inner * target_steps[1]
                # `place` runs on over the rows, so that two rows cannot trade places unseen.
                if how == PAST_THE_CACHE:
                    first, second = _copy_and_sum_lines(source, start, target, to, lines, place)
                else:
                    if has_target:
                        target[to : to + size] = source[start : start + size]
                    if how == BY_LINES:
                        first, second = _sum_lines(source, start, source, start, lines, place)
                    else:
                        first, second = _sum_words(source, start, size, place)
                plain += first
                crossed += second
                place += np.uint64(size)
        # Mixed, so that every bit of both sums reaches every bit of the tally.
        folded = (plain ^ (crossed >> np.uint64(29))) * ODD
        tallies[fragment] = folded ^ (folded >> HALF) ^ (crossed * OTHER_ODD)
    if how == PAST_THE_CACHE:
        _fence()


def move(
    source: Array,
    source_at: Array,
    source_steps: tuple[int, int],
    target: Array | None,
    target_at: Array,
    target_steps: tuple[int, int],
    rows: tuple[int, int],
    size: int,
    threads: int = 1,
) -> Array:
    """Copy fragments from one array of words to another and return their tallies, uint64 [n].

    Args:
        source: uint64 or uint8 [any], not changed.
        source_at: int64 [n], first word of each fragment.
        source_steps: Words between outer and inner rows of a fragment.
        target: As `source`; None: nothing is written.
        target_at: int64 [n].
        target_steps: As `source_steps`.
        rows: Outer and inner rows of a fragment.
        size: Words of a row.
        threads: Cores to share the fragments among; the kernel holds no lock.
    """
    # Not zeroed: the kernel writes every one.
    tallies = np.empty(len(source_at), np.uint64)
    has_target = target is not None
    if target is None:
        # An array of the same type, so that the kernel is compiled once for both cases.
        target = np.empty(0, source.dtype)
    # The loop over lines needs whole lines; past the cache they must be aligned as well. Both sums
    # are the same whichever loop runs, so the two ends may choose differently.
    how = PLAINLY
    if source.dtype == np.uint64 and size % LINE_WORDS == 0:
        is_aligned = has_target and _is_aligned(target, target_at, (*target_steps, size))
        how = PAST_THE_CACHE if is_aligned else BY_LINES
    read = _read_only(source)

    def some(begin: int, end: int) -> None:
        mine = slice(begin, end)
        _move(
            read,
            source_at[mine],
            source_steps,
            target,
            target_at[mine],
            target_steps,
            rows,
            size,
            how,
            has_target,
            tallies[mine],
        )

    count = len(source_at)
    if threads == 1 or count < MIN_SHARED_FRAGMENTS:
        some(0, count)
        return tallies
    cuts = [count * n // threads for n in range(threads + 1)]
    others = [_copy_threads(threads - 1).submit(some, *cut) for cut in itertools.pairwise(cuts[1:])]
    some(0, cuts[1])  # this thread has no better work meanwhile
    for other in others:
        other.result()  # raises here what was raised there
    return tallies


@functools.cache
def _copy_threads(count: int) -> ThreadPoolExecutor:
    """Threads that copy beside the caller's; idle ones cost nothing."""
    return ThreadPoolExecutor(count, thread_name_prefix="kv-copy")


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
    """Make this process ready to move much: the kernel compiled or loaded, freed memory kept."""
    _keep_freed_memory()
    words = np.zeros(8, np.uint64)
    at = np.zeros(1, np.int64)
    move(words, at, (8, 8), np.zeros(8, np.uint64), at, (8, 8), (1, 1), 8)


def _keep_freed_memory() -> None:
    """Let glibc keep what was freed.

    A frame's megabyte comes from the system zeroed, page by page: that costs more than filling it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_CHUNK_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


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
