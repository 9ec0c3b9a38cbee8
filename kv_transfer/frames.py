"""Messages of a Fetch stream as fixed-layout bytes, and the checksums bound to what they carry.

Owns encoding and decoding: kind, number in the stream, CRC-32 of all but a payload, then a
little-endian struct. A peer's numbers are never trusted: lengths and ranges are checked before
anything is copied. Does not know streams or transfers' states.

    receiver ──▶ sender   Open, Reserved, Refused, Resend, Ack, Beat; or Probe alone
    sender ──▶ receiver   Starting, Frame, Commit, Restart, Finished, Failed, NotFound, Beat
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass

import numpy as np

from core.errors import KVTransferError
from core.ids import TRANSFER_ID_BYTES, Incarnation, TransferId, WorkerId
from core.types import Logprob
from kv_transfer.copying import Array, bind

MAX_CONTROL_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 1 << 24
"""Every transport carries a message as long as this; `transfer.frame_bytes` may be as large."""
MAX_RESENDS = 64
"""Parts a receiver may ask for again in one transfer before the attempt is given up."""
MAPPED_FRAMES = 8
"""Frames without payload may stand for so many: only their books cost time, kept per frame."""
FRAME, FRAME_IN_POOL = 5, 14
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
"""One part in a frame: which wire block (from the sequence's start) of which layer and wire shard
it is (`kv_transfer.resharding`), the sender's block it lies in, and the checksum that binds all
that."""
_HEAD = struct.Struct("<BII")  # kind, number, CRC-32
_NUMBER = struct.Struct("<BI")
_FRAME = struct.Struct("<HI1x")  # sub-attempt, entries; what follows is aligned to words
FRAME_HEAD_BYTES = _HEAD.size + _FRAME.size
_OPEN = struct.Struct(
    f"<B{TRANSFER_ID_BYTES}sqHHHH"
)  # ..., shards, block size, id bytes, identity bytes
_STARTING = struct.Struct("<BHIHH")  # ..., tokens, shards, block size
_RESERVED = struct.Struct("<BHI")
_COMMIT = struct.Struct("<BHIIH")
_TOKEN = struct.Struct("<HBidH")  # choice, is final, token, logprob, top entries
_TOP = struct.Struct("<id")
_SUB = struct.Struct("<BH")
_PROBE = struct.Struct("<BQ")
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
    """The request is at the head of the queue; reserve this much.

    The sender's shape gives the common grid.
    """

    sub_attempt: int
    num_tokens: int
    num_shards: int
    block_size_tokens: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """Blocks are reserved; the first `have_tokens` are here already."""

    sub_attempt: int
    have_tokens: int


@dataclass(frozen=True, slots=True)
class Refused:
    """No room; nothing is reserved."""

    message: str


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Parts of KV: ENTRY [n], and their payload, uint8 [n * part_bytes].

    Without a payload they are read from the shared pool.
    """

    sub_attempt: int
    entries: Array
    payload: memoryview | None


@dataclass(frozen=True, slots=True)
class Resend:
    """These (layer, shard, block) did not match their checksum."""

    sub_attempt: int
    parts: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """Everything was sent: counts, checksum over sorted checksums, first token of each choice."""

    sub_attempt: int
    num_entries: int
    checksum: int
    first_tokens: dict[int, Logprob]
    final_choices: frozenset[int]


@dataclass(frozen=True, slots=True)
class Restart:
    """The sequence was preempted: forget what came, keep the reservation."""

    sub_attempt: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The sender gave up: the error's class name and message, as of `core.errors.to_wire`."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Instead of Open: the peer only tries the way, and moves so many empty bytes over it."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class Ack:
    """Verified and attached: the sender's blocks may go."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Every first token was final: nothing is needed on decode."""


@dataclass(frozen=True, slots=True)
class NotFound:
    """No such transfer, or not for you."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Nothing to say; the lease goes on."""


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
_EMPTY: dict[int, type[Ack] | type[Finished] | type[NotFound] | type[Heartbeat]] = {
    8: Ack,
    10: Finished,
    12: NotFound,
    13: Heartbeat,
}
_KIND_OF_EMPTY = {cls: kind for kind, cls in _EMPTY.items()}


def keyed_checksums(
    transfer_id: TransferId, sub_attempt: int, entries: Array, tallies: Array
) -> Array:
    """Checksums of parts, uint64 [n], bound to what they claim to be: a swap shows like a flip.

    Args:
        transfer_id: The transfer they belong to.
        sub_attempt: The sub-attempt they belong to.
        entries: ENTRY [n]; source and checksum are not looked at.
        tallies: Sums over their bytes, uint64 [n].
    """
    digest = hashlib.blake2b(_SEED.pack(transfer_id, sub_attempt), digest_size=8).digest()
    names = ("block", "layer", "shard", "num_valid_tokens")
    return bind(tallies, int.from_bytes(digest, "little"), *(entries[name] for name in names))


def combined_checksum(checksums: Array) -> int:
    """Checksum over those of parts, uint64 [layers, shards, blocks]; 0 where none travelled."""
    return zlib.crc32(np.ascontiguousarray(checksums).tobytes())


def parts_per_frame(frame_bytes: int, part_bytes: int, *, is_mapped: bool) -> int:
    """How many parts go into one frame, so that with head and entries it is as long as allowed.

    Args:
        frame_bytes: Longest frame; one part always goes.
        part_bytes: Of one part.
        is_mapped: The payload stays in the pool; a frame stands for up to `MAPPED_FRAMES` then.
    """
    room = frame_bytes - FRAME_HEAD_BYTES
    if is_mapped:
        count = min(MAPPED_FRAMES * frame_bytes // part_bytes, room // ENTRY.itemsize)
    else:
        count = room // (ENTRY.itemsize + part_bytes)
    return max(1, count)


def encode_frame(
    number: int, sub_attempt: int, entries: Array, payload: memoryview | None
) -> bytes:
    """Encode a frame.

    The payload has the entries' checksums, so that only its damaged parts are asked for again.

    Raises:
        KVTransferError: No transport carries a message as long.
    """
    kind = FRAME if payload is not None else FRAME_IN_POOL
    num_bytes = FRAME_HEAD_BYTES + entries.nbytes + len(payload or b"")
    if num_bytes > MAX_MESSAGE_BYTES:
        raise KVTransferError(
            f"a frame of {len(entries)} parts has {num_bytes} bytes, a message has at most "
            f"{MAX_MESSAGE_BYTES}; lower transfer.frame_bytes or engine.block_size_tokens"
        )
    body = _FRAME.pack(sub_attempt, len(entries)) + entries.tobytes()
    return b"".join((_HEAD.pack(kind, number, _head_crc(kind, number, body)), body, payload or b""))


def encode(number: int, message: Message) -> bytes:
    """Encode any message but `Frame`; `number` is its place in its stream.

    Raises:
        KVTransferError: It is longer than a peer would take.
    """
    plain = _encode(message)
    _check_control(plain)
    kind, body = plain[0], plain[1:]
    return _HEAD.pack(kind, number, _head_crc(kind, number, body)) + body


def _head_crc(kind: int, number: int, body: bytes | bytearray | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(_NUMBER.pack(kind, number)))


def _encode(message: Message) -> bytes:
    match message:
        case Open(transfer_id, receiver_id, incarnation, identity, shards, block_size):
            name, text = receiver_id.encode(), identity.encode()
            head = _OPEN.pack(1, transfer_id, incarnation, shards, block_size, len(name), len(text))
            return head + name + text
        case Starting(sub_attempt, num_tokens, num_shards, block_size):
            return _STARTING.pack(2, sub_attempt, num_tokens, num_shards, block_size)
        case Reserved(sub_attempt, have_tokens):
            return _RESERVED.pack(3, sub_attempt, have_tokens)
        case Probe(num_bytes):
            return _PROBE.pack(15, num_bytes)
        case Refused(text):
            return b"\x04" + text.encode()
        case Resend(sub_attempt, parts):
            flat = [n for part in parts for n in part]
            return _SUB.pack(6, sub_attempt) + struct.pack(f"<{len(flat)}I", *flat)
        case Commit():
            return _encode_commit(message)
        case Restart(sub_attempt):
            return _SUB.pack(9, sub_attempt)
        case Failed(name, text):
            return b"\x0b" + f"{name}\0{text}".encode()
        case Frame():
            raise KVTransferError("frames are encoded by encode_frame")
        case _:
            return bytes((_KIND_OF_EMPTY[type(message)],))


def _encode_commit(c: Commit) -> bytes:
    out = bytearray(_COMMIT.pack(7, c.sub_attempt, c.num_entries, c.checksum, len(c.first_tokens)))
    for choice, token in c.first_tokens.items():
        is_final = choice in c.final_choices
        out += _TOKEN.pack(choice, is_final, token.token_id, token.logprob, len(token.top))
        for token_id, logprob in token.top:
            out += _TOP.pack(token_id, logprob)
    return bytes(out)


def decode(data: bytes) -> tuple[int, Message]:
    """Decode one message of a peer.

    Returns:
        Its number in the stream, and the message. A frame's payload is not checked here.

    Raises:
        KVTransferError: Damaged, truncated, oversized or unknown; nothing was touched.
    """
    try:
        kind, number, crc = _HEAD.unpack_from(data)
        end = len(data)
        if kind in (FRAME, FRAME_IN_POOL):
            end = (
                _HEAD.size + _FRAME.size + _FRAME.unpack_from(data, _HEAD.size)[1] * ENTRY.itemsize
            )
        if _head_crc(kind, number, memoryview(data)[_HEAD.size : end]) != crc:
            raise KVTransferError(
                f"a transfer message of {len(data)} bytes does not match its checksum"
            )
        return number, _decode_frame(data, kind) if kind in (FRAME, FRAME_IN_POOL) else _decode(
            bytes((kind,)) + data[_HEAD.size :]
        )
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise KVTransferError(
            f"a transfer message of {len(data)} bytes is malformed: {error}"
        ) from error


def _check_control(plain: bytes) -> None:
    if len(plain) > MAX_CONTROL_BYTES:
        raise KVTransferError(
            f"a transfer control message has {len(plain)} bytes, the limit is {MAX_CONTROL_BYTES}"
        )


def _decode(data: bytes) -> Message:
    kind = data[0]
    _check_control(data)
    if kind in _EMPTY:
        return _EMPTY[kind]()
    match kind:
        case 1:
            _, transfer_id, incarnation, shards, block_size, name_bytes, identity_bytes = (
                _OPEN.unpack_from(data)
            )
            rest = data[_OPEN.size :]
            if len(rest) != name_bytes + identity_bytes:
                raise KVTransferError("an Open message has the wrong length")
            name, identity = rest[:name_bytes].decode(), rest[name_bytes:].decode()
            return Open(
                TransferId(transfer_id),
                WorkerId(name),
                Incarnation(incarnation),
                identity,
                shards,
                block_size,
            )
        case 2:
            return Starting(*_STARTING.unpack(data)[1:])
        case 3:
            return Reserved(*_RESERVED.unpack(data)[1:])
        case 15:
            return Probe(*_PROBE.unpack(data)[1:])
        case 4:
            return Refused(data[1:].decode())
        case 6:
            count = (len(data) - _SUB.size) // 12
            flat = struct.unpack_from(f"<{count * 3}I", data, _SUB.size)
            parts = tuple((flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3))
            return Resend(_SUB.unpack_from(data)[1], parts)
        case 7:
            return _decode_commit(data)
        case 9:
            return Restart(_SUB.unpack(data)[1])
        case 11:
            name, _, text = data[1:].decode().partition("\0")
            return Failed(name, text)
        case _:
            raise KVTransferError(f"a transfer message has the unknown kind {kind}")


def _decode_frame(data: bytes, kind: int) -> Frame:
    sub_attempt, count = _FRAME.unpack_from(data, _HEAD.size)
    first = _HEAD.size + _FRAME.size
    end = first + count * ENTRY.itemsize
    if end > len(data):
        raise KVTransferError(f"a frame of {len(data)} bytes cannot hold {count} entries")
    payload = memoryview(data)[end:] if kind == FRAME else None
    return Frame(sub_attempt, np.frombuffer(data, ENTRY, count, first), payload)


def _decode_commit(data: bytes) -> Commit:
    _, sub_attempt, num_entries, checksum, count = _COMMIT.unpack_from(data)
    at, tokens, final = _COMMIT.size, {}, set()
    for _ in range(count):
        choice, is_final, token_id, logprob, num_top = _TOKEN.unpack_from(data, at)
        at += _TOKEN.size
        top = tuple(_TOP.unpack_from(data, at + i * _TOP.size) for i in range(num_top))
        at += num_top * _TOP.size
        tokens[choice] = Logprob(token_id, logprob, top)
        if is_final:
            final.add(choice)
    return Commit(sub_attempt, num_entries, checksum, tokens, frozenset(final))
