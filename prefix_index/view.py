"""Which worker holds which blocks, as one router knows it.

Owns the view: block to workers for each storage tier, the prefix each worker holds of a prompt, and
the removal of a worker in slices. Does not know where changes come from, nor time.

A view may be old or wrong: workers compare every block before they use it, so that a wrong entry
costs a hit and never an answer. Blocks are known by the first eight bytes of their hash, and a
block's holders are the bits of one integer, which equal sets of holders share:

    blocks     key ──▶ 0b0101        slots     0 ──▶ prefill-a    2 ──▶ prefill-c
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import repeat
from operator import or_

from core.block_hash import DIGEST_BYTES, BlockHash
from core.ids import Incarnation, WorkerId, WorkerLife
from core.prefix_changes import PrefixChange, StorageTier

KEY_BYTES = 8
SLICE_BLOCKS = 256
"""Blocks of a prompt that are looked up, or of a lost worker that are removed, in one go."""
NUM_EXACT = 512
SPAN_BLOCKS = 8
"""Past the first blocks of a prompt only each eighth is looked up, and those before it where it is
not held by all: pools evict a prefix from its tail, so that gaps are rare, and cost only hits."""
MAX_SHARED_SETS = 65_536
MAX_ENDED_LIVES = 4_096


@dataclass(slots=True)
class _Holder:
    """What one life of a worker holds, and the bit that stands for it."""

    worker: WorkerId
    incarnation: Incarnation
    slot: int
    keys: dict[StorageTier, set[int]] = field(default_factory=dict)

    @property
    def num_entries(self) -> int:
        return sum(map(len, self.keys.values()))


class PrefixView:
    """Leading blocks of a prompt, by worker. Every call but `match` is linear in its change."""

    def __init__(self) -> None:
        """Start with no workers."""
        self._blocks: dict[StorageTier, dict[int, int]] = {}
        self._holders: dict[WorkerId, _Holder] = {}
        self._names: list[WorkerId] = []
        """Who has which bit; of a free one, who had it last."""
        self._free_slots: list[int] = []
        self._live = 0
        """Bits of the workers in `_holders`."""
        self._leaving: deque[_Holder] = deque()
        self._ended: OrderedDict[WorkerLife, None] = OrderedDict()
        self._shared_sets: dict[int, int] = {}

    @property
    def num_entries(self) -> int:
        """Pairs of a block in one storage tier and a worker, of those known."""
        return sum(holder.num_entries for holder in self._holders.values())

    @property
    def num_leaving(self) -> int:
        """Entries of forgotten workers, still to be removed."""
        return sum(holder.num_entries for holder in self._leaving)

    @property
    def is_empty(self) -> bool:
        """True if no worker has published anything."""
        return not self._holders

    @property
    def has_stored(self) -> bool:
        """True if anybody holds blocks below its pool."""
        return any(blocks for tier, blocks in self._blocks.items() if tier is not StorageTier.POOL)

    def workers(self) -> dict[WorkerId, int]:
        """Return the entries of each worker known."""
        return {worker: holder.num_entries for worker, holder in self._holders.items()}

    # --- changes ------------------------------------------------------------------------------

    def apply(self, worker: WorkerId, incarnation: Incarnation, change: PrefixChange) -> None:
        """Take over what a worker published. Its next incarnation voids all that this one did.

        A change of an incarnation that was followed by another has no effect.
        """
        # A slice with every change, so that what has left goes away without a pause of its own.
        self.sweep(SLICE_BLOCKS)
        if (worker, incarnation) in self._ended:
            return
        holder = self._holders.get(worker)
        if holder is not None and holder.incarnation != incarnation:
            self._end((worker, holder.incarnation))
            self.forget(worker)
            holder = None
        elif holder is not None and change.is_whole:
            self.forget(worker)
            holder = None
        if holder is None:
            holder = self._enter(worker, incarnation)
        self._add(holder, change.tier, _keys(change.stored))
        self._remove(holder, change.tier, _keys(change.evicted))

    def forget(self, worker: WorkerId, incarnation: Incarnation | None = None) -> None:
        """Match a worker no more; its entries are removed in slices by later calls.

        Args:
            worker: Which.
            incarnation: If it is still this one; None: whichever.
        """
        holder = self._holders.get(worker)
        if holder is not None and incarnation in (None, holder.incarnation):
            del self._holders[worker]
            self._live ^= 1 << holder.slot
            self._leaving.append(holder)

    def sweep(self, max_blocks: int) -> int:
        """Remove some entries of forgotten workers.

        Returns:
            How many entries are left to remove.
        """
        while self._leaving and max_blocks > 0:
            holder = self._leaving[0]
            for tier, keys in holder.keys.items():
                some = [keys.pop() for _ in range(min(len(keys), max_blocks))]
                max_blocks -= len(some)
                self._clear(tier, 1 << holder.slot, some)
            if holder.num_entries == 0:
                self._leaving.popleft()
                self._free_slots.append(holder.slot)
        return self.num_leaving

    # --- questions ----------------------------------------------------------------------------

    def match(
        self, block_hashes: Sequence[BlockHash], tier: StorageTier | None = None
    ) -> dict[WorkerId, int]:
        """Count the leading blocks that each worker holds; who has none is left out.

        Args:
            block_hashes: Of a prompt's full blocks, in order. Gaps past the first `NUM_EXACT` may
                be overlooked.
            tier: Where they lie; None: in any tier, each in its own.
        """
        tables = [blocks for each, blocks in self._blocks.items() if tier in (None, each)]
        tables = [blocks for blocks in tables if blocks] or [{}]
        matched: dict[WorkerId, int] = {}
        holding = self._live
        start = 0
        for end, seen in self._probes(block_hashes, tables):
            if holding & seen != holding:
                # A span of one block has been looked up already.
                inside = _held_by(block_hashes[start:end], tables) if end - start > 1 else (seen,)
                for index, held_by in enumerate(inside, start):
                    left = holding & ~held_by
                    if left:
                        if index:
                            self._note(matched, left, index)
                        holding ^= left
                if not holding:
                    return matched
            start = end
        if start:
            self._note(matched, holding, start)
        return matched

    def tiers(self, worker: WorkerId, block_hash: BlockHash) -> tuple[StorageTier, ...]:
        """Return the tiers in which a worker holds a block."""
        holder = self._holders.get(worker)
        if holder is None:
            return ()
        key = _keys((block_hash,))[0]
        return tuple(tier for tier, keys in sorted(holder.keys.items()) if key in keys)

    def leading_tiers(
        self, worker: WorkerId, block_hashes: Sequence[BlockHash]
    ) -> list[StorageTier]:
        """Return the fastest tier of each leading block that a worker holds."""
        holder = self._holders.get(worker)
        found: list[StorageTier] = []
        if holder is None:
            return found
        tiers = sorted(holder.keys.items())
        for key in _keys(block_hashes):
            for tier, keys in tiers:
                if key in keys:
                    found.append(tier)
                    break
            else:
                break
        return found

    # --- books --------------------------------------------------------------------------------

    def _enter(self, worker: WorkerId, incarnation: Incarnation) -> _Holder:
        if self._free_slots:
            slot = self._free_slots.pop()
        else:
            slot = len(self._names)
            self._names.append(worker)
        holder = _Holder(worker, incarnation, slot)
        self._names[slot] = worker
        self._holders[worker] = holder
        self._live |= 1 << slot
        return holder

    def _end(self, life: WorkerLife) -> None:
        self._ended[life] = None
        if len(self._ended) > MAX_ENDED_LIVES:
            self._ended.popitem(last=False)

    def _add(self, holder: _Holder, tier: StorageTier, keys: Sequence[int]) -> None:
        if not keys:
            return
        blocks = self._blocks.setdefault(tier, {})
        bit = 1 << holder.slot
        sets = self._shared_sets
        if len(sets) > MAX_SHARED_SETS:
            sets.clear()
        for key in keys:
            holders = blocks.get(key, 0) | bit
            blocks[key] = sets.setdefault(holders, holders)
        holder.keys.setdefault(tier, set()).update(keys)

    def _remove(self, holder: _Holder, tier: StorageTier, keys: Iterable[int]) -> None:
        held = holder.keys.get(tier)
        if held:
            gone = held.intersection(keys)
            held.difference_update(gone)
            self._clear(tier, 1 << holder.slot, gone)

    def _clear(self, tier: StorageTier, bit: int, keys: Iterable[int]) -> None:
        """Take one holder from blocks that have it."""
        blocks = self._blocks[tier]
        sets = self._shared_sets
        for key in keys:
            holders = blocks[key] ^ bit
            if holders:
                blocks[key] = sets.setdefault(holders, holders)
            else:
                del blocks[key]

    def _probes(
        self, block_hashes: Sequence[BlockHash], tables: Sequence[Mapping[int, int]]
    ) -> Iterator[tuple[int, int]]:
        """Yield the ends of spans that cover the blocks, with the holders of each span's last."""
        num_blocks = len(block_hashes)
        fine = range(1, min(num_blocks, NUM_EXACT) + 1)
        coarse = range(NUM_EXACT + SPAN_BLOCKS, num_blocks, SPAN_BLOCKS)
        last = (num_blocks,) if num_blocks > NUM_EXACT else ()
        for ends in (*_slices(fine), *_slices(coarse), last):
            held_by = _held_by([block_hashes[end - 1] for end in ends], tables)
            yield from zip(ends, held_by, strict=True)

    def _note(self, matched: dict[WorkerId, int], holders: int, num_blocks: int) -> None:
        # From the highest bit down: numbers get shorter, and few holders cost little.
        while holders:
            slot = holders.bit_length() - 1
            matched[self._names[slot]] = num_blocks
            holders ^= 1 << slot


def _held_by(
    block_hashes: Sequence[BlockHash], tables: Sequence[Mapping[int, int]]
) -> Iterable[int]:
    """Return the holders of each block in any of the tables, as bits."""
    keys = _keys(block_hashes)
    return reduce(partial(map, or_), [map(table.get, keys, repeat(0)) for table in tables])


def _slices(numbers: range) -> Iterator[range]:
    return (numbers[at : at + SLICE_BLOCKS] for at in range(0, len(numbers), SLICE_BLOCKS))


def _keys(block_hashes: Sequence[BlockHash]) -> Sequence[int]:
    """Shorten hashes to integers; all at once if they have their usual length."""
    joined = b"".join(block_hashes)
    if len(joined) == DIGEST_BYTES * len(block_hashes):
        return array("Q", joined).tolist()[:: DIGEST_BYTES // KEY_BYTES]
    return [
        int.from_bytes(block_hash[:KEY_BYTES].ljust(KEY_BYTES, b"\0"), sys.byteorder)
        for block_hash in block_hashes
    ]
