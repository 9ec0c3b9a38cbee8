"""Which cached blocks came and went since somebody last asked.

Owns the log between one pool and whoever publishes its content: bounded, constant time a change,
the last word on each block only. Does not know pools, publishers or time.

If more changes than it keeps are not fetched in time, the log holds none of them, and the
whole content is due.
"""

from __future__ import annotations

from collections.abc import Callable

from core.block_hash import BlockHash

MAX_CHANGES = 65_536


class BlockChanges:
    """Changes not fetched yet, by block; in the order of their last change."""

    def __init__(self, max_changes: int = MAX_CHANGES) -> None:
        """Start with nothing known outside: all is to be read."""
        self._max_changes = max_changes
        self._is_stored: dict[BlockHash, bool] = {}
        self._is_whole_due = True
        self._on_change: Callable[[], None] | None = None

    @property
    def is_whole_due(self) -> bool:
        """True if what was reported before is void, and the pool's content is to be read."""
        return self._is_whole_due

    def __len__(self) -> int:
        """Changes not fetched yet."""
        return len(self._is_stored)

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call `on_change` at the first change after nothing was left; one watcher."""
        self._on_change = on_change

    # --- what the pool reports ----------------------------------------------------------------

    def stored(self, block_hash: BlockHash) -> None:
        """A block can be found now."""
        self._note(block_hash, is_stored=True)

    def evicted(self, block_hash: BlockHash) -> None:
        """A block cannot be found any more."""
        self._note(block_hash, is_stored=False)

    def dropped(self) -> None:
        """No block can be found any more."""
        was_idle = not self._is_stored
        self._is_stored.clear()
        self._is_whole_due = True
        if was_idle:
            self._wake()

    # --- what is fetched ----------------------------------------------------------------------

    def begin_whole(self) -> None:
        """The caller reads the pool from now on, in slices if it likes, and takes changes after.

        A change is how a block is now, so that one which the reading has seen does no harm.
        """
        self._is_whole_due = False

    def void(self) -> None:
        """What was taken is lost: the whole content is due."""
        self._is_whole_due = True

    def take(self, max_changes: int) -> tuple[list[BlockHash], list[BlockHash]]:
        """Take the oldest changes.

        Returns:
            The blocks stored and those evicted; none is in both.
        """
        stored: list[BlockHash] = []
        evicted: list[BlockHash] = []
        changes = self._is_stored
        if len(changes) <= max_changes:
            taken = changes
            self._is_stored = {}
        else:
            names = [name for name, _ in zip(changes, range(max_changes), strict=False)]
            taken = {name: changes.pop(name) for name in names}
        for block_hash, is_stored in taken.items():
            (stored if is_stored else evicted).append(block_hash)
        return stored, evicted

    def _note(self, block_hash: BlockHash, *, is_stored: bool) -> None:
        changes = self._is_stored
        if not changes:
            self._wake()
        changes.pop(block_hash, None)
        changes[block_hash] = is_stored
        if len(changes) > self._max_changes:
            changes.clear()
            self._is_whole_due = True

    def _wake(self) -> None:
        if self._on_change is not None:
            self._on_change()
