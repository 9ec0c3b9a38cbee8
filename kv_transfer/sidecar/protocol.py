"""What a worker and its carrier process say to one another, and what carriers say across.

Owns two fixed layouts: records on the socket between worker and carrier, and the head of every
piece between two carriers. Payload lies in slots of an arena that worker and carrier share, one per
link. Does not know torch or transfers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

MAX_RECORD_BYTES = 1024
SLOTS = 6
"""Slots of a link in either direction: how much may be under way."""
HEARTBEAT_S = 0.25
"""How often a carrier shows that it lives."""
_RECORD = struct.Struct("<BBHIII")
_PIECE = struct.Struct("<BBHII4x")
PIECE_HEAD_BYTES = _PIECE.size


class MessageKind(IntEnum):
    """Kinds of records, and of pieces."""

    DIAL = 1
    """Worker: open a stream to an address (text)."""
    SEND = 2
    """Worker: a filled slot goes out. Across: a piece of a message."""
    FREE = 3
    """Worker: an inbound slot was read."""
    CLOSE = 4
    """Either way and across: nothing more will be sent."""
    RESET = 5
    """Either way and across: the stream is cut."""
    READY = 6
    """Carrier: it listens."""
    LINKED = 7
    """Carrier: a link to a peer; the arena's descriptor comes with it."""
    OPENED = 8
    """Carrier: the dialled stream is open. Across: accepted."""
    REFUSED = 9
    """Carrier: the dialled stream cannot be opened (text)."""
    ACCEPTED = 10
    """Carrier: a peer opened a stream. Across: open."""
    RECEIVED = 11
    """Carrier: a slot holds a piece of a message."""
    SENT = 12
    """Carrier: an outbound slot is free again."""
    LOST = 13
    """Carrier: a link has ended, with all its streams (text)."""
    PULSE = 14
    """Carrier: it lives. Across: the peer lives."""


@dataclass(frozen=True, slots=True)
class ControlMessage:
    """One message between worker and carrier."""

    what: MessageKind
    connection: int = 0
    stream: int = 0
    slot: int = 0
    num_bytes: int = 0
    is_last: bool = True
    text: str = ""

    def pack(self) -> bytes:
        """As bytes, for one datagram."""
        head = _RECORD.pack(
            self.what, self.is_last, self.slot, self.connection, self.stream, self.num_bytes
        )
        return head + self.text.encode()[: MAX_RECORD_BYTES - _RECORD.size]

    @classmethod
    def unpack(cls, data: bytes) -> ControlMessage:
        """Read a datagram of the other process, which is ours."""
        what, is_last, slot, connection, stream, num_bytes = _RECORD.unpack_from(data)
        text = data[_RECORD.size :].decode(errors="replace")
        return cls(MessageKind(what), connection, stream, slot, num_bytes, bool(is_last), text)


@dataclass(frozen=True, slots=True)
class DataHeader:
    """Head of what goes from carrier to carrier; `num_bytes` of payload follow."""

    what: MessageKind
    stream: int = 0
    num_bytes: int = 0
    is_last: bool = True

    def write(self, slot: memoryview) -> None:
        """Put it at the head of a slot."""
        _PIECE.pack_into(slot, 0, self.what, self.is_last, 0, self.stream, self.num_bytes)

    @classmethod
    def read(cls, slot: memoryview) -> DataHeader:
        """Read a peer's head.

        Raises:
            ValueError: It is none, or claims more than a slot holds.
        """
        what, is_last, _, stream, num_bytes = _PIECE.unpack_from(slot)
        if num_bytes > len(slot) - PIECE_HEAD_BYTES:
            raise ValueError(
                f"a piece claims {num_bytes} bytes, a slot holds {len(slot) - PIECE_HEAD_BYTES}"
            )
        return cls(MessageKind(what), stream, num_bytes, bool(is_last))


def arena_bytes(slot_bytes: int) -> int:
    """Size of a link's arena: inbound slots first, then outbound ones."""
    return 2 * SLOTS * slot_bytes


def slot_of(arena: memoryview, number: int, slot_bytes: int) -> memoryview:
    """One slot of an arena."""
    return arena[number * slot_bytes : (number + 1) * slot_bytes]
