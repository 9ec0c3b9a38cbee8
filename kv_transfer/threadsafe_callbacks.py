"""Callbacks from the agent's loop to the worker's, and what happens when one breaks.

Owns the crossing: every call is posted, in order, and never waits. Does not know what the calls
mean.

A loop only logs what a callback raises, so a fault is caught here. In a step of a transfer it fails
that transfer's attempt. In the calls that end a transfer or give its blocks back it ends the
worker: nobody knows then which blocks are free.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from core.errors import ServingError
from core.ids import TransferId
from core.session import RouteReport
from core.types import Logprob
from kv_transfer.failures import failure_of
from kv_transfer.receiver import Arrival, ReceiverCallbacks
from kv_transfer.sender import SenderCallbacks

Post = Callable[..., object]
"""`post(fn, *args)`: run `fn(*args)` soon on another loop."""
FailTransfer = Callable[[TransferId, ServingError], None]
"""End the attempt that a transfer belongs to, on the worker's loop."""
log = logging.getLogger(__name__)


def watched(post: Post, on_fault: Callable[[BaseException], None]) -> Post:
    """Make a `Post` to the same loop that passes to `on_fault`, there, what a call raised."""

    def run(call: Callable[..., object], args: tuple[object, ...]) -> None:
        try:
            call(*args)
        except Exception as error:  # noqa: BLE001 - the loop would log it; `on_fault` decides
            on_fault(error)

    return lambda call, *args: post(run, call, args)


class _ThreadsafeCallbacks:
    """What both directions share."""

    def __init__(self, post: Post, fail: FailTransfer) -> None:
        self._post = post
        self._fail = fail

    def _step(self, call: Callable[[], None], transfer_id: TransferId) -> None:
        self._post(self._take, call, transfer_id)

    def _take(self, call: Callable[[], None], transfer_id: TransferId) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - this transfer's attempt is made again; logged
            self._fail(transfer_id, failure_of(error, "a step of the transfer"))


class ThreadsafeSenderCallbacks(_ThreadsafeCallbacks):
    """A `SenderCallbacks` on another loop."""

    def __init__(
        self,
        owner_of: Callable[[TransferId], SenderCallbacks],
        post: Post,
        fail: FailTransfer,
    ) -> None:
        """Keep who owns each transfer there, the `Post` to that loop, and what fails a transfer.

        The owner is asked for when the call arrives: only that loop knows its transfers.
        """
        super().__init__(post, fail)
        self._owner_of = owner_of

    def transfer_reserved(self, transfer_id: TransferId, have_blocks: int) -> None:
        """See `SenderCallbacks`."""
        self._step(
            lambda: self._owner_of(transfer_id).transfer_reserved(transfer_id, have_blocks),
            transfer_id,
        )

    def transfer_sent(self, transfer_id: TransferId) -> None:
        """See `SenderCallbacks`."""
        self._step(lambda: self._owner_of(transfer_id).transfer_sent(transfer_id), transfer_id)

    # The next two end a transfer or give blocks back: not `_step`, since to fail the attempt again
    # would not bring the blocks back.

    def transfer_lost(self, transfer_id: TransferId, error: ServingError) -> None:
        """See `SenderCallbacks`."""
        self._post(lambda: self._owner_of(transfer_id).transfer_lost(transfer_id, error))

    def transfer_drained(self, transfer_id: TransferId, sub_attempt: int) -> None:
        """See `SenderCallbacks`."""
        self._post(lambda: self._owner_of(transfer_id).transfer_drained(transfer_id, sub_attempt))


class ThreadsafeReceiverCallbacks(_ThreadsafeCallbacks):
    """A `ReceiverCallbacks` on another loop."""

    def __init__(
        self,
        owner_of: Callable[[TransferId], ReceiverCallbacks],
        report: Callable[[RouteReport], None],
        post: Post,
        fail: FailTransfer,
    ) -> None:
        """Keep who owns each transfer there, as above, and who takes reports of routes."""
        super().__init__(post, fail)
        self._owner_of = owner_of
        self._report_to = report

    def transfer_starting(self, transfer_id: TransferId, num_tokens: int) -> None:
        """See `ReceiverCallbacks`."""
        self._step(
            lambda: self._owner_of(transfer_id).transfer_starting(transfer_id, num_tokens),
            transfer_id,
        )

    def transfer_arrived(
        self, transfer_id: TransferId, first_tokens: dict[int, Logprob], arrival: Arrival
    ) -> None:
        """See `ReceiverCallbacks`."""
        self._step(
            lambda: self._owner_of(transfer_id).transfer_arrived(
                transfer_id, first_tokens, arrival
            ),
            transfer_id,
        )

    def transfer_finished(self, transfer_id: TransferId) -> None:
        """See `ReceiverCallbacks`."""
        self._step(lambda: self._owner_of(transfer_id).transfer_finished(transfer_id), transfer_id)

    def transfer_failed(self, transfer_id: TransferId, error: ServingError) -> None:
        """See `ReceiverCallbacks`."""
        self._post(lambda: self._owner_of(transfer_id).transfer_failed(transfer_id, error))

    def transfer_closed(self, transfer_id: TransferId) -> None:
        """See `ReceiverCallbacks`."""
        self._post(lambda: self._owner_of(transfer_id).transfer_closed(transfer_id))

    def route_found(self, route: RouteReport) -> None:
        """Report a route that was measured; a fault is only logged, since nobody waits for it."""
        self._post(self._report, route)

    def _report(self, route: RouteReport) -> None:
        try:
            self._report_to(route)
        except Exception:
            # A measurement belongs to no attempt, and the worker can go on without it.
            log.exception("the report of a route to %s could not be used", route.address)
