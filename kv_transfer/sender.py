"""One outgoing transfer as a state machine: what a prefill worker sends when, and what it holds.

Owns the state, the sub-attempt, the read references on source blocks and the lease. It never waits:
`SendStream` moves what it decides. Does not know the scheduler: the worker gives it block ids, and
it reports through `SenderCallbacks`.

    OFFERED ──Open──▶ OPEN ──Reserved──▶ SENDING ──all sent, Commit──▶ COMMITTED ──Ack──▶ CLOSED
                                            ▲                             │
                                            └───── preempted, Restart ────┘

    from anywhere to CLOSED: the lease expired, the receiver refused, the stream or the worker
    gave up, or all first tokens are final and nothing is needed on decode

Starting goes out once both have happened: the peer opened its stream, and the request reached the
head of its queue (`start`). Whichever comes first waits for the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Protocol

from core.errors import (
    KVTransferError,
    LayoutMismatch,
    LeaseExpired,
    PoolExhausted,
    ServingError,
    to_wire,
)
from core.ids import Incarnation, TransferId, WorkerId
from core.kv_layout import KVLayout
from core.ports import KVBytes
from core.types import Logprob
from kv_transfer import frames
from kv_transfer.fenced_pool import FIRST_GENERATION, FencedPool
from kv_transfer.frame_builder import FrameBuilder
from kv_transfer.transitions import Note, Transition

LAST_SUB_ATTEMPT = (1 << 16) - 1
"""As far as sub-attempts are counted on the wire: drained up to here means all of them."""


class SenderCallbacks(Protocol):
    """What a sender reports to its worker, on the worker's own loop."""

    def transfer_reserved(self, transfer_id: TransferId, have_blocks: int) -> None:
        """Decode has reserved blocks and has what the first `have_blocks` of our size hold."""
        ...

    def transfer_sent(self, transfer_id: TransferId) -> None:
        """Decode has verified and attached everything."""
        ...

    def transfer_lost(self, transfer_id: TransferId, error: ServingError) -> None:
        """The transfer cannot succeed any more."""
        ...

    def transfer_drained(self, transfer_id: TransferId, sub_attempt: int) -> None:
        """Nothing of this sub-attempt, or of one before it, is being read any more."""
        ...


@dataclass(frozen=True, slots=True)
class Offer:
    """A transfer this worker will serve, the only peer that may fetch it, and the pool it means."""

    transfer_id: TransferId
    receiver_id: WorkerId
    receiver_incarnation: Incarnation
    pool_generation: int = FIRST_GENERATION


@dataclass(frozen=True, slots=True)
class Blocks:
    """One layer of consecutive blocks of a sequence, in all shards, ready to be read."""

    layer: int
    first_block: int
    block_ids: tuple[int, ...]
    num_tokens: int
    """Held by these blocks together."""


class SenderState(Enum):
    """Where a transfer stands; the picture above has the transitions."""

    OFFERED = auto()
    OPEN = auto()
    SENDING = auto()
    COMMITTED = auto()
    CLOSED = auto()


class Sender:
    """State of one outgoing transfer."""

    def __init__(
        self,
        offer: Offer,
        callbacks: SenderCallbacks,
        kv: KVBytes,
        layout: KVLayout,
        frame_bytes: int,
        note: Note,
        wake: Callable[[], None],
        now_s: float,
    ) -> None:
        """Wait for the peer's Open; nothing is held yet, and the lease begins now.

        `note` counts transitions; `wake` is called whenever there is something new to send.
        """
        self.offer = offer
        self.state = SenderState.OFFERED
        self.last_traffic_at = now_s
        self._callbacks = callbacks
        self._layout = layout
        self._note = note
        self._wake = wake
        self._frame_bytes = frame_bytes
        self._fence = FencedPool(kv, offer.pool_generation)
        self._builder: FrameBuilder | None = None
        self._control: deque[frames.Message] = deque()
        self._starting: frames.Starting | None = None
        self._commit: frames.Commit | None = None
        self._sub_attempt = 0

    @property
    def is_closed(self) -> bool:
        """True once no block is read any more."""
        return self.state is SenderState.CLOSED

    @property
    def num_bytes(self) -> int:
        """KV that was sent, resends included."""
        return self._builder.num_bytes if self._builder else 0

    # --- from the worker --------------------------------------------------------------------------

    def start(self, num_tokens: int) -> None:
        """The request is at the head of its queue: ask the partner to reserve."""
        self._note(Transition.SENDER_STARTED)
        self._starting = frames.Starting(self._sub_attempt, num_tokens, *self._layout.shape)
        if self.state is not SenderState.OFFERED:
            self._send(self._starting)

    def publish(self, sub_attempt: int, blocks: Blocks) -> None:
        """These blocks are complete in the pool and may be read until drained."""
        # The worker's loop runs ahead of this one: what it published before a preemption may come
        # after it, and those blocks have another owner by then.
        if sub_attempt != self._sub_attempt or self.is_closed or self._builder is None:
            return
        self._builder.add(blocks.layer, blocks.first_block, blocks.block_ids, blocks.num_tokens)
        self._wake()

    def commit(
        self, sub_attempt: int, first_tokens: dict[int, Logprob], final_choices: frozenset[int]
    ) -> None:
        """Everything was published; all first tokens are drawn, or it is a prefix without any."""
        if sub_attempt != self._sub_attempt or self.is_closed:
            return
        if first_tokens and len(final_choices) == len(first_tokens):
            # Nothing is left to decode, so no KV is wanted: not even what waits in the queue.
            if self._builder is not None:
                self._builder.drop_waiting()
            self._note(Transition.SENDER_FINISHED)
            self._send(frames.Finished())
            return
        self._commit = frames.Commit(sub_attempt, 0, 0, first_tokens, final_choices)
        self._wake()

    def restart(self, sub_attempt: int) -> None:
        """The sequence was preempted: stop reading its blocks, keep the partner's reservation."""
        self._note(Transition.SENDER_RESTARTED)
        if self.state is SenderState.COMMITTED:
            self.state = SenderState.SENDING
        drained = self._sub_attempt
        self._sub_attempt = sub_attempt
        if self._builder is not None:
            self._builder.start_over()
        self._commit = None
        self._send(frames.Restart(sub_attempt))
        # What travels was copied when its frame was built, on this loop. A receiver that maps the
        # pool may still be reading: it finds that the checksums differ, and the Restart behind the
        # frame makes it forget them.
        self._callbacks.transfer_drained(self.offer.transfer_id, drained)

    def end(self, error: ServingError | None) -> None:
        """The worker gives the transfer up; the peer gets the error, and blocks are drained."""
        if self.is_closed:
            # It ended by itself, and the worker began another sub-attempt before it knew.
            self._callbacks.transfer_drained(self.offer.transfer_id, self._sub_attempt)
            return
        if error is not None:
            self._note(Transition.SENDER_ENDED)
            self._send(frames.Failed(*to_wire(error)))
        self.close()

    def expire(self) -> None:
        """Nobody renewed the lease."""
        if not self.is_closed:
            self._note(Transition.SENDER_EXPIRED)
            self._callbacks.transfer_lost(
                self.offer.transfer_id, LeaseExpired("nobody fetched the KV within the lease")
            )
            self.end(LeaseExpired("the lease on the KV expired"))

    def fail(self, error: ServingError) -> None:
        """Something broke on this side: report it to the worker and to the peer."""
        self.lose(error)
        self.end(error)

    # --- from the stream --------------------------------------------------------------------------

    def open(self, opened: frames.Open, mapped_pool: bytes | None) -> None:
        """The peer's stream is here: agree on the fragments that travel; see `FrameBuilder`."""
        self._builder = FrameBuilder(
            opened, mapped_pool, self._fence, self._layout, self._frame_bytes
        )
        self._enter(SenderState.OPEN, Transition.SENDER_OPENED)
        if self._starting is not None:
            self._send(replace(self._starting, sub_attempt=self._sub_attempt))

    def refuse(self, error: ServingError) -> None:
        """`open` failed: the transfer ends before it began, and the peer learns why."""
        if isinstance(error, LayoutMismatch):
            self._note(Transition.SENDER_INCOMPATIBLE)
        self.lose(error)
        # A Restart of before means nothing to a peer that never learned of the first sub-attempt.
        self._control.clear()
        self._send(frames.Failed(*to_wire(error)))
        self.close()

    def receive(self, message: frames.Message, now_s: float) -> None:
        """Take a message of the receiver.

        Raises:
            KVTransferError: It is not the receiver's to send, or not now.
            PoolExhausted: The receiver refused.
        """
        self.last_traffic_at = now_s  # any message renews the lease
        if self.is_closed:
            return  # it crossed with the end, which is on its way to the receiver
        match message:
            case frames.Reserved(sub_attempt, have_tokens):
                self._partner(sub_attempt, have_tokens)
            case frames.Refused(text):
                self._note(Transition.SENDER_REFUSED)
                raise PoolExhausted(f"the decode worker refused the transfer: {text}")
            case frames.Resend(sub_attempt, fragments):
                # One of an older sub-attempt crossed with its Restart: nothing of it is wanted.
                if sub_attempt == self._sub_attempt and self._builder is not None:
                    self._note(Transition.SENDER_RESENT)
                    self._builder.resend(fragments)
                    self._wake()
            case frames.Ack():
                self._note(Transition.SENDER_ACKED)
                self._callbacks.transfer_sent(self.offer.transfer_id)
                self.close()
            case frames.Heartbeat():
                pass
            case _:
                raise KVTransferError(
                    f"the decode worker sent {type(message).__name__}, which is not its to send"
                )

    def lose(self, error: ServingError) -> None:
        """Report to the worker that the transfer cannot succeed; `close` or `end` follows."""
        if not self.is_closed:
            self._note(Transition.SENDER_LOST)
            self._callbacks.transfer_lost(self.offer.transfer_id, error)

    def close(self) -> None:
        """Send what is queued for the peer and nothing else; no block is read any more."""
        if self.is_closed:
            return
        self.state = SenderState.CLOSED  # first: the callback below may call back
        if self._builder is not None:
            self._builder.drop_waiting()
        self._wake()
        self._callbacks.transfer_drained(self.offer.transfer_id, self._sub_attempt)

    # --- to the stream ----------------------------------------------------------------------------

    @property
    def has_fragments(self) -> bool:
        """True while a frame could be built."""
        return self._builder is not None and self._builder.num_waiting > 0

    @property
    def has_control(self) -> bool:
        """True while a message waits that goes before any frame."""
        return bool(self._control)

    @property
    def is_frame_due(self) -> bool:
        """True if waiting for more fragments would gain nothing."""
        is_full = self._builder is not None and self._builder.is_full
        return is_full or self._commit is not None or self.is_closed or self.has_control

    def take_control(self) -> frames.Message | None:
        """Take the next message without KV off the queue, if there is one."""
        return self._control.popleft() if self._control else None

    def take_kv(self) -> frames.Frame | frames.Commit | None:
        """Build the next frame, or the commit once every fragment was sent; None: wait for more.

        Raises:
            KVTransferError: The pool was replaced since the offer.
        """
        builder = self._builder
        # Fragments before the commit, which counts them all.
        if builder is not None and builder.num_waiting:
            frame = builder.build(self._sub_attempt)
            self._note(Transition.SENDER_SENT)
            return frame
        commit = self._commit
        if commit is None or builder is None:
            return None
        self._commit = None
        num_entries, checksum = builder.totals()
        self._enter(SenderState.COMMITTED, Transition.SENDER_COMMITTED)
        return replace(commit, num_entries=num_entries, checksum=checksum)

    def _enter(self, state: SenderState, transition: Transition) -> None:
        self.state = state
        self._note(transition)

    def _send(self, message: frames.Message) -> None:
        self._control.append(message)
        self._wake()

    def _partner(self, sub_attempt: int, have_tokens: int) -> None:
        starting = self._starting
        builder = self._builder
        # An older sub-attempt is no fault: a Restart keeps the reservation and may cross with it.
        if starting is None or builder is None or sub_attempt > self._sub_attempt:
            raise KVTransferError("the decode worker reserved for what was not started")
        if self.state is not SenderState.OPEN:
            raise KVTransferError("the decode worker reserved twice for this transfer")
        builder.expect(starting.num_tokens, have_tokens)
        self._enter(SenderState.SENDING, Transition.SENDER_PARTNERED)
        self._callbacks.transfer_reserved(
            self.offer.transfer_id, have_tokens // self._layout.block_size_tokens
        )
