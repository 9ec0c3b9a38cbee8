"""A worker's pool as it was when a transfer was promised.

Owns the comparison of generations: a rank group that starts again brings new memory, views of the
old stay readable, and KV that is copied to or from there is lost or wrong. Does not know streams or
states.
"""

from __future__ import annotations

from core.errors import KVTransferError
from core.kv_layout import KVLayout
from core.ports import KVBytes, MappedStream, MessageStream
from kv_transfer.resharding import Grid, PoolParts

FIRST_GENERATION = 1
"""Of a pool that was never replaced."""


class FencedPool:
    """The pool in one generation; every use of another one is refused."""

    def __init__(self, kv: KVBytes, generation: int) -> None:
        """Keep the generation that the worker saw, on its own loop, when it made the promise."""
        self._kv, self._generation = kv, generation

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

    def parts(self, layout: KVLayout, grid: Grid, threads: int = 1) -> PoolParts:
        """Address the pool by parts of a grid.

        Raises:
            KVTransferError: As `check`.
            LayoutMismatch: The segments cannot be a pool of this layout.
        """
        parts = PoolParts(self._kv.segments(), layout, grid, threads)
        self.check()  # afterwards: the generation changes before the segments do
        return parts

    def check_mapping(self, stream: MessageStream) -> None:
        """Compare what the peer has mapped, if it has, with the pool of now.

        Raises:
            KVTransferError: It was replaced between the peer's dialling and its Open.
        """
        if not isinstance(stream, MappedStream):
            return
        shared = self._kv.shared()
        if shared is None or shared.name != stream.pool_name:
            raise KVTransferError(
                "the peer has mapped a KV pool that was replaced since; "
                "its next stream maps this one"
            )
