"""Which blocks one storage tier below the pool holds, and which of them leave for others.

Owns the slots of a tier: free, being written, or holding a block that can be found; the order in
which blocks leave, what is pinned, and the counts. Does not know bytes, files or time.

    free ──admit──▶ writing ──written──▶ held ──admit of another──▶ free
      ▲                │ failed                │ drop (it could not be read)
      └────────────────┴───────────────────────┘

Blocks leave by rank, the lowest first: the tier's age when a block was last used, plus what it
would cost to compute again times the weight of its tenant's class. The age counts how often the
tier could have been filled by what was written and used, so a block that costs twice as much stays
one filling longer, and what is not used any more sinks, however dear it was (as in GreedyDual,
Young 1994). All blocks of a prompt are used together and get the rank of the last of them; of equal
ranks the deepest leaves first, since nothing behind a gap can be found.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from core.block_hash import BlockHash
from core.errors import InvariantViolation
from core.stored_block import ChainDigest, StoredBlock
from engine.scheduling.block_changes import BlockChanges

DEEP_TOKENS = 4_096
"""Attention over so many tokens costs about as much again as everything else in a block."""
STALE_RANKS = 4
"""Ranks that no longer count are swept once there are so many for each block."""


def recompute_cost(num_tokens_before: int) -> float:
    """What it costs to compute a block after so many tokens; 1 for the first."""
    return 1.0 + num_tokens_before / DEEP_TOKENS


@dataclass(slots=True, eq=False)
class Entry:
    """A block in a slot."""

    block: StoredBlock
    slot: int
    rank: float
    num_uses: int
    weight: float
    turn: int = 0
    """When it was ranked last; older ranks do not count."""
    is_written: bool = False
    is_pinned: bool = False
    num_readers: int = 0
    """Copies out of the slot that are under way: it is kept for them."""
    is_dropped: bool = False
    """Not to be found any more; its slot comes free with the last reader."""


class TierBook:
    """Books of one tier. free + writing + held = number of slots, always."""

    def __init__(
        self,
        num_slots: int,
        block_size_tokens: int,
        *,
        pin_uses: int = 0,
        max_pinned: int = 0,
        changes: BlockChanges | None = None,
    ) -> None:
        """Start with every slot free.

        Args:
            num_slots: Blocks that the tier holds.
            block_size_tokens: Of a block.
            pin_uses: Blocks that so many sequences used are pinned; 0: none.
            max_pinned: The quota of pinned blocks.
            changes: Notes what can be found.
        """
        self.num_slots = num_slots
        self.num_pinned = 0
        self.num_evicted = 0
        self._block_size_tokens = block_size_tokens
        self._pin_uses = pin_uses
        self._max_pinned = max_pinned
        self._changes = changes
        self._slots: list[Entry | None] = [None] * num_slots
        """What is found in each."""
        self._free = list(reversed(range(num_slots)))
        self._entries: dict[ChainDigest, Entry] = {}
        self._num_lingering = 0
        """Entries that were dropped while somebody read them."""
        self._num_used = 0
        """Blocks written and used so far."""
        self._ranks: list[tuple[float, int, int, Entry]] = []
        self._turn = 0

    def __len__(self) -> int:
        """Blocks with a slot, those being written included."""
        return len(self._entries)

    @property
    def num_free(self) -> int:
        """Slots that nothing lies in."""
        return len(self._free)

    def registered(self, slots: range) -> list[BlockHash]:
        """Return the names of those blocks in some slots that can be found."""
        return [entry.block.name for entry in self._slots[slots.start : slots.stop] if entry]

    # --- finding ------------------------------------------------------------------------------

    def find(self, block: StoredBlock) -> Entry | None:
        """Find a block that can be read: exactly this one."""
        entry = self._entries.get(block.digest)
        is_found = entry is not None and entry.is_written and entry.block.is_same(block)
        return entry if is_found else None

    def has(self, block: StoredBlock) -> bool:
        """True if the block has a slot, be it written or not."""
        return block.digest in self._entries

    def use(self, entries: Iterable[Entry], weight: float) -> None:
        """Count a use of a prompt's blocks, which rank from now on as the last of them does."""
        used = list(entries)
        cost = self._cost(max((entry.block.depth for entry in used), default=0))
        self._num_used += len(used)
        for entry in used:
            entry.num_uses += 1
            entry.weight = max(entry.weight, weight)
            self._rank(entry, max(entry.rank, self._age + entry.weight * cost))
            self._pin_if_due(entry)

    def hold(self, entry: Entry) -> None:
        """Keep a slot as it is while somebody copies out of it."""
        entry.num_readers += 1

    def release(self, entry: Entry) -> None:
        """Nobody copies for this `hold` any more."""
        entry.num_readers -= 1
        if entry.is_dropped and not entry.num_readers:
            self._num_lingering -= 1
            self._free.append(entry.slot)

    # --- coming and going ---------------------------------------------------------------------

    def admit(
        self, block: StoredBlock, num_chain_blocks: int, num_uses: int, weight: float
    ) -> Entry | None:
        """Give a block a slot to be written to; another may leave for it.

        Args:
            block: Which has no slot yet.
            num_chain_blocks: Of the longest prompt that it was part of.
            num_uses: How many sequences had it.
            weight: Of the class of their tenants.

        Returns:
            None if the block has a slot already, or nothing can leave.
        """
        if self.has(block) or not (self._free or self._evict()):
            return None
        self._num_used += 1
        rank = self._age + weight * self._cost(num_chain_blocks)
        entry = Entry(block, self._free.pop(), rank, num_uses, weight)
        self._entries[block.digest] = entry
        return entry

    def written(self, entry: Entry) -> None:
        """The block lies in its slot and can be found."""
        entry.is_written = True
        self._rank(entry, entry.rank)
        self._pin_if_due(entry)
        self._slots[entry.slot] = entry
        if self._changes is not None:
            self._changes.stored(entry.block.name)

    def lose(self, entry: Entry) -> None:
        """The block could not be written, nor can any other be: its slot is given up."""
        self.drop(entry)
        self._free.remove(entry.slot)
        self.num_slots -= 1

    def drop(self, entry: Entry) -> None:
        """The block is not to be found: it could not be written or read."""
        if entry.is_dropped:
            return
        entry.is_dropped = True
        del self._entries[entry.block.digest]
        if entry.is_pinned:
            self.num_pinned -= 1
        if entry.is_written:
            self._slots[entry.slot] = None
            if self._changes is not None:
                self._changes.evicted(entry.block.name)
        if entry.num_readers:
            self._num_lingering += 1
        else:
            self._free.append(entry.slot)

    def restore(self, found: Iterable[tuple[int, StoredBlock]]) -> int:
        """Take over what was found in free slots when the worker started.

        Returns:
            How many blocks; one that is known already keeps its first slot.
        """
        taken = set()
        for slot, block in found:
            if self.has(block) or slot in taken:
                continue
            taken.add(slot)
            # Equal for all of them: what it was part of is not known, and the deepest goes first.
            entry = Entry(block, slot, self._age + 1.0, num_uses=1, weight=1.0)
            self._entries[block.digest] = entry
            self.written(entry)
        # Once for all: a disk of a million slots would be searched a million times.
        self._free = [slot for slot in self._free if slot not in taken]
        return len(taken)

    # --- ranks --------------------------------------------------------------------------------

    @property
    def _age(self) -> float:
        return self._num_used / self.num_slots

    def _cost(self, num_chain_blocks: int) -> float:
        return recompute_cost(num_chain_blocks * self._block_size_tokens)

    def _rank(self, entry: Entry, rank: float) -> None:
        entry.rank = rank
        if entry.is_pinned:
            return
        self._turn += 1
        entry.turn = self._turn
        heapq.heappush(self._ranks, (rank, -entry.block.depth, self._turn, entry))
        if len(self._ranks) > STALE_RANKS * (len(self._entries) + 1):
            self._ranks = list(filter(self._counts, self._ranks))
            heapq.heapify(self._ranks)

    @staticmethod
    def _counts(ranked: tuple[float, int, int, Entry]) -> bool:
        """True unless the block has left, ranks otherwise by now, or is pinned, which never ends.

        Pinned ones sink below all others: each eviction would have to step over every one of them.
        """
        entry = ranked[-1]
        return not (entry.is_dropped or entry.is_pinned) and entry.turn == ranked[2]

    def _evict(self) -> bool:
        """Let the lowest block leave that is not pinned or read; False if there is none."""
        passed_over = []
        is_found = False
        while self._ranks and not is_found:
            lowest = heapq.heappop(self._ranks)
            entry = lowest[-1]
            if not self._counts(lowest):
                continue
            if entry.num_readers:
                passed_over.append(lowest)
                continue
            is_found = True
            self.num_evicted += 1
            self.drop(entry)
        for ranked in passed_over:
            heapq.heappush(self._ranks, ranked)
        return is_found

    def _pin_if_due(self, entry: Entry) -> None:
        is_due = self._pin_uses and entry.num_uses >= self._pin_uses
        # What many sequences begin with is a system prompt, whoever sent it.
        if is_due and not entry.is_pinned and self.num_pinned < self._max_pinned:
            entry.is_pinned = True
            self.num_pinned += 1

    # --- proof --------------------------------------------------------------------------------

    def check(self) -> None:
        """Compare the books.

        Raises:
            InvariantViolation: They do not balance; the message carries the counts.
        """
        slots = {entry.slot for entry in self._entries.values()}
        num_pinned = sum(entry.is_pinned for entry in self._entries.values())
        num_known = len(self._free) + len(self._entries) + self._num_lingering
        is_balanced = (
            num_known == self.num_slots
            and len(slots) == len(self._entries)
            and slots.isdisjoint(self._free)
            and len(set(self._free)) == len(self._free)
            and num_pinned == self.num_pinned
        )
        if not is_balanced:
            raise InvariantViolation(
                f"tier of {self.num_slots}: {len(self._free)} free, {len(self._entries)} known, "
                f"{self._num_lingering} lingering, {num_pinned} of {self.num_pinned} pinned do "
                "not add up"
            )
