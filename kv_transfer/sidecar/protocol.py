"""What a worker and its sidecar process send each other, and what two sidecars do.

Owns two fixed layouts: control messages on the socket between worker and sidecar, and the head of
every piece between two sidecars. Payload lies in slots of an arena that worker and sidecar share,
one per connection. Does not know torch or transfers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

MAX_CONTROL_BYTES = 1024
SLOTS = 6
"""Slots of a connection in either direction: how much may be in flight."""
HEARTBEAT_S = 0.25
"""How often a sidecar shows that it lives: eight times in the silence after which it is killed."""
_CONTROL = struct.Struct("<BBHIII")
_PIECE = struct.Struct("<BBHII4x")
PIECE_HEAD_BYTES = _PIECE.size


class MessageKind(IntEnum):
    """Kinds of control messages, and of pieces."""

    DIAL = 1
    """Worker: open a stream to an address (text). Sidecar: which connection it goes over."""
    SEND = 2
    """Worker: a filled slot goes out. Across: a piece of a message."""
    FREE = 3
    """Worker: an inbound slot was read."""
    CLOSE = 4
    """Both directions and across: nothing more will be sent."""
    RESET = 5
    """Both directions and across: the stream is cut."""
    READY = 6
    """Sidecar: it listens."""
    CONNECTED = 7
    """Sidecar: a connection to a peer; the arena's descriptor comes with it."""
    OPENED = 8
    """Sidecar: the dialled stream is open. Across: accepted."""
    REFUSED = 9
    """Sidecar: the dialled stream cannot be opened (text)."""
    ACCEPTED = 10
    """Sidecar: a peer opened a stream. Across: open."""
    RECEIVED = 11
    """Sidecar: a slot holds a piece of a message."""
    SENT = 12
    """Sidecar: an outbound slot is free again."""
    LOST = 13
    """Sidecar: a connection has ended, with all its streams (text)."""
    HEARTBEAT = 14
    """Sidecar: it lives. Across: the peer lives."""


@dataclass(frozen=True, slots=True)
class ControlMessage:
    """One message between worker and sidecar."""

    kind: MessageKind
    connection: int = 0
    stream: int = 0
    slot: int = 0
    num_bytes: int = 0
    is_last: bool = True
    text: str = ""

    def pack(self) -> bytes:
        """Encode it for one datagram; a longer text is cut off."""
        head = _CONTROL.pack(
            self.kind, self.is_last, self.slot, self.connection, self.stream, self.num_bytes
        )
        return head + self.text.encode()[: MAX_CONTROL_BYTES - _CONTROL.size]

    @classmethod
    def unpack(cls, data: bytes) -> ControlMessage:
        """Decode a datagram of the other process, which is ours."""
        kind, is_last, slot, connection, stream, num_bytes = _CONTROL.unpack_from(data)
        # The cut may go through a character.
        text = data[_CONTROL.size :].decode(errors="replace")
        return cls(MessageKind(kind), connection, stream, slot, num_bytes, bool(is_last), text)


@dataclass(frozen=True, slots=True)
class DataHeader:
    """Head of what goes from sidecar to sidecar; `num_bytes` of payload follow."""

    kind: MessageKind
    stream: int = 0
    num_bytes: int = 0
    is_last: bool = True

    def write(self, slot: memoryview) -> None:
        """Put it at the head of a slot."""
        _PIECE.pack_into(slot, 0, self.kind, self.is_last, 0, self.stream, self.num_bytes)

    @classmethod
    def read(cls, slot: memoryview) -> DataHeader:
        """Read a peer's head.

        Raises:
            ValueError: It is none, or claims more than a slot holds.
        """
        kind, is_last, _, stream, num_bytes = _PIECE.unpack_from(slot)
        if num_bytes > len(slot) - PIECE_HEAD_BYTES:
            raise ValueError(
                f"a piece claims {num_bytes} bytes, a slot holds {len(slot) - PIECE_HEAD_BYTES}"
            )
        return cls(MessageKind(kind), stream, num_bytes, bool(is_last))


def arena_bytes(slot_bytes: int) -> int:
    """Size of a connection's arena: inbound slots first, then outbound ones."""
    return 2 * SLOTS * slot_bytes


def slot_of(arena: memoryview, number: int, slot_bytes: int) -> memoryview:
    """View one slot of an arena."""
    return arena[number * slot_bytes : (number + 1) * slot_bytes]
