"""One incoming transfer as a state machine: it alone writes its blocks, and only while it lives.

Owns the state, the sub-attempt, what was asked for again, and the verdict on the whole. It never
waits: `ReceiveStream` moves what it decides. Does not know the scheduler: the worker gives it block
ids, and it reports through `ReceiverCallbacks`.

    DIALLING ──Open──▶ WAITING ──Starting──▶ RESERVING ──Reserved──▶ RECEIVING ◀─┐
                                                                       │   └─────┘ Restart
                                                   Commit, all verified│
                                                                       ▼
                                                    CLOSED ◀──Ack── ARRIVED

    from anywhere to CLOSED: not found, refused, failed, stream lost, damaged twice, cancelled, or
    all first tokens were final and nothing is needed here
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Protocol

from core.errors import ChecksumMismatch, KVTransferError, ServingError, TransferNotFound, from_wire
from core.ids import Incarnation, TransferId, WorkerId
from core.kv_layout import KVLayout
from core.ports import KVBytes
from core.types import Logprob
from kv_transfer import frames
from kv_transfer.copying import Array
from kv_transfer.fenced_pool import FencedPool
from kv_transfer.reserved_blocks import Reservation, ReservedBlocks, places_of
from kv_transfer.resharding import Grid, PoolView, common_grid
from kv_transfer.transitions import Note, Transition


@dataclass(frozen=True, slots=True)
class Arrival:
    """What arrived: bytes, blocks of this worker's size, over which transport, fragments resent."""

    num_bytes: int
    num_blocks: int
    transport: str
    num_resent: int


class ReceiverCallbacks(Protocol):
    """What a receiver reports to its worker, on the worker's own loop."""

    def transfer_starting(self, transfer_id: TransferId, num_tokens: int) -> None:
        """The prefill worker is about to compute; answer with `reserved` or `refuse`."""
        ...

    def transfer_arrived(
        self, transfer_id: TransferId, first_tokens: dict[int, Logprob], arrival: Arrival
    ) -> None:
        """All KV is here and verified; answer with `ack` after attaching."""
        ...

    def transfer_finished(self, transfer_id: TransferId) -> None:
        """Every first token was final; nothing is needed here."""
        ...

    def transfer_failed(self, transfer_id: TransferId, error: ServingError) -> None:
        """The transfer cannot succeed any more; `transfer_closed` follows."""
        ...

    def transfer_closed(self, transfer_id: TransferId) -> None:
        """Nothing will be written into the reserved blocks any more."""
        ...


@dataclass(frozen=True, slots=True)
class FetchOrder:
    """What to fetch, from whom, as whom."""

    transfer_id: TransferId
    address: str
    receiver_id: WorkerId
    receiver_incarnation: Incarnation


class ReceiverState(Enum):
    """Where a transfer stands; the picture above has the transitions."""

    DIALLING = auto()
    WAITING = auto()
    RESERVING = auto()
    RECEIVING = auto()
    ARRIVED = auto()
    CLOSED = auto()


class Receiver:
    """State of one incoming transfer."""

    def __init__(
        self,
        order: FetchOrder,
        callbacks: ReceiverCallbacks,
        kv: KVBytes,
        layout: KVLayout,
        generation_of: Callable[[int], int],
        note: Note,
        wake: Callable[[], None],
        copy_threads: int = 1,
    ) -> None:
        """Nothing is reserved or dialled yet.

        `note` counts transitions; `wake` is called whenever there is something new to send.
        """
        self.order = order
        self.state = ReceiverState.DIALLING
        self.num_late_frames = 0
        self.num_resent = 0
        self._callbacks = callbacks
        self._kv = kv
        self._layout = layout
        self._generation_of = generation_of
        self._note = note
        self._wake = wake
        self._copy_threads = copy_threads
        self._transport = ""
        self._peer_segments: list[memoryview] | None = None
        self._starting: frames.Starting | None = None
        self._grid: Grid | None = None
        self._source: PoolView | None = None
        self._blocks: ReservedBlocks | None = None
        self._commit: frames.Commit | None = None
        self._sub_attempt = 0
        self._asked_again: set[frames.Place] = set()
        self._replies: deque[frames.Message] = deque()

    @property
    def is_closed(self) -> bool:
        """True once the transfer has ended; what is queued for the peer still goes out."""
        return self.state is ReceiverState.CLOSED

    # --- from the worker --------------------------------------------------------------------------

    def reserved(self, reservation: Reservation) -> None:
        """Blocks are reserved: frames may come.

        Raises:
            KVTransferError: They are of a pool that was replaced since.
        """
        grid = self._grid
        if self.is_closed or grid is None or self._starting is None:
            return  # it ended while the worker reserved, which `transfer_closed` reports
        fence = FencedPool(self._kv, reservation.pool_generation)
        self._blocks = ReservedBlocks(
            self.order.transfer_id,
            reservation,
            self._starting.num_tokens,
            fence,
            fence.view(self._layout, grid, self._copy_threads),
            self._source,
            self._generation_of,
        )
        self._enter(ReceiverState.RECEIVING, Transition.RECEIVER_RESERVED)
        have_tokens = reservation.have_blocks * self._layout.block_size_tokens
        self._send(frames.Reserved(self._sub_attempt, have_tokens))

    def refuse(self, error: ServingError) -> None:
        """No room: report it to the sender and close."""
        self._enter(ReceiverState.CLOSED, Transition.RECEIVER_REFUSED)
        self._send(frames.Refused(error.message))

    def ack(self) -> None:
        """The sequence is attached."""
        self._enter(ReceiverState.CLOSED, Transition.RECEIVER_ACKED)
        self._send(frames.Ack())

    def end(self) -> None:
        """The worker no longer wants the KV."""
        if not self.is_closed:
            self._enter(ReceiverState.CLOSED, Transition.RECEIVER_ENDED)
        self._wake()

    def fail(self, error: ServingError) -> None:
        """Something broke: report it to the worker; the peer sees the stream end."""
        if not self.is_closed:
            self._enter(ReceiverState.CLOSED, Transition.RECEIVER_FAILED)
            self._callbacks.transfer_failed(self.order.transfer_id, error)
        self._wake()

    # --- from the stream --------------------------------------------------------------------------

    def open(self, transport: str, peer_segments: list[memoryview] | None) -> frames.Open:
        """The stream is dialled; returns its first message.

        Args:
            transport: Its name.
            peer_segments: The sender's pool, if this process has mapped it.
        """
        # The sender's shape is not known before Starting, so its pool cannot be addressed yet.
        self._transport = transport
        self._peer_segments = peer_segments
        self.state = ReceiverState.WAITING
        order = self.order
        return frames.Open(
            order.transfer_id,
            order.receiver_id,
            order.receiver_incarnation,
            self._layout.identity,
            *self._layout.shape,
        )

    def receive(self, message: frames.Message) -> None:
        """Take a message of the sender.

        Raises:
            ServingError: The transfer cannot succeed; `fail` is to be called.
        """
        if self.is_closed:
            return  # it crossed with the end, which is on its way to the sender
        match message:
            case frames.Frame():
                self._note(Transition.RECEIVER_RECEIVED)
                self._accept(message)
            case frames.Starting():
                self._start(message)
            case frames.Commit():
                self._note(Transition.RECEIVER_COMMITTED)
                self._commit = message  # kept: fragments that were resent may come after it
                self._verify()
            case frames.Restart(sub_attempt):
                self._restart(sub_attempt)
            case frames.Finished():
                # Reported first: `transfer_closed` must come last of all.
                self._callbacks.transfer_finished(self.order.transfer_id)
                self._enter(ReceiverState.CLOSED, Transition.RECEIVER_FINISHED)
            case frames.Failed(kind, text):
                error = from_wire(kind, f"the prefill worker gave up: {text}")
                # Its reasons are its own: whether another attempt helps is the router's decision.
                raise error if error.is_retryable else KVTransferError(error.message)
            case frames.NotFound():
                self._note(Transition.RECEIVER_NOT_FOUND)
                raise TransferNotFound("the prefill worker does not know this transfer")
            case frames.Heartbeat():
                pass
            case _:
                raise KVTransferError(
                    f"the prefill worker sent {type(message).__name__}, which is not its to send"
                )

    def heartbeat(self) -> None:
        """Show the sender that its lease is still wanted."""
        self._send(frames.Heartbeat())

    def take_reply(self) -> frames.Message | None:
        """Take the next message to the sender off the queue, if there is one."""
        return self._replies.popleft() if self._replies else None

    def _enter(self, state: ReceiverState, transition: Transition) -> None:
        self.state = state
        self._note(transition)
        self._wake()

    def _send(self, message: frames.Message) -> None:
        self._replies.append(message)
        self._wake()

    def _start(self, starting: frames.Starting) -> None:
        """Find the common grid; if the sender's pool is mapped here, fragments are read from it."""
        if self._starting is not None:
            # The worker would reserve a second time, and the first blocks would be lost.
            raise KVTransferError("the prefill worker started this transfer twice")
        shape = starting.num_shards, starting.block_size_tokens
        self._grid = common_grid(self._layout, *shape)
        self._starting = starting
        self._sub_attempt = starting.sub_attempt
        if self._peer_segments is not None:
            theirs = replace(self._layout, num_shards=shape[0], block_size_tokens=shape[1])
            self._source = PoolView(self._peer_segments, theirs, self._grid)
        self._enter(ReceiverState.RESERVING, Transition.RECEIVER_STARTING)
        self._callbacks.transfer_starting(self.order.transfer_id, starting.num_tokens)

    def _restart(self, sub_attempt: int) -> None:
        self._note(Transition.RECEIVER_RESTARTED)
        self._sub_attempt = sub_attempt
        # The reservation stays: giving it back would mean waiting for blocks once more.
        if self._blocks is not None:
            self._blocks.forget()
        self._asked_again.clear()
        self._commit = None

    def _accept(self, frame: frames.Frame) -> None:
        # After its arrival a sequence may be attached: its blocks are its own, and are not written.
        if frame.sub_attempt != self._sub_attempt or self.state is ReceiverState.ARRIVED:
            self.num_late_frames += 1
            return
        if self._blocks is None or not len(frame.entries):
            raise KVTransferError(f"a frame of {len(frame.entries)} fragments was not expected")
        good, damaged = self._blocks.write(frame)
        if self._asked_again:
            self.num_resent += len(self._asked_again.intersection(places_of(good)))
        if len(damaged):
            self._ask_again(damaged)
        self._verify()

    def _ask_again(self, damaged: Array) -> None:
        self._note(Transition.RECEIVER_DAMAGED)
        places = places_of(damaged)
        if len(self._asked_again) + len(places) > frames.MAX_RESENDS:
            raise ChecksumMismatch(
                f"{len(places)} fragments of the KV came damaged after {len(self._asked_again)}, "
                f"{frames.MAX_RESENDS} may be asked for again"
            )
        twice = [place for place in places if place in self._asked_again]
        if twice:
            # No noise on the wire: memory or code is at fault, and would spoil it again.
            raise ChecksumMismatch(
                f"{len(twice)} fragments of the KV came damaged twice, first {twice[0]}"
            )
        self._asked_again.update(places)
        self._send(frames.Resend(self._sub_attempt, tuple(places)))

    def _verify(self) -> None:
        """Once everything the commit counts is here, compare and report."""
        commit, blocks = self._commit, self._blocks
        if (
            commit is None
            or self.state is ReceiverState.ARRIVED
            or commit.sub_attempt != self._sub_attempt
        ):
            return
        num_here = blocks.num_here if blocks else 0
        if num_here < commit.num_entries:
            return  # fragments that were asked for again are on their way
        if blocks is None:
            raise KVTransferError("the prefill worker committed before blocks were reserved")
        expected = blocks.num_expected
        if num_here != expected or commit.num_entries != expected:
            raise KVTransferError(
                f"{num_here} fragments are here and the commit counts {commit.num_entries}, "
                f"the reservation needs {expected}"
            )
        # Each fragment is right by itself. Together they must be those that the sender counted: it
        # may have sent one twice, with other bytes, and the later one is here.
        if blocks.checksum != commit.checksum:
            raise ChecksumMismatch("the checksum over all fragments does not match")
        # Last: ranks that started again since have other memory, and none of this KV in it.
        blocks.check_pool()
        self._enter(ReceiverState.ARRIVED, Transition.RECEIVER_ARRIVED)
        num_blocks = len(blocks.reservation.block_ids) - blocks.reservation.have_blocks
        arrival = Arrival(blocks.num_bytes, num_blocks, self._transport, self.num_resent)
        self._callbacks.transfer_arrived(self.order.transfer_id, commit.first_tokens, arrival)
