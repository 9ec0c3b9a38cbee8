"""Cached blocks that leave after all others: whose they are, and the order among them.

Owns the marks, the shares, and who gives way when a share is full: the owner's block that was used
longest ago, or anybody's. Does not know references, contents, or why a block is kept.

Half of a pool is always left to the order of use alone, and no owner keeps more than an eighth of
it. A block that gives way is not evicted: it is cached like one that was used just now.

    all        head ⇄ block ⇄ block ⇄ …      those that nobody references, the oldest use first
    by owner   head ⇄ block ⇄ …              the same blocks
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from core.errors import InvariantViolation
from engine.scheduling.block_lists import BlockLists

ALL_SHARE = 2
"""At most one block in so many is kept."""
OWNER_SHARE = 8
"""At most one block in so many is kept for one owner."""
MAX_OWNERS = 4_096
_NOBODY = 0


class KeptBlocks:
    """Books in arrays, 18 bytes a block. A mark outlives references: it ends with the content."""

    def __init__(self, num_blocks: int) -> None:
        """Keep nothing."""
        self._max_kept = num_blocks // ALL_SHARE
        self._max_of_owner = num_blocks // OWNER_SHARE
        self._owner_of = array("H", [_NOBODY]) * num_blocks
        # Numbers are never given to another owner: marks of referenced blocks stand for them.
        self._numbers: dict[str, int] = {}
        self._counts: list[int] = [0]
        """Kept blocks of each owner, by its number."""
        self._all = BlockLists(num_blocks, num_lists=1)
        self._by_owner = BlockLists(num_blocks, num_lists=MAX_OWNERS + 1)
        self._head = num_blocks
        self.num_kept = 0

    def is_marked(self, block_id: int) -> bool:
        """True if a block is kept whenever nobody references it."""
        return self._owner_of[block_id] != _NOBODY

    def mark(self, block_id: int, owner: str) -> None:
        """Keep a block from now on, for the owner that it has if it has one."""
        if self._owner_of[block_id] == _NOBODY:
            self._owner_of[block_id] = self._number(owner)

    def unmark(self, block_id: int) -> None:
        """Forget whose a referenced block was: its content is gone."""
        self._owner_of[block_id] = _NOBODY

    def add(self, block_ids: Iterable[int]) -> list[int]:
        """Take marked blocks that nobody references any more; the first of them leaves first.

        Returns:
            Blocks that gave way, in order; their marks are gone.
        """
        gave_way = []
        for block_id in block_ids:
            number = self._owner_of[block_id]
            self._all.extend(self._head, (block_id,))
            self._by_owner.extend(self._head + number, (block_id,))
            self._counts[number] += 1
            self.num_kept += 1
            if self._counts[number] > self._max_of_owner:
                gave_way.append(self._pop(self._by_owner, self._head + number))
            elif self.num_kept > self._max_kept:
                gave_way.append(self._pop(self._all, self._head))
        return gave_way

    def remove(self, block_id: int) -> None:
        """A kept block is referenced again: it leaves the order, and stays marked."""
        self._all.remove(block_id)
        self._by_owner.remove(block_id)
        self._counts[self._owner_of[block_id]] -= 1
        self.num_kept -= 1

    def first(self, num_blocks: int) -> list[int]:
        """Return those that were used longest ago, at most so many."""
        return self._all.first(self._head, num_blocks)

    def take(self, num_blocks: int) -> list[int]:
        """Take so many of those that were used longest ago; their marks are gone."""
        return [self._pop(self._all, self._head) for _ in range(num_blocks)]

    def check(self) -> list[int]:
        """Compare the books.

        Returns:
            The kept blocks, the first to leave first.

        Raises:
            InvariantViolation: They do not balance.
        """
        kept = self._all.members(self._head)
        for number, num_owned in enumerate(self._counts):
            owned = self._by_owner.members(self._head + number)
            if owned != [b for b in kept if self._owner_of[b] == number] or (
                len(owned) != num_owned or num_owned > self._max_of_owner
            ):
                raise InvariantViolation(f"owner {number} keeps {owned}, {num_owned} are counted")
        if len(kept) != self.num_kept or self.num_kept > self._max_kept:
            raise InvariantViolation(f"{len(kept)} blocks are kept, {self.num_kept} are counted")
        return kept

    def _pop(self, lists: BlockLists, head: int) -> int:
        (block_id,) = lists.first(head, 1)
        self.remove(block_id)
        self.unmark(block_id)
        return block_id

    def _number(self, owner: str) -> int:
        number = self._numbers.get(owner)
        if number is None:
            if len(self._numbers) >= MAX_OWNERS:
                return _NOBODY
            number = self._numbers[owner] = len(self._numbers) + 1
            self._counts.append(0)
        return number
