"""The messages of a Fetch stream as bytes of a fixed layout.

Owns encoding and decoding: kind, number in the stream, CRC-32 of all but a payload, then a
little-endian struct. Does not know streams, or the states in which a message may come.

A peer's numbers are never trusted: lengths and ranges are checked before anything is copied. The
CRC does not cover a payload, whose fragments have checksums of their own: one damaged fragment is
then asked for again, where a damaged message would cost the stream.
"""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum

import numpy as np

from core.errors import KVTransferError
from core.ids import TRANSFER_ID_BYTES, Incarnation, TransferId, WorkerId
from core.types import Logprob
from kv_transfer.copying import Array
from kv_transfer.frames import (
    ENTRY,
    FRAME_HEAD_BYTES,
    MAX_CONTROL_BYTES,
    MAX_MESSAGE_BYTES,
    Ack,
    Commit,
    Failed,
    Finished,
    Frame,
    Heartbeat,
    Message,
    NotFound,
    Open,
    Probe,
    Refused,
    Resend,
    Reserved,
    Restart,
    Starting,
)


class FetchMessageKind(IntEnum):
    """First byte of a message. Numbers are part of the wire format: they are never used again."""

    OPEN = 1
    STARTING = 2
    RESERVED = 3
    REFUSED = 4
    FRAME = 5
    RESEND = 6
    COMMIT = 7
    ACK = 8
    RESTART = 9
    FINISHED = 10
    FAILED = 11
    NOT_FOUND = 12
    HEARTBEAT = 13
    FRAME_IN_POOL = 14
    PROBE = 15


_HEAD = struct.Struct("<BII")  # kind, number, CRC-32
_NUMBER = struct.Struct("<BI")
_FRAME = struct.Struct("<HI1x")  # sub-attempt, entries; the pad byte aligns the entries
_OPEN = struct.Struct(f"<B{TRANSFER_ID_BYTES}sqHHHH")  # ..., shards, block size, lengths of texts
_STARTING = struct.Struct("<BHIHH")  # ..., tokens, shards, block size
_RESERVED = struct.Struct("<BHI")
_COMMIT = struct.Struct("<BHIIH")
_TOKEN = struct.Struct("<HBidH")  # choice, is final, token, logprob, top entries
_TOP = struct.Struct("<id")
_SUB = struct.Struct("<BH")
_PROBE = struct.Struct("<BQ")
_PLACE_BYTES = 12  # layer, shard, block: three uint32
_EMPTY: dict[int, type[Ack] | type[Finished] | type[NotFound] | type[Heartbeat]] = {
    FetchMessageKind.ACK: Ack,
    FetchMessageKind.FINISHED: Finished,
    FetchMessageKind.NOT_FOUND: NotFound,
    FetchMessageKind.HEARTBEAT: Heartbeat,
}
_KIND_OF_EMPTY = {cls: kind for kind, cls in _EMPTY.items()}


def encode_frame(
    number: int, sub_attempt: int, entries: Array, payload: memoryview | None
) -> bytes:
    """Encode a frame.

    Its CRC-32 covers the entries alone; they hold the checksums of the payload.

    Raises:
        KVTransferError: No transport carries a message as long.
    """
    kind = FetchMessageKind.FRAME if payload is not None else FetchMessageKind.FRAME_IN_POOL
    num_bytes = FRAME_HEAD_BYTES + entries.nbytes + len(payload or b"")
    if num_bytes > MAX_MESSAGE_BYTES:
        raise KVTransferError(
            f"a frame of {len(entries)} fragments has {num_bytes} bytes, a message has at most "
            f"{MAX_MESSAGE_BYTES}; lower transfer.frame_bytes or engine.block_size_tokens"
        )
    body = _FRAME.pack(sub_attempt, len(entries)) + entries.tobytes()
    return b"".join((_HEAD.pack(kind, number, _head_crc(kind, number, body)), body, payload or b""))


def encode(number: int, message: Message) -> bytes:
    """Encode a message; `number` is its place in its stream.

    Raises:
        KVTransferError: It is longer than a peer would take.
    """
    if isinstance(message, Frame):
        return encode_frame(number, message.sub_attempt, message.entries, message.payload)
    plain = _encode(message)
    _check_control(plain)
    kind, body = plain[0], plain[1:]
    return _HEAD.pack(kind, number, _head_crc(kind, number, body)) + body


def _head_crc(kind: int, number: int, body: bytes | bytearray | memoryview) -> int:
    # With kind and number: a damaged number would pass for a repeat, and be dropped in silence.
    return zlib.crc32(body, zlib.crc32(_NUMBER.pack(kind, number)))


def _encode(message: Message) -> bytes:
    match message:
        case Open(transfer_id, receiver_id, incarnation, identity, shards, block_size):
            name = receiver_id.encode()
            text = identity.encode()
            lengths = len(name), len(text)
            head = _OPEN.pack(
                FetchMessageKind.OPEN, transfer_id, incarnation, shards, block_size, *lengths
            )
            return head + name + text
        case Starting(sub_attempt, num_tokens, num_shards, block_size):
            return _STARTING.pack(
                FetchMessageKind.STARTING, sub_attempt, num_tokens, num_shards, block_size
            )
        case Reserved(sub_attempt, have_tokens):
            return _RESERVED.pack(FetchMessageKind.RESERVED, sub_attempt, have_tokens)
        case Probe(num_bytes):
            return _PROBE.pack(FetchMessageKind.PROBE, num_bytes)
        case Refused(text):
            return bytes((FetchMessageKind.REFUSED,)) + text.encode()
        case Resend(sub_attempt, fragments):
            flat = [n for place in fragments for n in place]
            return _SUB.pack(FetchMessageKind.RESEND, sub_attempt) + struct.pack(
                f"<{len(flat)}I", *flat
            )
        case Commit():
            return _encode_commit(message)
        case Restart(sub_attempt):
            return _SUB.pack(FetchMessageKind.RESTART, sub_attempt)
        case Failed(name, text):
            # A NUL is in no name of an error, so the text may hold anything.
            return bytes((FetchMessageKind.FAILED,)) + f"{name}\0{text}".encode()
        case Ack() | Finished() | NotFound() | Heartbeat():
            return bytes((_KIND_OF_EMPTY[type(message)],))
        case Frame():
            raise KVTransferError("frames are encoded by encode_frame")


def _encode_commit(commit: Commit) -> bytes:
    tokens = commit.first_tokens
    counts = commit.num_entries, commit.checksum, len(tokens)
    out = bytearray(_COMMIT.pack(FetchMessageKind.COMMIT, commit.sub_attempt, *counts))
    for choice, token in tokens.items():
        is_final = choice in commit.final_choices
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
        is_frame = kind in (FetchMessageKind.FRAME, FetchMessageKind.FRAME_IN_POOL)
        end = _end_of_entries(data) if is_frame else len(data)
        if _head_crc(kind, number, memoryview(data)[_HEAD.size : end]) != crc:
            raise KVTransferError(
                f"a transfer message of {len(data)} bytes does not match its checksum"
            )
        message = _decode_frame(data, kind) if is_frame else _decode(kind, data)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise KVTransferError(
            f"a transfer message of {len(data)} bytes is malformed: {error}"
        ) from error
    return number, message


def _end_of_entries(data: bytes) -> int:
    _, count = _FRAME.unpack_from(data, _HEAD.size)
    return FRAME_HEAD_BYTES + int(count) * ENTRY.itemsize


def _check_control(plain: bytes) -> None:
    if len(plain) > MAX_CONTROL_BYTES:
        raise KVTransferError(
            f"a transfer control message has {len(plain)} bytes, the limit is {MAX_CONTROL_BYTES}"
        )


def _decode(kind: int, message: bytes) -> Message:
    data = bytes((kind,)) + message[_HEAD.size :]  # as `_encode` made it
    _check_control(data)
    if kind in _EMPTY:
        return _EMPTY[kind]()
    match kind:
        case FetchMessageKind.OPEN:
            return _decode_open(data)
        case FetchMessageKind.STARTING:
            return Starting(*_STARTING.unpack(data)[1:])
        case FetchMessageKind.RESERVED:
            return Reserved(*_RESERVED.unpack(data)[1:])
        case FetchMessageKind.PROBE:
            return Probe(*_PROBE.unpack(data)[1:])
        case FetchMessageKind.REFUSED:
            return Refused(data[1:].decode())
        case FetchMessageKind.RESEND:
            count = (len(data) - _SUB.size) // _PLACE_BYTES
            flat = struct.unpack_from(f"<{count * 3}I", data, _SUB.size)
            places = tuple((flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3))
            return Resend(_SUB.unpack_from(data)[1], places)
        case FetchMessageKind.COMMIT:
            return _decode_commit(data)
        case FetchMessageKind.RESTART:
            return Restart(_SUB.unpack(data)[1])
        case FetchMessageKind.FAILED:
            name, _, text = data[1:].decode().partition("\0")
            return Failed(name, text)
        case _:
            raise KVTransferError(f"a transfer message has the unknown kind {kind}")


def _decode_open(data: bytes) -> Open:
    _, transfer_id, incarnation, shards, block_size, *lengths = _OPEN.unpack_from(data)
    rest = data[_OPEN.size :]
    if len(rest) != sum(lengths):
        raise KVTransferError("an Open message has the wrong length")
    return Open(
        TransferId(transfer_id),
        WorkerId(rest[: lengths[0]].decode()),
        Incarnation(incarnation),
        rest[lengths[0] :].decode(),
        shards,
        block_size,
    )


def _decode_frame(data: bytes, kind: int) -> Frame:
    sub_attempt, count = _FRAME.unpack_from(data, _HEAD.size)
    end = _end_of_entries(data)
    if end > len(data):
        raise KVTransferError(f"a frame of {len(data)} bytes cannot hold {count} entries")
    payload = memoryview(data)[end:] if kind == FetchMessageKind.FRAME else None
    # Entries and payload are views: a megabyte of KV is copied once, into the reserved blocks.
    return Frame(sub_attempt, np.frombuffer(data, ENTRY, count, FRAME_HEAD_BYTES), payload)


def _decode_commit(data: bytes) -> Commit:
    _, sub_attempt, num_entries, checksum, count = _COMMIT.unpack_from(data)
    at = _COMMIT.size
    tokens = {}
    final = set()
    for _ in range(count):
        choice, is_final, token_id, logprob, num_top = _TOKEN.unpack_from(data, at)
        at += _TOKEN.size
        top = tuple(_TOP.unpack_from(data, at + i * _TOP.size) for i in range(num_top))
        at += num_top * _TOP.size
        tokens[choice] = Logprob(token_id, logprob, top)
        if is_final:
            final.add(choice)
    return Commit(sub_attempt, num_entries, checksum, tokens, frozenset(final))
