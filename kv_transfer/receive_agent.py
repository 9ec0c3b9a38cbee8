"""The transfers that a worker receives, and its probes of peers, on a loop of their own.

Owns the table of live receivers and the probes under way. Does not know scheduling.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from core.config import TransferConfig
from core.errors import ServingError
from core.ids import TransferId
from core.kv_layout import KVLayout
from core.ports import KVBytes, MessageStream, Network
from core.session import RouteReport
from kv_transfer import frames
from kv_transfer.agent import OnFault, TransferAgent, log_fault
from kv_transfer.failures import failure_of
from kv_transfer.probing import PROBE_TIMEOUT_S, probe
from kv_transfer.receive_stream import ReceiveStream
from kv_transfer.receiver import FetchOrder, Receiver, ReceiverCallbacks
from kv_transfer.reserved_blocks import Reservation
from kv_transfer.transitions import Transition

MAX_PROBES = 512
"""Queued at once: as many peers as a large cluster has. They run one after the other."""


class ReceiveAgentCallbacks(ReceiverCallbacks, Protocol):
    """What an agent reports beside its transfers."""

    def route_found(self, route: RouteReport) -> None:
        """A route to a peer was measured, as `ReceiveAgent.probe_peer` was asked to."""
        ...


class ReceiveAgent(TransferAgent):
    """All transfers into one worker."""

    def __init__(
        self,
        network: Network,
        callbacks: ReceiveAgentCallbacks,
        kv: KVBytes,
        layout: KVLayout,
        config: TransferConfig,
        generation_of: Callable[[int], int],
        now_s: Callable[[], float] | None = None,
        on_fault: OnFault = log_fault,
    ) -> None:
        """Keep the collaborators; `listen` starts it.

        Args:
            network: Carries raw bytes.
            callbacks: Who asked for the transfers.
            kv: The pool's bytes.
            layout: What a block looks like.
            config: Sizes and times.
            generation_of: Current generation of a block, to fence late writes.
            now_s: A finer clock than the loop's, for measuring; None: the loop's.
            on_fault: See `OnFault`.
        """
        super().__init__(network, config, on_fault)
        self._callbacks = callbacks
        self._kv = kv
        self._layout = layout
        self._generation_of = generation_of
        self._now_s = now_s or (lambda: asyncio.get_running_loop().time())
        self._receivers: dict[TransferId, Receiver] = {}
        self._probing = asyncio.Semaphore()
        self._num_probes = 0
        self.num_late_frames = 0
        self.num_resent = 0

    @property
    def num_live(self) -> int:
        """Transfers with any state left; zero at rest."""
        return len(self._receivers)

    def _end_transfers(self) -> None:
        for receiver in list(self._receivers.values()):
            receiver.end()

    def _fail(self, transfer_id: TransferId, error: ServingError) -> None:
        if receiver := self._receivers.get(transfer_id):
            receiver.fail(error)
        else:
            self._callbacks.transfer_failed(transfer_id, error)

    async def _serve_open(self, stream: MessageStream, opened: frames.Open) -> None:
        """No KV leaves a decode worker."""
        await self._turn_away(stream, frames.NotFound())

    # --- from the role ----------------------------------------------------------------------------

    def fetch(self, order: FetchOrder) -> None:
        """Open a Fetch stream; `transfer_starting` is reported when the sender is ready."""
        with self._contained(order.transfer_id):
            stream = ReceiveStream(
                order,
                self._callbacks,
                self._kv,
                self._layout,
                self._config.lease_s,
                self._generation_of,
                self._note,
                self._config.copy_threads,
            )
            self._note(Transition.RECEIVER_FETCHING)
            # Entered before its task runs: the worker may end it at once.
            self._receivers[order.transfer_id] = stream.receiver
            self._own(self._receive(stream))

    async def _receive(self, stream: ReceiveStream) -> None:
        receiver = stream.receiver
        try:
            await stream.run(self._network, self._config.open_timeout_s)
        finally:
            # Its counters outlive it.
            del self._receivers[receiver.order.transfer_id]
            self.num_late_frames += receiver.num_late_frames
            self.num_resent += receiver.num_resent

    def reserved(self, transfer_id: TransferId, reservation: Reservation) -> None:
        """Blocks are reserved: frames may come."""
        with self._contained(transfer_id):
            if receiver := self._receivers.get(transfer_id):
                receiver.reserved(reservation)

    def refuse(self, transfer_id: TransferId, error: ServingError) -> None:
        """No room."""
        with self._contained(transfer_id):
            if receiver := self._receivers.get(transfer_id):
                receiver.refuse(error)

    def ack(self, transfer_id: TransferId) -> None:
        """Attached."""
        with self._contained(transfer_id):
            if receiver := self._receivers.get(transfer_id):
                receiver.ack()

    def end_fetch(self, transfer_id: TransferId) -> None:
        """Stop writing; `transfer_closed` is the answer, also for an unknown one."""
        with self._contained(transfer_id):
            if receiver := self._receivers.get(transfer_id):
                receiver.end()
            else:
                # It ended by itself, and its report crossed with this call.
                self._callbacks.transfer_closed(transfer_id)

    def probe_peer(self, address: str, probe_bytes: int) -> None:
        """Measure the route to a peer; `route_found` reports it.

        More than a few hundred at once are not tried.
        """
        # A bound on tasks: routers ask for a probe of each pair, and there may be many of both.
        if self._num_probes < MAX_PROBES:
            self._num_probes += 1
            self._own(self._probe_peer(address, probe_bytes))

    async def _probe_peer(self, address: str, probe_bytes: int) -> None:
        try:
            # One by one, or they would measure one another; the timeout begins with the turn.
            async with self._probing, asyncio.timeout(PROBE_TIMEOUT_S):
                route = await probe(
                    self._network, address, probe_bytes, self._config.frame_bytes, self._now_s
                )
        except TimeoutError:
            route = RouteReport(address, error=f"no answer within {PROBE_TIMEOUT_S:g} s")
        except Exception as error:  # noqa: BLE001 - the route is closed, and the report has the reason; logged
            route = RouteReport(address, error=failure_of(error, "the probe").message)
        finally:
            self._num_probes -= 1
        self._callbacks.route_found(route)
