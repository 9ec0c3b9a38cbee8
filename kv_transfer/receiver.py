"""The decode side of one transfer: it alone writes into its own blocks, and only while it lives.

Owns verification (checksum, range, generation), the copy into the pool and the answer. Does not
know the scheduler: it is told block ids and reports through `ReceiverCallbacks`.

    DIALLING ─Open─▶ WAITING ─Starting─▶ RESERVING ─Reserved─▶ RECEIVING
        │                                                          │ Commit, verified
        │                                                          ▼
        └─ not found, failed, stream lost, bad twice, ─▶ CLOSED ◀─Ack─ ARRIVED
           cancelled
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from core.errors import ChecksumMismatch, KVTransferError, ServingError, TransferNotFound, from_wire
from core.ids import Incarnation, TransferId, WorkerId
from core.kv_layout import KVLayout
from core.ports import KVBytes, MappedStream, MessageStream, Network, StreamClosed
from core.session import RouteReport
from core.types import Logprob
from kv_transfer import frames
from kv_transfer.copying import Array
from kv_transfer.failures import failure_of
from kv_transfer.fenced_pool import FIRST_GENERATION, FencedPool
from kv_transfer.resharding import Grid, PoolParts, common_grid
from kv_transfer.transitions import Note, Transition
from transport.sequenced import Arrivals

HEARTBEAT_S = 0.5


@dataclass(frozen=True, slots=True)
class Arrival:
    """What came: bytes, blocks of this worker's size, which way, and parts that were sent again."""

    num_bytes: int
    num_blocks: int
    transport: str
    num_resent: int


class ReceiverCallbacks(Protocol):
    """What the worker is told, on the worker's own loop."""

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

    def route_found(self, route: RouteReport) -> None:
        """A way to a peer was tried, as `ReceiveAgent.probe_peer` was asked to."""
        ...


@dataclass(frozen=True, slots=True)
class FetchOrder:
    """What to fetch, from whom, as whom."""

    transfer_id: TransferId
    address: str
    receiver_id: WorkerId
    receiver_incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks that await KV, by position in the sequence; generations are those at the time."""

    block_ids: tuple[int, ...]
    generations: tuple[int, ...]
    have_blocks: int
    pool_generation: int = FIRST_GENERATION


class Receiver:
    """State of one incoming transfer."""

    def __init__(
        self,
        order: FetchOrder,
        callbacks: ReceiverCallbacks,
        kv: KVBytes,
        layout: KVLayout,
        silence_s: float,
        generation_of: Callable[[int], int],
        note: Note,
        copy_threads: int = 1,
    ) -> None:
        """Nothing is reserved or dialled yet."""
        self.order = order
        self.is_closed = False
        self.num_late_frames = 0
        self.num_resent = 0
        self._callbacks, self._kv, self._layout, self._generation_of = (
            callbacks,
            kv,
            layout,
            generation_of,
        )
        self._note, self._silence_s, self._copy_threads = note, silence_s, copy_threads
        self._stream: MessageStream | None = None
        self._reservation: Reservation | None = None
        self._fence: FencedPool | None = None
        self._starting: frames.Starting | None = None
        self._grid: Grid | None = None
        self._pool: PoolParts | None = None
        self._source: PoolParts | None = None
        self._sub_attempt = 0
        self._checksums = np.zeros((0, 0, 0), np.uint64)
        self._is_here = np.zeros((0, 0, 0), bool)
        self._block_ids = np.zeros(0, np.int64)
        self._asked_again: set[tuple[int, int, int]] = set()
        self._commit: frames.Commit | None = None
        self._task: asyncio.Task[None] | None = None
        self._replies: list[frames.Message] = []
        self._arrivals = Arrivals()
        self._num_sent = 0
        self._wake = asyncio.Event()
        self._is_arrived = False
        self._transport = ""
        self.num_bytes = 0

    # --- told by the worker -----------------------------------------------------------------------

    def reserved(self, reservation: Reservation) -> None:
        """Blocks are reserved: frames may come.

        Raises:
            KVTransferError: They are of a pool that was replaced since.
        """
        grid = self._grid
        if self.is_closed or grid is None or self._starting is None:
            return
        self._fence = FencedPool(self._kv, reservation.pool_generation)
        self._pool = self._fence.parts(self._layout, grid, self._copy_threads)
        self._reservation = reservation
        self._block_ids = np.asarray(reservation.block_ids, np.int64)
        shape = self._layout.num_layers, grid.num_shards, grid.blocks_for(self._starting.num_tokens)
        self._checksums, self._is_here = np.zeros(shape, np.uint64), np.zeros(shape, bool)
        self._note(Transition.RECEIVER_RESERVED)
        have_tokens = reservation.have_blocks * self._layout.block_size_tokens
        self._reply(frames.Reserved(self._sub_attempt, have_tokens))

    def refuse(self, error: ServingError) -> None:
        """No room: tell the sender and close."""
        self._note(Transition.RECEIVER_REFUSED)
        self._reply(frames.Refused(error.message))
        self._finish()

    def ack(self) -> None:
        """The sequence is attached."""
        self._note(Transition.RECEIVER_ACKED)
        self._reply(frames.Ack())
        self._finish()

    def end(self) -> None:
        """The worker no longer wants the KV."""
        if not self.is_closed:
            self._note(Transition.RECEIVER_ENDED)
        self._finish()

    def fail(self, error: ServingError) -> None:
        """Something broke here: the worker is told; the peer sees the stream end."""
        self._fail(error)
        self._finish()

    def _reply(self, message: frames.Message) -> None:
        self._replies.append(message)
        self._wake.set()

    def _finish(self) -> None:
        self.is_closed = True
        self._wake.set()

    # --- the stream -------------------------------------------------------------------------------

    async def run(self, network: Network, open_timeout_s: float) -> None:
        """Fetch; whatever happens, nothing is raised and the host hears `transfer_closed` last."""
        stream: MessageStream | None = None
        try:
            try:
                async with asyncio.timeout(open_timeout_s):
                    stream = await network.dial(self.order.address)
                    await self._send(stream, self._open_message())
            except (StreamClosed, TimeoutError):
                self._note(Transition.RECEIVER_UNREACHED)
                raise KVTransferError(
                    "the prefill worker could not be reached for the KV"
                ) from None
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read(stream))
                heartbeats = tasks.create_task(self._heartbeat())
                await self._write(stream)
                reader.cancel()
                heartbeats.cancel()
        except Exception as error:  # noqa: BLE001 - whatever broke here fails this transfer, logged
            self._fail(failure_of(error, "the prefill worker's stream", self._silence_s))
        finally:
            self.is_closed = True
            if stream is not None:
                stream.reset()
            self._callbacks.transfer_closed(self.order.transfer_id)

    async def _send(self, stream: MessageStream, message: frames.Message) -> None:
        number, self._num_sent = self._num_sent, self._num_sent + 1
        await stream.send(frames.encode(number, message))

    def _open_message(self) -> frames.Open:
        order, (num_shards, block_size) = self.order, self._layout.shape
        return frames.Open(
            order.transfer_id, order.receiver_id, order.receiver_incarnation,
            self._layout.identity, num_shards, block_size,
        )  # fmt: skip

    def _fail(self, error: ServingError) -> None:
        if not self.is_closed:
            self._note(Transition.RECEIVER_FAILED)
            self._callbacks.transfer_failed(self.order.transfer_id, error)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._reply(frames.Heartbeat())

    async def _write(self, stream: MessageStream) -> None:
        while True:
            while self._replies:
                await self._send(stream, self._replies.pop(0))
            if self.is_closed:
                await stream.close()
                return
            self._wake.clear()
            await self._wake.wait()

    async def _read(self, stream: MessageStream) -> None:
        while not self.is_closed:
            async with asyncio.timeout(self._silence_s):
                data = await stream.recv()
            number, message = frames.decode(data)
            if not self._arrivals.is_new(number):
                continue
            match message:
                case frames.Frame():
                    self._note(Transition.RECEIVER_RECEIVED)
                    self._accept(message)
                case frames.Starting():
                    self._note(Transition.RECEIVER_STARTING)
                    self._negotiate_grid(message, stream)
                    self._sub_attempt = message.sub_attempt
                    self._callbacks.transfer_starting(self.order.transfer_id, message.num_tokens)
                case frames.Commit():
                    self._note(Transition.RECEIVER_COMMITTED)
                    self._commit = message
                    self._verify()
                case frames.Restart(sub_attempt):
                    self._note(Transition.RECEIVER_RESTARTED)
                    self._sub_attempt = sub_attempt
                    self._checksums[:] = 0
                    self._is_here[:] = False
                    self._asked_again.clear()
                    self._commit = None
                case frames.Finished():
                    self._note(Transition.RECEIVER_FINISHED)
                    self._callbacks.transfer_finished(self.order.transfer_id)
                    self._finish()
                case frames.Failed(kind, text):
                    error = from_wire(kind, f"the prefill worker gave up: {text}")
                    # Its reasons are its own: whether the request goes on is for the router to say.
                    raise error if error.is_retryable else KVTransferError(error.message)
                case frames.NotFound():
                    self._note(Transition.RECEIVER_NOT_FOUND)
                    raise TransferNotFound("the prefill worker does not know this transfer")
                case frames.Heartbeat():
                    pass
                case _:
                    raise KVTransferError(
                        f"the prefill worker sent {type(message).__name__}, which is not its to "
                        "send"
                    )

    def _negotiate_grid(self, starting: frames.Starting, stream: MessageStream) -> None:
        """Find the common grid; if the sender's pool is mapped here, parts are read from it."""
        if self._starting is not None:
            raise KVTransferError("the prefill worker started this transfer twice")
        self._transport = stream.transport
        grid = common_grid(self._layout, starting.num_shards, starting.block_size_tokens)
        self._starting, self._grid = starting, grid
        if isinstance(stream, MappedStream) and stream.peer_segments is not None:
            theirs = replace(
                self._layout,
                num_shards=starting.num_shards,
                block_size_tokens=starting.block_size_tokens,
            )
            self._source = PoolParts(stream.peer_segments, theirs, grid)

    def _accept(self, frame: frames.Frame) -> None:
        """Check a frame's claims, then copy it into the reserved blocks, part by part."""
        if frame.sub_attempt != self._sub_attempt or self._is_arrived:
            self.num_late_frames += 1
            return
        pool, reservation, fence = self._pool, self._reservation, self._fence
        entries, source = frame.entries, self._source
        if pool is None or reservation is None or fence is None or not len(entries):
            raise KVTransferError(f"a frame of {len(entries)} parts was not expected")
        fence.check()
        self._check_range(entries, pool, reservation)
        at = entries["block"] // pool.blocks_per_block
        self._check_owner(reservation, int(at.min()), int(at.max()) + 1)
        block_ids = self._block_ids[at]
        if frame.payload is not None:
            if len(frame.payload) != pool.part_bytes * len(entries):
                raise KVTransferError(
                    f"a frame has {len(frame.payload)} bytes for {len(entries)} parts"
                )
            tallies = pool.scatter(entries, block_ids, frame.payload)
        elif source is None or not source.is_inside(entries):
            raise KVTransferError(
                f"a frame of {len(entries)} parts names blocks of no pool that is mapped here"
            )
        else:
            tallies = pool.pull(source, entries, block_ids)
        checksums = frames.keyed_checksums(
            self.order.transfer_id, frame.sub_attempt, entries, tallies
        )
        # What is damaged lies in reserved blocks now, which nobody reads before everything is
        # verified.
        is_good = checksums == entries["checksum"]
        good = entries[is_good]
        where = good["layer"], good["shard"], good["block"]
        self._checksums[where], self._is_here[where] = good["checksum"], True
        self.num_bytes += len(good) * pool.part_bytes
        if self._asked_again:
            self.num_resent += len(self._asked_again.intersection(_parts(good)))
        if not is_good.all():
            self._ask_again(_parts(entries[~is_good]))
        self._verify()

    def _check_range(self, entries: Array, pool: PoolParts, reservation: Reservation) -> None:
        first, last = self._wire_blocks(pool.grid, reservation)
        is_in_range = (
            (entries["layer"] < self._layout.num_layers)
            & (entries["shard"] < pool.grid.num_shards)
            & (entries["block"] >= first)
            & (entries["block"] < last)
            & (entries["num_valid_tokens"] > 0)
            & (entries["num_valid_tokens"] <= pool.grid.block_size_tokens)
        )
        if not is_in_range.all():
            layer, shard, block = _parts(entries[~is_in_range])[0]
            raise KVTransferError(
                f"a frame names layer {layer}, shard {shard}, block {block}, which is not in "
                "this transfer"
            )

    def _check_owner(self, reservation: Reservation, first: int, end: int) -> None:
        """Fence late writes: blocks that were handed out again belong to somebody else."""
        taken = zip(
            reservation.block_ids[first:end], reservation.generations[first:end], strict=True
        )
        for block_id, generation in taken:
            if self._generation_of(block_id) != generation:
                raise KVTransferError(
                    f"block {block_id} has a new owner; the frame for the old one was refused"
                )

    def _wire_blocks(self, grid: Grid, reservation: Reservation) -> tuple[int, int]:
        """Wire blocks that must come, first and end."""
        first = grid.blocks_for(reservation.have_blocks * self._layout.block_size_tokens)
        return first, grid.blocks_for(self._starting.num_tokens) if self._starting else first

    def _ask_again(self, bad: list[tuple[int, int, int]]) -> None:
        self._note(Transition.RECEIVER_DAMAGED)
        if len(self._asked_again) + len(bad) > frames.MAX_RESENDS:
            raise ChecksumMismatch(
                f"{len(bad)} parts of the KV came damaged after {len(self._asked_again)}, "
                f"{frames.MAX_RESENDS} may be asked for again"
            )
        twice = [part for part in bad if part in self._asked_again]
        if twice:
            raise ChecksumMismatch(
                f"{len(twice)} parts of the KV came damaged twice, first {twice[0]}"
            )
        self._asked_again.update(bad)
        self._reply(frames.Resend(self._sub_attempt, tuple(bad)))

    def _verify(self) -> None:
        """Once everything the commit counts is here, compare and report."""
        commit, reservation = self._commit, self._reservation
        if commit is None or self._is_arrived or commit.sub_attempt != self._sub_attempt:
            return
        num_here = int(self._is_here.sum())
        if num_here < commit.num_entries:
            return  # parts that were asked for again are on their way
        if reservation is None or self._pool is None or self._fence is None:
            raise KVTransferError("the prefill worker committed before blocks were reserved")
        grid = self._pool.grid
        first, last = self._wire_blocks(grid, reservation)
        expected = (last - first) * self._layout.num_layers * grid.num_shards
        if num_here != expected or commit.num_entries != expected:
            raise KVTransferError(
                f"the transfer has {num_here} parts, the reservation needs {expected}"
            )
        if frames.combined_checksum(self._checksums) != commit.checksum:
            raise ChecksumMismatch("the checksum over all parts does not match")
        self._fence.check()
        self._is_arrived = True
        self._note(Transition.RECEIVER_ARRIVED)
        num_blocks = len(reservation.block_ids) - reservation.have_blocks
        arrival = Arrival(self.num_bytes, num_blocks, self._transport, self.num_resent)
        self._callbacks.transfer_arrived(self.order.transfer_id, commit.first_tokens, arrival)


def _parts(entries: Array) -> list[tuple[int, int, int]]:
    return list(zip(*(entries[name].tolist() for name in ("layer", "shard", "block")), strict=True))
