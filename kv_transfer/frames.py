"""The messages of a Fetch stream, the fragments of KV in its frames, and their checksums.

Owns what the two ends of a transfer send each other, how much goes into one message, and the
checksums that bind a fragment to its place. Does not know their bytes (`codec`), streams or states.

    receiver ──▶ sender   Open, Reserved, Refused, Resend, Ack, Heartbeat; or Probe alone
    sender ──▶ receiver   Starting, Frame, Commit, Restart, Finished, Failed, NotFound, Heartbeat
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass

import numpy as np

from core.ids import TRANSFER_ID_BYTES, Incarnation, TransferId, WorkerId
from core.types import Logprob
from kv_transfer.copying import Array, bind

MAX_CONTROL_BYTES = 1 << 20
"""Of a message without payload: the longest, a Resend or a Commit, stays far below."""
MAX_MESSAGE_BYTES = 1 << 24
"""Every transport carries a message as long as this; `transfer.frame_bytes` may be as large."""
MAX_RESENDS = 64
"""Fragments a receiver may ask for again in one transfer: noise on a wire needs a few, and whoever
asks for more would be served the whole pool over and over."""
MAPPED_FRAMES = 8
"""Frames without payload may stand for so many: only their bookkeeping costs time, and that is per
frame."""
FRAME_HEAD_BYTES = 16
"""What comes before the entries of a frame. A multiple of 8, so that entries are aligned."""
ENTRY = np.dtype(
    [
        ("block", "<u4"),
        ("layer", "<u2"),
        ("shard", "<u2"),
        ("num_valid_tokens", "<u4"),
        ("source", "<u4"),
        ("checksum", "<u8"),
    ]
)
"""One fragment in a frame: which wire block (from the sequence's start) of which layer and wire
shard it is (`kv_transfer.resharding`), the sender's block it lies in, and the checksum that binds
all that."""
Place = tuple[int, int, int]
"""Layer, shard and block of a fragment."""
_SEED = struct.Struct(f"<{TRANSFER_ID_BYTES}sH")


@dataclass(frozen=True, slots=True)
class Open:
    """First message of a stream: who asks for which transfer, in which `KVLayout.identity`."""

    transfer_id: TransferId
    receiver_id: WorkerId
    receiver_incarnation: Incarnation
    identity: str
    num_shards: int
    block_size_tokens: int


@dataclass(frozen=True, slots=True)
class Starting:
    """The request is at the head of the queue: reserve blocks for so many tokens.

    From the sender's shape the receiver derives the common grid.
    """

    sub_attempt: int
    num_tokens: int
    num_shards: int
    block_size_tokens: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """Blocks are reserved; the KV of the first `have_tokens` is cached here and need not come."""

    sub_attempt: int
    have_tokens: int


@dataclass(frozen=True, slots=True)
class Refused:
    """No room; nothing is reserved."""

    message: str


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Fragments of KV: ENTRY [n], and their payload, uint8 [n * fragment_bytes].

    Without a payload the receiver reads them from the sender's pool, which it has mapped.
    """

    sub_attempt: int
    entries: Array
    payload: memoryview | None


@dataclass(frozen=True, slots=True)
class Resend:
    """These fragments did not match their checksum."""

    sub_attempt: int
    fragments: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """Everything was sent: how much, its `combined_checksum`, the first token of each choice."""

    sub_attempt: int
    num_entries: int
    checksum: int
    first_tokens: dict[int, Logprob]
    final_choices: frozenset[int]


@dataclass(frozen=True, slots=True)
class Restart:
    """The sequence was preempted: drop what arrived, keep the reservation."""

    sub_attempt: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The sender gave up: the error's class name and message, as of `core.errors.to_wire`."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Instead of Open: the peer only measures the route, by so many empty bytes."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class Ack:
    """Verified and attached: the sender may free its blocks."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Every first token was final: nothing is needed on decode."""


@dataclass(frozen=True, slots=True)
class NotFound:
    """No such transfer, or not for you."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Nothing else to send; the lease goes on."""


Message = (
    Open
    | Starting
    | Reserved
    | Refused
    | Frame
    | Resend
    | Commit
    | Restart
    | Failed
    | Ack
    | Finished
    | NotFound
    | Heartbeat
    | Probe
)


def keyed_checksums(
    transfer_id: TransferId, sub_attempt: int, entries: Array, tallies: Array
) -> Array:
    """Checksums of fragments, uint64 [n], bound to their places: a swap shows like a flipped bit.

    Args:
        transfer_id: The transfer they belong to.
        sub_attempt: The sub-attempt they belong to.
        entries: ENTRY [n]; source and checksum are not used.
        tallies: Sums over their bytes, uint64 [n].
    """
    # Keyed by the sub-attempt: a frame of an earlier one is whole, and belongs to other blocks.
    digest = hashlib.blake2b(_SEED.pack(transfer_id, sub_attempt), digest_size=8).digest()
    names = ("block", "layer", "shard", "num_valid_tokens")
    return bind(tallies, int.from_bytes(digest, "little"), *(entries[name] for name in names))


def combined_checksum(checksums: Array) -> int:
    """Checksum over those of fragments, uint64 [layers, shards, blocks]; 0 where none travelled."""
    # A sum of sums: the payload has been read for its own, and is not read a second time.
    return zlib.crc32(np.ascontiguousarray(checksums).tobytes())


def fragments_per_frame(frame_bytes: int, fragment_bytes: int, *, is_mapped: bool) -> int:
    """How many fragments go into one frame, so that with head and entries it fits its limit.

    Args:
        frame_bytes: Longest frame; one fragment always goes.
        fragment_bytes: Of one fragment.
        is_mapped: The payload stays in the pool; a frame then stands for up to `MAPPED_FRAMES`.
    """
    room = frame_bytes - FRAME_HEAD_BYTES
    if is_mapped:
        count = min(MAPPED_FRAMES * frame_bytes // fragment_bytes, room // ENTRY.itemsize)
    else:
        count = room // (ENTRY.itemsize + fragment_bytes)
    return max(1, count)
