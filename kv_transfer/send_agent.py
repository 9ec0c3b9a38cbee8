"""The transfers that a worker sends, on a loop of their own.

Owns the table of live senders, parked opens, tombstones and leases. Does not know scheduling.
"""

from __future__ import annotations

import asyncio

from core.config import TransferConfig
from core.errors import KVTransferError, ServingError, to_wire
from core.ids import TransferId
from core.kv_layout import KVLayout
from core.ports import KVBytes, MessageStream, Network
from core.types import Logprob
from kv_transfer import frames
from kv_transfer.agent import OnFault, TransferAgent, log_fault
from kv_transfer.fetch_stream import HEARTBEAT_S
from kv_transfer.parking import ParkingLot
from kv_transfer.send_stream import SendStream
from kv_transfer.sender import LAST_SUB_ATTEMPT, Blocks, Offer, Sender, SenderCallbacks
from kv_transfer.transitions import Transition

TOMBSTONE_S = 10.0
"""Longer than a late Open can be on its way: what ended is refused at once, not parked."""
_TAKEN = KVTransferError("this transfer has a stream already; a receiver opens one")


class SendAgent(TransferAgent):
    """All transfers out of one worker."""

    def __init__(
        self,
        network: Network,
        callbacks: SenderCallbacks,
        kv: KVBytes,
        layout: KVLayout,
        config: TransferConfig,
        on_fault: OnFault = log_fault,
    ) -> None:
        """Keep the collaborators; `listen` starts it.

        Args:
            network: Carries raw bytes.
            callbacks: Who offers the transfers.
            kv: The pool's bytes.
            layout: What a block looks like.
            config: Sizes and times.
            on_fault: See `OnFault`.
        """
        super().__init__(network, config, on_fault)
        self._callbacks = callbacks
        self._kv = kv
        self._layout = layout
        self._streams: dict[TransferId, SendStream] = {}
        self._tombstones: dict[TransferId, float] = {}
        self._parked = ParkingLot()
        self.num_sent_bytes = 0

    async def listen(self) -> str:
        """Serve Fetch and watch the leases; returns the address to publish."""
        address = await super().listen()
        self._own(self._watch_leases())
        return address

    @property
    def num_live(self) -> int:
        """Transfers with any state left, tombstones apart; zero at rest."""
        return len(self._streams) + len(self._parked)

    def _end_transfers(self) -> None:
        for stream in list(self._streams.values()):
            stream.sender.end(KVTransferError("the prefill worker is shutting down"))

    def _fail(self, transfer_id: TransferId, error: ServingError) -> None:
        if stream := self._streams.get(transfer_id):
            stream.sender.fail(error)
            self._forget_sender(stream.sender)
        else:
            self._callbacks.transfer_lost(transfer_id, error)

    # --- from the role ----------------------------------------------------------------------------

    def offer(self, offer: Offer) -> None:
        """Expect a peer's Open; the lease begins now."""
        with self._contained(offer.transfer_id):
            stream = SendStream(
                offer, self._callbacks, self._kv, self._layout, self._config, self._note
            )
            self._note(Transition.SENDER_OFFERED)
            self._streams[offer.transfer_id] = stream
            self._parked.offered(offer.transfer_id)

    def decline(self, transfer_id: TransferId) -> None:
        """There will be no such transfer: its Open is refused at once, also one that waits."""
        if transfer_id not in self._streams:
            self._bury(transfer_id)
            self._parked.offered(transfer_id)

    def start(self, transfer_id: TransferId, num_tokens: int) -> None:
        """Ask the partner to reserve."""
        with self._contained(transfer_id):
            if sender := self._sender(transfer_id):
                sender.start(num_tokens)

    def publish(self, transfer_id: TransferId, sub_attempt: int, blocks: Blocks) -> None:
        """Let blocks go out."""
        with self._contained(transfer_id):
            if sender := self._sender(transfer_id):
                sender.publish(sub_attempt, blocks)

    def commit(
        self,
        transfer_id: TransferId,
        sub_attempt: int,
        first_tokens: dict[int, Logprob],
        final: frozenset[int],
    ) -> None:
        """Everything was published."""
        with self._contained(transfer_id):
            if sender := self._sender(transfer_id):
                sender.commit(sub_attempt, first_tokens, final)
                # `Finished` is queued, and nobody acknowledges it: the transfer is over here.
                if first_tokens and len(final) == len(first_tokens):
                    self._end_sender(sender, None)

    def restart(self, transfer_id: TransferId, sub_attempt: int) -> None:
        """The sequence was preempted."""
        with self._contained(transfer_id):
            if sender := self._sender(transfer_id):
                sender.restart(sub_attempt)
            else:
                # It ended here before the worker knew. Only what came before this sub-attempt is
                # free: the new one may pin the same blocks again.
                self._callbacks.transfer_drained(transfer_id, sub_attempt - 1)

    def end_send(self, transfer_id: TransferId, error: ServingError | None) -> None:
        """Give a transfer up; `transfer_drained` is the answer, also for an unknown one."""
        with self._contained(transfer_id):
            stream = self._streams.get(transfer_id)
            if stream is None:
                # Answered all the same: the worker keeps blocks pinned until it is.
                self._callbacks.transfer_drained(transfer_id, LAST_SUB_ATTEMPT)
            else:
                self._end_sender(stream.sender, error)

    def renew(self, transfer_ids: list[TransferId]) -> None:
        """The owning router is alive: its leases go on."""
        now_s = asyncio.get_running_loop().time()
        for transfer_id in transfer_ids:
            if stream := self._streams.get(transfer_id):
                stream.sender.last_traffic_at = now_s

    def _sender(self, transfer_id: TransferId) -> Sender | None:
        stream = self._streams.get(transfer_id)
        if stream is None:
            # The worker's loop runs ahead of this one: a transfer may have ended here meanwhile.
            self.num_unknown += 1
            return None
        return stream.sender

    def _end_sender(self, sender: Sender, error: ServingError | None) -> None:
        sender.end(error)
        self._forget_sender(sender)

    def _forget_sender(self, sender: Sender) -> None:
        # Both the stream's task and the worker's call end it, in either order.
        if self._streams.pop(sender.offer.transfer_id, None) is not None:
            self.num_sent_bytes += sender.num_bytes
            self._bury(sender.offer.transfer_id)

    def _bury(self, transfer_id: TransferId) -> None:
        # So that an Open that comes late is refused at once, instead of being parked for nothing.
        self._tombstones[transfer_id] = asyncio.get_running_loop().time() + TOMBSTONE_S

    # --- from peers -------------------------------------------------------------------------------

    async def _serve_open(self, stream: MessageStream, opened: frames.Open) -> None:
        found = await self._find_offer(opened)
        if found is None:
            self._note(Transition.SENDER_NOT_FOUND)
            await self._turn_away(stream, frames.NotFound())
        # Of what went out on the first stream, a second one would miss everything.
        elif found.has_stream:
            await self._turn_away(stream, frames.Failed(*to_wire(_TAKEN)))
        else:
            try:
                await found.serve(stream, opened)
            finally:
                self._forget_sender(found.sender)

    async def _find_offer(self, opened: frames.Open) -> SendStream | None:
        """Match an Open with its offer, waiting a while for a Submit that is still on its way."""
        transfer_id = opened.transfer_id
        peer = opened.receiver_id
        # Router to prefill and router to decode are two streams, of which either may be faster.
        if (
            transfer_id not in self._streams
            and transfer_id not in self._tombstones
            and self._parked.has_room(peer)
        ):
            self._note(Transition.SENDER_PARKED)
            await self._parked.wait(transfer_id, peer, self._config.park_s)
        found = self._streams.get(transfer_id)
        if found is None:
            return None
        offer = found.sender.offer
        # Random ids keep strangers out; this keeps out a receiver that was replaced since.
        named = (offer.receiver_id, offer.receiver_incarnation)
        return found if named == (opened.receiver_id, opened.receiver_incarnation) else None

    async def _watch_leases(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            now_s = asyncio.get_running_loop().time()
            # A copy: an expired transfer leaves the table inside the loop.
            for sender in [stream.sender for stream in self._streams.values()]:
                if now_s - sender.last_traffic_at > self._config.lease_s:
                    with self._contained(sender.offer.transfer_id):
                        sender.expire()
                        self._forget_sender(sender)
            for transfer_id, until in list(self._tombstones.items()):
                if now_s >= until:
                    del self._tombstones[transfer_id]
