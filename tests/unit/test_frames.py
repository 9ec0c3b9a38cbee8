"""Transfer messages: every kind round-trips, and no bytes of a peer can do more than raise."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import KVTransferError
from core.types import Logprob
from kv_transfer import frames

MESSAGES = [
    frames.Open(b"t" * 16, "decode-1", 2**62, "abcd", 2, 16), frames.Starting(1, 150, 2, 16), frames.Reserved(0, 48),
    frames.Refused("no room"), frames.Resend(1, ((0, 0, 1), (3, 1, 2))),
    frames.Commit(2, 40, 0xFFFFFFFF, {0: Logprob(5, -0.5, ((5, -0.5), (7, -1.0))), 1: Logprob(9, 0.0)}, frozenset({1})),
    frames.Restart(4), frames.Failed("LeaseExpired", "gave up"), frames.Ack(), frames.Finished(), frames.NotFound(), frames.Beat(),
]  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_round_trips(message):
    assert frames.decode(frames.encode(7, message)) == (7, message)


def test_a_frame_round_trips_and_is_one_copy():
    entries = [frames.Entry(1, 0, 7, 16, 123), frames.Entry(2, 0, 7, 9, 456)]
    data = frames.encode_frame(9, 3, entries, [memoryview(b"a" * 32), memoryview(b"b" * 32)])
    number, frame = frames.decode(data)
    assert number == 9
    assert frame.sub_attempt == 3 and list(frame.entries) == entries and bytes(frame.payload) == b"a" * 32 + b"b" * 32


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_raises_our_error_or_is_a_message(data):
    try:
        frames.decode(data)
    except KVTransferError:
        pass


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_truncation_never_escapes(message):
    data = frames.encode(0, message)
    for end in range(len(data)):
        try:
            frames.decode(data[:end])
        except KVTransferError:
            pass


@settings(max_examples=300, deadline=None)
@given(
    st.binary(min_size=16, max_size=16), st.integers(0, 9), st.tuples(*[st.integers(0, 9)] * 4), st.binary(min_size=1, max_size=64),
    st.data(),
)  # fmt: skip
def test_the_checksum_sees_any_flipped_bit_and_any_swapped_identity(transfer_id, sub, identity, payload, data):
    crc = frames.bound_crc(transfer_id, sub, identity, memoryview(payload))
    bit = data.draw(st.integers(0, len(payload) * 8 - 1))
    flipped = bytearray(payload)
    flipped[bit // 8] ^= 1 << (bit % 8)
    assert frames.bound_crc(transfer_id, sub, identity, memoryview(flipped)) != crc
    position = data.draw(st.integers(0, 3))
    moved = tuple(n + (i == position) for i, n in enumerate(identity))
    assert frames.bound_crc(transfer_id, sub, moved, memoryview(payload)) != crc
    assert frames.bound_crc(transfer_id, sub + 1, identity, memoryview(payload)) != crc


def test_the_combined_checksum_depends_on_every_part_not_on_their_order():
    parts = {
        (layer, shard, block): layer * 100 + block for layer in range(3) for shard in range(2) for block in range(4)
    }
    assert frames.combined_checksum(parts) == frames.combined_checksum(dict(reversed(parts.items())))
    for part in parts:
        assert frames.combined_checksum({**parts, part: 99999}) != frames.combined_checksum(parts)


def test_any_flipped_bits_of_a_message_are_refused_before_they_mean_anything():
    """Every bit of every message, and 100,000 draws of 1 to 64 bits in frames: the payload by its entries' checksums."""
    for message in MESSAGES:
        data = frames.encode(3, message)
        for bit in range(len(data) * 8):
            with pytest.raises(KVTransferError):
                frames.decode(_flip(data, [bit]))
    rng, transfer_id = random.Random(1), b"t" * 16
    payloads = [rng.randbytes(256) for _ in range(2)]
    identities = [(0, 0, 3, 16), (1, 0, 3, 9)]
    crcs = [frames.bound_crc(transfer_id, 1, i, memoryview(p)) for i, p in zip(identities, payloads, strict=True)]
    entries = [frames.Entry(*i, crc) for i, crc in zip(identities, crcs, strict=True)]
    data = frames.encode_frame(4, 1, entries, [memoryview(p) for p in payloads])
    refused = 0
    for _ in range(100_000):
        try:
            _, frame = frames.decode(_flip(data, rng.sample(range(len(data) * 8), rng.randint(1, 64))))
        except KVTransferError:
            refused += 1
            continue
        parts = [frame.payload[i * 256 : (i + 1) * 256] for i in range(2)]
        assert list(frame.entries) == entries
        refused += any(
            frames.bound_crc(transfer_id, 1, i, p) != crc for i, p, crc in zip(identities, parts, crcs, strict=True)
        )
    assert refused == 100_000


def _flip(data, bits):
    out = bytearray(data)
    for bit in bits:
        out[bit // 8] ^= 1 << (bit % 8)
    return bytes(out)
