"""Host calls carried from the agent's loop to the worker's.

Owns the crossing: every call is posted, in order, and never waits. Does not know what the calls
mean. Called by `worker.unit` when it wires an agent to a role.
"""

from __future__ import annotations

from collections.abc import Callable

from core.errors import ServingError
from core.ids import TransferId
from core.session import WayReport
from core.types import Logprob
from kv_transfer.receiver import Arrival, ReceiverHost
from kv_transfer.sender import SenderHost

Post = Callable[..., object]
"""`post(fn, *args)`: run `fn(*args)` soon on another loop."""


class PostedSenderHost:
    """A `SenderHost` on another loop."""

    def __init__(self, host: SenderHost, post: Post) -> None:
        """Keep the real host and the way to its loop."""
        self._host, self._post = host, post

    def transfer_reserved(self, transfer_id: TransferId, have_blocks: int) -> None:
        """See `SenderHost`."""
        self._post(self._host.transfer_reserved, transfer_id, have_blocks)

    def transfer_sent(self, transfer_id: TransferId) -> None:
        """See `SenderHost`."""
        self._post(self._host.transfer_sent, transfer_id)

    def transfer_lost(self, transfer_id: TransferId, error: ServingError) -> None:
        """See `SenderHost`."""
        self._post(self._host.transfer_lost, transfer_id, error)

    def transfer_drained(self, transfer_id: TransferId, sub_attempt: int) -> None:
        """See `SenderHost`."""
        self._post(self._host.transfer_drained, transfer_id, sub_attempt)


class PostedReceiverHost:
    """A `ReceiverHost` on another loop."""

    def __init__(self, host: ReceiverHost, post: Post) -> None:
        """Keep the real host and the way to its loop."""
        self._host, self._post = host, post

    def transfer_starting(self, transfer_id: TransferId, num_tokens: int) -> None:
        """See `ReceiverHost`."""
        self._post(self._host.transfer_starting, transfer_id, num_tokens)

    def transfer_arrived(
        self, transfer_id: TransferId, first_tokens: dict[int, Logprob], arrival: Arrival
    ) -> None:
        """See `ReceiverHost`."""
        self._post(self._host.transfer_arrived, transfer_id, first_tokens, arrival)

    def transfer_finished(self, transfer_id: TransferId) -> None:
        """See `ReceiverHost`."""
        self._post(self._host.transfer_finished, transfer_id)

    def transfer_failed(self, transfer_id: TransferId, error: ServingError) -> None:
        """See `ReceiverHost`."""
        self._post(self._host.transfer_failed, transfer_id, error)

    def transfer_closed(self, transfer_id: TransferId) -> None:
        """See `ReceiverHost`."""
        self._post(self._host.transfer_closed, transfer_id)

    def way_found(self, way: WayReport) -> None:
        """See `ReceiverHost`."""
        self._post(self._host.way_found, way)
