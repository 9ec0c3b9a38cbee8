"""The prefill side of one transfer: from Submit to Ack.

Owns what is sent when, the read references on source blocks (by sub-attempt) and the lease. Does
not know the scheduler: it is told block ids and reports through `SenderCallbacks`.

    OFFERED ─Open─▶ OPEN ─Starting/Reserved─▶ SENDING ─Commit─▶ COMMITTED ─Ack─▶ CLOSED
       └────────────── lease expired, stream lost, cancelled, refused ───────────▶ CLOSED
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from core.config import TransferConfig
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
from core.ports import KVBytes, MappedStream, MessageStream, StreamClosed
from core.types import Logprob
from kv_transfer import frames
from kv_transfer.copying import Array
from kv_transfer.failures import failure_of
from kv_transfer.fenced_pool import FIRST_GENERATION, FencedPool
from kv_transfer.resharding import PoolParts, common_grid
from kv_transfer.transitions import Note, Transition
from transport.sequenced import Arrivals

HEARTBEAT_S = 0.5
COALESCE_S = 0.002
LAST_SUB_ATTEMPT = (1 << 16) - 1
"""As far as sub-attempts are counted on the wire: drained up to here means all of them."""


class SenderCallbacks(Protocol):
    """What the worker is told, on the worker's own loop."""

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


class Sender:
    """State of one outgoing transfer."""

    def __init__(
        self,
        offer: Offer,
        callbacks: SenderCallbacks,
        kv: KVBytes,
        layout: KVLayout,
        config: TransferConfig,
        note: Note,
    ) -> None:
        """Wait for the peer's Open; nothing is held yet. The lease begins now."""
        self.offer = offer
        self.last_traffic_at = asyncio.get_running_loop().time()
        self.is_closed = False
        self.num_bytes = 0
        self._callbacks, self._layout, self._note = callbacks, layout, note
        self._fence = FencedPool(kv, offer.pool_generation)
        self._frame_bytes = config.frame_bytes
        self._silence_s = config.lease_s
        self._stream: MessageStream | None = None
        self._sub_attempt = 0
        self._starting: frames.Starting | None = None
        self._commit: frames.Commit | None = None
        self._pool: PoolParts | None = None
        self._first_block = 0
        self._entries: deque[Array] = deque()
        self._num_waiting = 0
        self._sent: list[Array] = []
        self._checksums = np.zeros((0, 0, 0), np.uint64)
        self._control: deque[frames.Message] = deque()
        self._arrivals = Arrivals()
        self._num_sent = 0
        self._is_partnered = False
        self._is_mapped = False
        self._parts_per_frame = 1
        self._num_resends = 0
        self._wake = asyncio.Event()

    # --- told by the worker -----------------------------------------------------------------------

    def start(self, num_tokens: int) -> None:
        """The request is at the head of its queue: ask the partner to reserve."""
        self._note(Transition.SENDER_STARTED)
        self._starting = frames.Starting(self._sub_attempt, num_tokens, *self._layout.shape)
        if self._stream is not None:
            self._say(self._starting)

    def publish(self, sub_attempt: int, blocks: Blocks) -> None:
        """These blocks are complete in the pool and may be read until drained."""
        pool = self._pool
        if sub_attempt != self._sub_attempt or self.is_closed or pool is None:
            return
        entries = pool.entries(
            blocks.layer, blocks.first_block, blocks.block_ids, blocks.num_tokens
        )
        # Blocks of this worker may be larger than decode's, which has the first part of this one
        # then.
        self._queue(entries[entries["block"] >= self._first_block])

    def _queue(self, entries: Array) -> None:
        self._entries.append(entries)
        self._num_waiting += len(entries)
        self._wake.set()

    def _forget_queue(self) -> None:
        self._entries.clear()
        self._num_waiting = 0

    def commit(
        self, sub_attempt: int, first_tokens: dict[int, Logprob], final_choices: frozenset[int]
    ) -> None:
        """Everything was published; all first tokens are drawn."""
        if sub_attempt != self._sub_attempt or self.is_closed:
            return
        if len(final_choices) == len(first_tokens):
            self._forget_queue()
            self._note(Transition.SENDER_FINISHED)
            self._say(frames.Finished())
            return
        self._commit = frames.Commit(sub_attempt, 0, 0, first_tokens, final_choices)
        self._wake.set()

    def restart(self, sub_attempt: int) -> None:
        """The sequence was preempted: stop reading its blocks, keep the partner's reservation."""
        self._note(Transition.SENDER_RESTARTED)
        drained = self._sub_attempt
        self._sub_attempt = sub_attempt
        self._forget_queue()
        self._sent.clear()
        self._checksums[:] = 0
        self._commit = None
        self._say(frames.Restart(sub_attempt))
        # What travels was copied when its frame was built, on this loop. A receiver that maps the
        # pool may still be reading: it finds that the checksums differ, and the Restart behind the
        # frame makes it forget them.
        self._callbacks.transfer_drained(self.offer.transfer_id, drained)

    def end(self, error: ServingError | None) -> None:
        """The worker gives the transfer up and tells the peer; blocks are free as in `restart`."""
        if self.is_closed:
            # It ended by itself, and the worker began another sub-attempt before it heard of that.
            self._callbacks.transfer_drained(self.offer.transfer_id, self._sub_attempt)
            return
        if error is not None:
            self._note(Transition.SENDER_ENDED)
            self._say(frames.Failed(*to_wire(error)))
        self._close()

    def _say(self, message: frames.Message) -> None:
        self._control.append(message)
        self._wake.set()

    def _close(self) -> None:
        self.is_closed = True
        self._forget_queue()
        self._wake.set()
        self._callbacks.transfer_drained(self.offer.transfer_id, self._sub_attempt)

    def expire(self) -> None:
        """Nobody renewed the lease."""
        if not self.is_closed:
            self._note(Transition.SENDER_EXPIRED)
            self._callbacks.transfer_lost(
                self.offer.transfer_id, LeaseExpired("nobody fetched the KV within the lease")
            )
            self.end(LeaseExpired("the lease on the KV expired"))

    def fail(self, error: ServingError) -> None:
        """Something broke here: the worker and the peer are told."""
        self._lost(error)
        self.end(error)

    # --- the stream -------------------------------------------------------------------------------

    @property
    def has_stream(self) -> bool:
        """True once a receiver has opened its stream: it opens one, and nobody else may."""
        return self._stream is not None

    async def serve(self, stream: MessageStream, opened: frames.Open) -> None:
        """Carry the one stream, whose number 0 was `opened`, to its end; raises nothing."""
        self._arrivals.is_new(0)
        self._stream, self._is_mapped = stream, isinstance(stream, MappedStream)
        try:
            self._pool = self._check_layout(stream, opened)
        except Exception as error:  # noqa: BLE001 - whatever broke here fails this transfer, logged
            await self._refuse(stream, failure_of(error, "the meeting with the decode worker"))
            return
        self._note(Transition.SENDER_OPENED)
        if self._starting is not None:
            self._say(replace(self._starting, sub_attempt=self._sub_attempt))
        try:
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read(stream))
                await self._write(stream)
                reader.cancel()
        except Exception as error:  # noqa: BLE001 - whatever broke here fails this transfer, logged
            self._lost(failure_of(error, "the decode worker's fetch stream", self._silence_s))
            stream.reset()
        finally:
            if not self.is_closed:
                self._close()

    async def _refuse(self, stream: MessageStream, error: ServingError) -> None:
        """End what cannot even begin; the peer hears why."""
        if isinstance(error, LayoutMismatch):
            self._note(Transition.SENDER_MISFIT)
        self._lost(error)
        self._close()
        with contextlib.suppress(StreamClosed, TimeoutError):
            async with asyncio.timeout(self._silence_s):
                await self._send(stream, frames.Failed(*to_wire(error)))
                await stream.close()

    def _check_layout(self, stream: MessageStream, opened: frames.Open) -> PoolParts:
        """Agree with the receiver on the parts that travel.

        Raises:
            LayoutMismatch: Names every difference.
            KVTransferError: The pool is not the one that was offered, or that the peer has mapped.
        """
        differences = self._layout.differences(opened.identity)
        if differences:
            raise LayoutMismatch(f"KV cannot go between these workers: {'; '.join(differences)}")
        grid = common_grid(self._layout, opened.num_shards, opened.block_size_tokens)
        pool = self._fence.parts(self._layout, grid)
        self._fence.check_mapping(stream)
        longest = frames.MAX_MESSAGE_BYTES - frames.FRAME_HEAD_BYTES - frames.ENTRY.itemsize
        if pool.part_bytes > longest and not self._is_mapped:
            raise LayoutMismatch(
                f"a part of KV between these workers has {pool.part_bytes} bytes, a message "
                f"carries {longest}; lower engine.block_size_tokens"
            )
        self._parts_per_frame = frames.parts_per_frame(
            self._frame_bytes, pool.part_bytes, is_mapped=self._is_mapped
        )
        return pool

    def _lost(self, error: ServingError) -> None:
        if not self.is_closed:
            self._note(Transition.SENDER_LOST)
            self._callbacks.transfer_lost(self.offer.transfer_id, error)

    def _next_number(self) -> int:
        self._num_sent += 1
        return self._num_sent - 1

    async def _send(self, stream: MessageStream, message: frames.Message) -> None:
        await stream.send(frames.encode(self._next_number(), message))

    async def _read(self, stream: MessageStream) -> None:
        while not self.is_closed:
            async with asyncio.timeout(self._silence_s):
                data = await stream.recv()
            number, message = frames.decode(data)
            if not self._arrivals.is_new(number):
                continue
            self.last_traffic_at = asyncio.get_running_loop().time()
            match message:
                case frames.Reserved(sub_attempt, have_tokens):
                    self._partnered(sub_attempt, have_tokens)
                case frames.Refused(text):
                    self._note(Transition.SENDER_REFUSED)
                    raise PoolExhausted(f"the decode worker refused the transfer: {text}")
                case frames.Resend(sub_attempt, parts):
                    self._resend(sub_attempt, parts)
                case frames.Ack():
                    self._note(Transition.SENDER_ACKED)
                    self._callbacks.transfer_sent(self.offer.transfer_id)
                    self._close()
                case frames.Heartbeat():
                    pass
                case _:
                    raise KVTransferError(
                        f"the decode worker sent {type(message).__name__}, which is not its to send"
                    )

    def _partnered(self, sub_attempt: int, have_tokens: int) -> None:
        starting, pool = self._starting, self._pool
        if (
            starting is None
            or pool is None
            or have_tokens >= starting.num_tokens
            or have_tokens % pool.grid.block_size_tokens
            or sub_attempt > self._sub_attempt
        ):
            raise KVTransferError(
                f"the decode worker claims to have {have_tokens} tokens of this transfer"
            )
        if self._is_partnered:
            raise KVTransferError("the decode worker reserved twice for this transfer")
        self._is_partnered = True
        self._note(Transition.SENDER_PARTNERED)
        grid = pool.grid
        self._first_block = grid.blocks_for(have_tokens)
        shape = self._layout.num_layers, grid.num_shards, grid.blocks_for(starting.num_tokens)
        self._checksums = np.zeros(shape, np.uint64)
        self._callbacks.transfer_reserved(
            self.offer.transfer_id, have_tokens // self._layout.block_size_tokens
        )

    def _resend(self, sub_attempt: int, parts: tuple[tuple[int, int, int], ...]) -> None:
        if not parts:
            raise KVTransferError("the decode worker asked for no part again")
        if sub_attempt != self._sub_attempt:
            return
        self._num_resends += len(parts)
        self._note(Transition.SENDER_RESENT)
        sent = {
            (int(e["layer"]), int(e["shard"]), int(e["block"])): e
            for batch in self._sent
            for e in batch
        }
        if any(part not in sent for part in parts) or self._num_resends > frames.MAX_RESENDS:
            raise KVTransferError(
                f"the decode worker asked for {self._num_resends} parts again, the limit is "
                f"{frames.MAX_RESENDS}, of what was sent"
            )
        self._queue(np.array([sent[part] for part in parts], frames.ENTRY))

    async def _write(self, stream: MessageStream) -> None:
        while True:
            while self._control:
                await self._send(stream, self._control.popleft())
            if self.is_closed:
                await stream.close()
                return
            if self._num_waiting:
                await self._coalesce()
                if self._control:
                    continue  # a Restart goes before the first frame of its sub-attempt
                if self._num_waiting and self._pool is not None:
                    await stream.send(self._build_frame(self._pool))
                continue
            if self._commit is not None:
                commit, self._commit = self._commit, None
                # What was sent, not what should have been: the receiver knows that itself and
                # compares.
                num_sent = int(np.count_nonzero(self._checksums))
                checksum = frames.combined_checksum(self._checksums)
                final = replace(commit, num_entries=num_sent, checksum=checksum)
                self._note(Transition.SENDER_COMMITTED)
                await self._send(stream, final)
                continue
            self._wake.clear()
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._wake.wait()
            except TimeoutError:
                await self._send(stream, frames.Heartbeat())

    async def _coalesce(self) -> None:
        """Wait 2 ms for more parts, unless a frame is full or everything is published."""
        if self._has_reason_to_send():
            return
        self._wake.clear()
        try:
            async with asyncio.timeout(COALESCE_S):
                while not self._has_reason_to_send():
                    await self._wake.wait()
                    self._wake.clear()
        except TimeoutError:
            pass

    def _has_reason_to_send(self) -> bool:
        is_full = self._num_waiting >= self._parts_per_frame
        return is_full or self._commit is not None or self.is_closed or bool(self._control)

    def _build_frame(self, pool: PoolParts) -> bytes:
        """Copy up to a frame of parts out of the pool.

        If the receiver can read there, only say where they lie.
        """
        self._fence.check()
        entries = self._next_entries(self._parts_per_frame)
        payload, tallies = (
            (None, pool.checksum(entries)) if self._is_mapped else pool.gather(entries)
        )
        checksums = frames.keyed_checksums(
            self.offer.transfer_id, self._sub_attempt, entries, tallies
        )
        entries["checksum"] = checksums
        self._checksums[entries["layer"], entries["shard"], entries["block"]] = checksums
        self._sent.append(entries)
        self._note(Transition.SENDER_SENT)
        self.num_bytes += len(entries) * pool.part_bytes
        return frames.encode_frame(self._next_number(), self._sub_attempt, entries, payload)

    def _next_entries(self, most: int) -> Array:
        """Take up to `most` entries off the queue."""
        taken: list[Array] = []
        while self._entries and most > 0:
            batch = self._entries.popleft()
            if len(batch) > most:
                self._entries.appendleft(batch[most:])
                batch = batch[:most]
            taken.append(batch)
            most -= len(batch)
        entries = np.concatenate(taken)
        self._num_waiting -= len(entries)
        return entries
