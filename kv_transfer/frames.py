"""Messages of a Fetch stream as fixed-layout bytes, and the checksum bound to what they carry.

Owns encoding and decoding: kind, number in the stream, CRC-32 of all but a payload, then a
little-endian struct. A peer's numbers are never trusted: lengths and ranges are checked before
anything is copied. Does not know streams or
transfers' states. Called by `kv_transfer.sender` and `kv_transfer.receiver`.

    receiver ──▶ sender   Open, Reserved, Refused, Resend, Ack, Beat
    sender ──▶ receiver   Starting, Frame, Commit, Restart, Finished, Failed, NotFound, Beat
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.errors import KVTransferError
from core.ids import TRANSFER_ID_BYTES, Incarnation, TransferId, WorkerId
from core.types import Logprob

MAX_CONTROL_BYTES = 1 << 20
_ENTRY = struct.Struct("<HHIHI")  # layer, shard, logical block, valid tokens, crc
_HEAD = struct.Struct("<BII")  # kind, number, crc
_NUMBER = struct.Struct("<BI")
_FRAME = struct.Struct("<HH")  # sub-attempt, entries
_OPEN = struct.Struct(f"<B{TRANSFER_ID_BYTES}sqHHHH")  # ..., shards, block size, id bytes, identity bytes
_STARTING = struct.Struct("<BHIHH")  # ..., tokens, shards, block size
_RESERVED = struct.Struct("<BHI")
_COMMIT = struct.Struct("<BHIIH")
_TOKEN = struct.Struct("<HBidH")  # choice, is final, token, logprob, top entries
_TOP = struct.Struct("<id")
_SUB = struct.Struct("<BH")
_BOUND = struct.Struct(f"<{TRANSFER_ID_BYTES}sHHHIH")


@dataclass(frozen=True, slots=True)
class Open:
    """First message of a stream: who asks, for which transfer, in which layout (`KVLayout.identity`)."""

    transfer_id: TransferId
    receiver_id: WorkerId
    receiver_incarnation: Incarnation
    identity: str
    num_shards: int
    block_size_tokens: int


@dataclass(frozen=True, slots=True)
class Starting:
    """The request is at the head of the queue; reserve this much. The sender's shape gives the common grid."""

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


@dataclass(frozen=True, slots=True)
class Entry:
    """One layer of one wire shard of one wire block (`kv_transfer.resharding`), from the sequence's start."""

    layer: int
    shard: int
    block: int
    num_valid_tokens: int
    crc: int


@dataclass(frozen=True, slots=True)
class Frame:
    """Entries and their payload, uint8 [len(entries) * part_bytes]."""

    sub_attempt: int
    entries: tuple[Entry, ...]
    payload: memoryview


@dataclass(frozen=True, slots=True)
class Resend:
    """These (layer, shard, block) did not match their checksum."""

    sub_attempt: int
    parts: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """Everything was sent: counts, checksum over sorted checksums, the first token of each choice."""

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
    """The sender gave up: the error's class name and message, as `core.errors.to_wire` gives them."""

    kind: str
    message: str


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
class Beat:
    """Nothing to say; the lease goes on."""


Message = (
    Open | Starting | Reserved | Refused | Frame | Resend | Commit | Restart | Failed | Ack | Finished | NotFound | Beat
)
_EMPTY: dict[int, type[Ack] | type[Finished] | type[NotFound] | type[Beat]] = {
    8: Ack,
    10: Finished,
    12: NotFound,
    13: Beat,
}
_KIND_OF_EMPTY = {cls: kind for kind, cls in _EMPTY.items()}


def bound_crc(transfer_id: TransferId, sub_attempt: int, entry: tuple[int, int, int, int], payload: memoryview) -> int:
    """CRC-32 of a payload, seeded with what it claims to be, so that a swap is caught like a flip.

    Args:
        transfer_id: The transfer it belongs to.
        sub_attempt: The sub-attempt it belongs to.
        entry: (layer, shard, block, num_valid_tokens).
        payload: uint8 [part_bytes].
    """
    seed = zlib.crc32(_BOUND.pack(transfer_id, sub_attempt, *entry))
    return zlib.crc32(payload, seed)


def combined_checksum(crc_by_part: dict[tuple[int, int, int], int]) -> int:
    """Checksum over entry checksums sorted by (shard, block, layer)."""
    ordered = sorted(crc_by_part.items(), key=lambda item: (item[0][1], item[0][2], item[0][0]))
    return zlib.crc32(struct.pack(f"<{len(ordered)}I", *(crc for _, crc in ordered)))


def encode_frame(number: int, sub_attempt: int, entries: Sequence[Entry], payloads: Iterable[memoryview]) -> bytes:
    """Encode a frame in one copy: `payloads` are the pool's own views, read here and now.

    The payload has the entries' checksums, so that only its damaged parts are asked for again.
    """
    body = bytearray(_FRAME.pack(sub_attempt, len(entries)))
    for e in entries:
        body += _ENTRY.pack(e.layer, e.shard, e.block, e.num_valid_tokens, e.crc)
    return b"".join((_HEAD.pack(5, number, _head_crc(5, number, body)), body, *payloads))


def encode(number: int, message: Message) -> bytes:
    """Encode any message but `Frame`; `number` is its place in its stream."""
    plain = _encode(message)
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
        if kind == 5:
            end = _HEAD.size + _FRAME.size + _FRAME.unpack_from(data, _HEAD.size)[1] * _ENTRY.size
        if _head_crc(kind, number, memoryview(data)[_HEAD.size : end]) != crc:
            raise KVTransferError(f"a transfer message of {len(data)} bytes does not match its checksum")
        return number, _decode_frame(data) if kind == 5 else _decode(bytes((kind,)) + data[_HEAD.size :])
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise KVTransferError(f"a transfer message of {len(data)} bytes is malformed: {error}") from error


def _decode(data: bytes) -> Message:
    kind = data[0]
    if len(data) > MAX_CONTROL_BYTES:
        raise KVTransferError(f"a transfer control message has {len(data)} bytes, the limit is {MAX_CONTROL_BYTES}")
    if kind in _EMPTY:
        return _EMPTY[kind]()
    match kind:
        case 1:
            _, transfer_id, incarnation, shards, block_size, name_bytes, identity_bytes = _OPEN.unpack_from(data)
            rest = data[_OPEN.size :]
            if len(rest) != name_bytes + identity_bytes:
                raise KVTransferError("an Open message has the wrong length")
            name, identity = rest[:name_bytes].decode(), rest[name_bytes:].decode()
            return Open(TransferId(transfer_id), WorkerId(name), Incarnation(incarnation), identity, shards, block_size)
        case 2:
            return Starting(*_STARTING.unpack(data)[1:])
        case 3:
            return Reserved(*_RESERVED.unpack(data)[1:])
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


def _decode_frame(data: bytes) -> Frame:
    sub_attempt, count = _FRAME.unpack_from(data, _HEAD.size)
    first = _HEAD.size + _FRAME.size
    entries = tuple(Entry(*_ENTRY.unpack_from(data, first + i * _ENTRY.size)) for i in range(count))
    return Frame(sub_attempt, entries, memoryview(data)[first + count * _ENTRY.size :])


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
