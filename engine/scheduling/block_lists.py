"""Circular lists of block ids inside two integer arrays: O(1) to join, leave and splice.

Owns the order of blocks in each list. Does not know what the lists mean. A block is in at most one
list at a time; that is the caller's to see to.

A list has a head, an id behind the last block. Its first block is the head's next, its last block
the head's previous, and an empty list is a head that is next to itself:

    head ⇄ first ⇄ … ⇄ last ⇄ head
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class BlockLists:
    """Lists over the blocks `0` to `num_blocks - 1`; 8 bytes a block, however they are spread."""

    def __init__(self, num_blocks: int, num_lists: int) -> None:
        """Make empty lists; their heads are `num_blocks`, `num_blocks + 1` and so on."""
        self._next = array("i", range(num_blocks + num_lists))
        self._previous = array("i", self._next)

    def extend(self, head: int, block_ids: Iterable[int]) -> None:
        """Put blocks that are in no list at the end of one."""
        following, previous = self._next, self._previous
        last = previous[head]
        for block_id in block_ids:
            following[last] = block_id
            previous[block_id] = last
            last = block_id
        following[last] = head
        previous[head] = last

    def take(self, head: int, num_blocks: int) -> list[int]:
        """Take the first blocks out of a list that has as many."""
        following = self._next
        taken = []
        first = following[head]
        for _ in range(num_blocks):
            taken.append(first)
            first = following[first]
        # The links of what was taken stay as they are: joining a list writes them anew.
        following[head] = first
        self._previous[first] = head
        return taken

    def first(self, head: int, num_blocks: int) -> list[int]:
        """Look at the first blocks of a list, at most so many."""
        found: list[int] = []
        block_id = self._next[head]
        while block_id != head and len(found) < num_blocks:
            found.append(block_id)
            block_id = self._next[block_id]
        return found

    def remove(self, block_id: int) -> None:
        """Take one block out of the list it is in."""
        before = self._previous[block_id]
        after = self._next[block_id]
        self._next[before] = after
        self._previous[after] = before

    def splice(self, source: int, target: int) -> None:
        """Move a whole list to the end of another, in its order."""
        first = self._next[source]
        last = self._previous[source]
        if first == source:
            return
        end = self._previous[target]
        self._next[end] = first
        self._previous[first] = end
        self._next[last] = target
        self._previous[target] = last
        self._next[source] = source
        self._previous[source] = source

    def members(self, head: int) -> list[int]:
        """Blocks of a list, from the first on; ends early where its two directions disagree."""
        found = []
        last = head
        block_id = self._next[head]
        while block_id != head and self._previous[block_id] == last:
            found.append(block_id)
            last = block_id
            block_id = self._next[block_id]
        return found
