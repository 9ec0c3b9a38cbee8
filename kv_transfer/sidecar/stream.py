"""One end of a stream that a sidecar carries, and the connection whose slots it uses.

Owns waiting for slots, messages put together from pieces, and what happens to a reader that does
not read. Does not know processes or sockets.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from core.ports import StreamClosed
from kv_transfer.sidecar.protocol import PIECE_HEAD_BYTES, ControlMessage, MessageKind, slot_of

SEND_TIMEOUT_S = 5.0
"""Longest wait for a slot: as long as a lease, after which nobody wants the KV."""
NO_SLOT = -1
UNREAD_SLOTS = 2
"""Slots that one stream may keep full; what comes beyond is copied out."""
MAX_UNREAD_BYTES = 64 << 20
"""Of one stream, copied out; a reader this far behind has stopped, and its stream is cut."""


class Sidecar(Protocol):
    """What a stream asks of the client that made it."""

    kind: str
    slot_bytes: int

    def send(self, message: ControlMessage) -> None:
        """Send to the process."""
        ...

    def free(self, connection: int, slot: int) -> None:
        """Report an inbound slot as read; `NO_SLOT`: it was emptied before."""
        ...


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of a message, and the slot it lies in."""

    slot: int
    data: memoryview
    is_last: bool


@dataclass(slots=True)
class SidecarConnection:
    """A connection as the worker sees it."""

    arena: memoryview
    free: asyncio.Queue[int]
    streams: dict[int, SidecarStream] = field(default_factory=dict)
    is_lost: bool = False


class SidecarStream:
    """One end of a transfer's stream. A received message is valid until the next `recv`."""

    def __init__(
        self, sidecar: Sidecar, connection_number: int, connection: SidecarConnection, number: int
    ) -> None:
        """Join a connection; the sidecar's client makes it."""
        self.transport = sidecar.kind
        self._sidecar = sidecar
        self._connection_number = connection_number
        self._connection = connection
        self._number = number
        self._inbox: asyncio.Queue[_Piece | None] = asyncio.Queue()  # bounded by MAX_UNREAD_BYTES
        self._num_unread_bytes = 0
        self._in_hand = NO_SLOT
        self._is_over = False
        self._has_closed = False

    async def send(self, message: bytes) -> None:
        """See `MessageStream`."""
        view = memoryview(message)
        connection = self._connection
        room = self._sidecar.slot_bytes - PIECE_HEAD_BYTES
        # At least one piece: an empty message is a message, too.
        for at in range(0, max(1, len(view)), room):
            piece = view[at : at + room]
            slot = await self._free_slot()
            slot_of(connection.arena, slot, self._sidecar.slot_bytes)[
                PIECE_HEAD_BYTES : PIECE_HEAD_BYTES + len(piece)
            ] = piece
            is_last = at + room >= len(view)
            self._sidecar.send(
                ControlMessage(
                    MessageKind.SEND,
                    self._connection_number,
                    self._number,
                    slot,
                    len(piece),
                    is_last,
                )
            )

    async def _free_slot(self) -> int:
        if self._is_over or self._has_closed:
            raise StreamClosed("the stream is closed")
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                slot = await self._connection.free.get()
        except TimeoutError:
            # Cut, not only given up: half a message may have gone.
            self.reset()
            raise StreamClosed(f"the peer took nothing for {SEND_TIMEOUT_S:g} s") from None
        if self._is_over or slot == NO_SLOT:
            # Back to the others: a slot is theirs, and NO_SLOT wakes the next one that waits.
            self._connection.free.put_nowait(slot)
            raise StreamClosed("the stream was cut")
        return slot

    async def recv(self) -> memoryview:
        """See `MessageStream`."""
        self._free_slot_in_hand()
        piece = await self._next_piece()
        if piece.is_last:
            # Not copied: the caller reads it in its slot, which is free at the next `recv`.
            self._in_hand = piece.slot
            return piece.data
        return await self._join(piece)

    async def _join(self, piece: _Piece) -> memoryview:
        """Put a message together that is longer than a slot."""
        whole = bytearray(piece.data)
        while not piece.is_last:
            self._sidecar.free(self._connection_number, piece.slot)
            piece = await self._next_piece()
            whole += piece.data
        self._sidecar.free(self._connection_number, piece.slot)
        return memoryview(whole)

    async def _next_piece(self) -> _Piece:
        piece = None if self._is_over and self._inbox.empty() else await self._inbox.get()
        if piece is None:
            self._is_over = True
            raise StreamClosed("the peer closed the stream")
        self._num_unread_bytes -= len(piece.data)
        return piece

    def _free_slot_in_hand(self) -> None:
        self._sidecar.free(self._connection_number, self._in_hand)
        self._in_hand = NO_SLOT

    def arrive(self, slot: int, num_bytes: int, *, is_last: bool) -> None:
        """Take a piece that is in a slot; a slow reader must not keep slots from others."""
        data = slot_of(self._connection.arena, slot, self._sidecar.slot_bytes)
        data = data[PIECE_HEAD_BYTES : PIECE_HEAD_BYTES + num_bytes].toreadonly()
        self._num_unread_bytes += num_bytes
        if self._num_unread_bytes > MAX_UNREAD_BYTES:
            self._sidecar.free(self._connection_number, slot)
            self.reset()
            return
        # All streams of a connection share its slots, so a slow one pays with a copy of its own.
        if self._inbox.qsize() >= UNREAD_SLOTS:
            data = memoryview(bytes(data))
            self._sidecar.free(self._connection_number, slot)
            slot = NO_SLOT
        self._inbox.put_nowait(_Piece(slot, data, is_last))

    def end(self) -> None:
        """Let the reader see the end once it has read what came."""
        self._inbox.put_nowait(None)

    def cut(self) -> None:
        """Drop what was not read: the stream is over in both directions."""
        self._is_over = True
        self._free_slot_in_hand()
        # Slots back to the others: the connection goes on without this stream.
        while not self._inbox.empty():
            piece = self._inbox.get_nowait()
            if piece is not None:
                self._sidecar.free(self._connection_number, piece.slot)
        self._inbox.put_nowait(None)

    async def close(self) -> None:
        """See `MessageStream`."""
        if not self._has_closed and not self._is_over:
            self._has_closed = True
            self._sidecar.send(
                ControlMessage(MessageKind.CLOSE, self._connection_number, self._number)
            )

    def reset(self) -> None:
        """See `MessageStream`."""
        if self._number in self._connection.streams:
            self._sidecar.send(
                ControlMessage(MessageKind.RESET, self._connection_number, self._number)
            )
        self.leave()

    def leave(self) -> None:
        """Detach from the connection; what still comes for this stream is dropped."""
        self._connection.streams.pop(self._number, None)
        self.cut()


def lose(connection: SidecarConnection) -> None:
    """End every stream of a connection that is gone."""
    connection.is_lost = True
    for stream in connection.streams.values():
        stream.cut()
    connection.streams.clear()
    connection.free.put_nowait(NO_SLOT)  # wakes whoever waits for a slot, one after the other
