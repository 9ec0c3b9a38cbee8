"""A worker's pool as it was when a transfer was promised.

Owns the comparison of generations: a rank group that starts again brings new memory, views of the
old stay readable, and KV that is copied to or from there is lost or wrong. Does not know streams or
states.
"""

from __future__ import annotations

from core.errors import KVTransferError
from core.kv_layout import KVLayout
from core.ports import KVBytes
from kv_transfer.resharding import Grid, PoolView

FIRST_GENERATION = 1
"""Of a pool that was never replaced."""


class FencedPool:
    """The pool in one generation; every use of another one is refused."""

    def __init__(self, kv: KVBytes, generation: int) -> None:
        """Keep the generation that the worker saw, on its own loop, when it made the promise."""
        self._kv = kv
        self._generation = generation

    def check(self) -> None:
        """Compare the generations.

        Raises:
            KVTransferError: The memory was replaced since; the attempt has to be made again.
        """
        if self._kv.generation != self._generation:
            raise KVTransferError(
                f"the KV pool is in generation {self._kv.generation}, this transfer was promised "
                f"in {self._generation}: the ranks started again, and so must the attempt"
            )

    def view(self, layout: KVLayout, grid: Grid, threads: int = 1) -> PoolView:
        """Address the pool by fragments of a grid.

        Raises:
            KVTransferError: As `check`.
            LayoutMismatch: The segments cannot be a pool of this layout.
        """
        view = PoolView(self._kv.segments(), layout, grid, threads)
        # Afterwards: the generation is raised before the segments change, so that segments of a
        # later generation cannot pass for those that were promised.
        self.check()
        return view

    def check_mapping(self, mapped_pool: bytes | None) -> None:
        """Compare what the peer has mapped, if it has, with the pool of now.

        Raises:
            KVTransferError: It was replaced between the peer's dialling and its Open.
        """
        if mapped_pool is None:
            return
        shared = self._kv.shared()
        if shared is None or shared.name != mapped_pool:
            raise KVTransferError(
                "the peer has mapped a KV pool that was replaced since; "
                "its next stream maps this one"
            )
