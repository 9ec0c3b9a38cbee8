"""Transfer messages: every kind round-trips, and no bytes of a peer can do more than raise."""

import mmap
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.process_cluster import is_long

from core.errors import KVTransferError
from core.types import Logprob
from kv_transfer import codec, frames
from kv_transfer.copying import move

MESSAGES = [
    frames.Open(b"t" * 16, "decode-1", 2**62, "abcd", 2, 16),
    frames.Starting(1, 150, 2, 16),
    frames.Reserved(0, 48),
    frames.Refused("no room"),
    frames.Resend(1, ((0, 0, 1), (3, 1, 2))),
    frames.Commit(
        2,
        40,
        0xFFFFFFFF,
        {0: Logprob(5, -0.5, ((5, -0.5), (7, -1.0))), 1: Logprob(9, 0.0)},
        frozenset({1}),
    ),
    frames.Restart(4),
    frames.Failed("LeaseExpired", "gave up"),
    frames.Ack(),
    frames.Finished(),
    frames.NotFound(),
    frames.Heartbeat(),
    frames.Probe(1 << 40),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_round_trips(message):
    assert codec.decode(codec.encode(7, message)) == (7, message)


def entries_of(*rows):
    """(layer, shard, block, valid tokens, checksum) each."""
    entries = np.zeros(len(rows), frames.ENTRY)
    for name, values in zip(
        ("layer", "shard", "block", "num_valid_tokens", "checksum"),
        zip(*rows, strict=True),
        strict=True,
    ):
        entries[name] = values
    return entries


def tallies_of(payloads):
    words = np.frombuffer(b"".join(payloads), np.uint8)
    size = len(payloads[0])
    at = np.arange(len(payloads)) * size
    return move(words, at, (size, size), None, at, (size, size), (1, 1), size)


def checksum(transfer_id, sub_attempt, identity, payload):
    entries = entries_of((*identity, 0))
    return int(
        frames.keyed_checksums(transfer_id, sub_attempt, entries, tallies_of([bytes(payload)]))[0]
    )


def test_a_frame_round_trips_and_its_payload_is_aligned_to_words():
    entries = entries_of((1, 0, 7, 16, 123), (2, 0, 7, 9, 2**64 - 1))
    data = codec.encode_frame(9, 3, entries, memoryview(b"a" * 32 + b"b" * 32))
    number, frame = codec.decode(data)
    assert number == 9 and (len(data) - 64) % 8 == 0
    assert frame.sub_attempt == 3 and (frame.entries == entries).all()
    assert bytes(frame.payload) == b"a" * 32 + b"b" * 32


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_raises_our_error_or_is_a_message(data):
    try:
        codec.decode(data)
    except KVTransferError:
        pass


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_truncation_never_escapes(message):
    data = codec.encode(0, message)
    for end in range(len(data)):
        try:
            codec.decode(data[:end])
        except KVTransferError:
            pass


@settings(max_examples=300, deadline=None)
@given(
    st.binary(min_size=16, max_size=16),
    st.integers(0, 9),
    st.tuples(*[st.integers(0, 9)] * 4),
    st.binary(min_size=1, max_size=64),
    st.data(),
)
def test_the_checksum_sees_any_flipped_bit_and_any_swapped_identity(
    transfer_id, sub, identity, payload, data
):
    right = checksum(transfer_id, sub, identity, payload)
    bit = data.draw(st.integers(0, len(payload) * 8 - 1))
    flipped = bytearray(payload)
    flipped[bit // 8] ^= 1 << (bit % 8)
    assert checksum(transfer_id, sub, identity, flipped) != right
    position = data.draw(st.integers(0, 3))
    moved = tuple(n + (i == position) for i, n in enumerate(identity))
    assert checksum(transfer_id, sub, moved, payload) != right
    assert checksum(transfer_id, sub + 1, identity, payload) != right


def test_the_combined_checksum_depends_on_every_part():
    parts = np.arange(1, 25, dtype=np.uint64).reshape(3, 2, 4)
    right = frames.combined_checksum(parts)
    for index in np.ndindex(parts.shape):
        changed = parts.copy()
        changed[index] = 99999
        assert frames.combined_checksum(changed) != right


@pytest.mark.parametrize("unit", [np.uint64, np.uint8])
def test_tallies_see_changes_that_hide_in_a_plain_sum(unit):
    """Two changes that cancel, two words that trade places, a part moved by a word;
    copies on the way are exact."""
    rng = np.random.default_rng(2)
    words = rng.integers(1, 2**8, 64).astype(unit)
    at, steps = np.zeros(1, np.int64), (64, 64)
    target = np.zeros(64, unit)
    right = move(words, at, steps, target, at, steps, (1, 1), 64)
    assert (target == words).all()
    for i in range(63):
        cancelled, swapped = words.copy(), words.copy()
        cancelled[i] += 1
        cancelled[i + 1] -= 1
        swapped[[i, i + 1]] = swapped[[i + 1, i]]
        assert move(cancelled, at, steps, None, at, steps, (1, 1), 64) != right
        assert (move(swapped, at, steps, None, at, steps, (1, 1), 64) == right) == (
            words[i] == words[i + 1]
        )
    assert move(np.roll(words, 1), at, steps, None, at, steps, (1, 1), 64) != right


def test_any_flipped_bits_of_a_message_are_refused_before_they_mean_anything():
    """Every bit of every message, and many draws of 1 to 64 bits in frames:
    the payload by its entries' checksums."""
    num_draws = 100_000 if is_long() else 20_000
    for message in MESSAGES:
        data = codec.encode(3, message)
        for bit in range(len(data) * 8):
            with pytest.raises(KVTransferError):
                codec.decode(_flip(data, [bit]))
    rng, transfer_id = random.Random(1), b"t" * 16
    payloads = [rng.randbytes(256) for _ in range(2)]
    entries = entries_of((0, 0, 3, 16, 0), (1, 0, 3, 9, 0))
    entries["checksum"] = frames.keyed_checksums(transfer_id, 1, entries, tallies_of(payloads))
    data = codec.encode_frame(4, 1, entries, memoryview(b"".join(payloads)))
    refused = 0
    for _ in range(num_draws):
        try:
            _, frame = codec.decode(
                _flip(data, rng.sample(range(len(data) * 8), rng.randint(1, 64)))
            )
        except KVTransferError:
            refused += 1
            continue
        assert (frame.entries == entries).all()
        parts = [bytes(frame.payload[i * 256 : (i + 1) * 256]) for i in range(2)]
        found = frames.keyed_checksums(transfer_id, 1, frame.entries, tallies_of(parts))
        refused += bool((found != entries["checksum"]).any())
    assert refused == num_draws


def _flip(data, bits):
    out = bytearray(data)
    for bit in bits:
        out[bit // 8] ^= 1 << (bit % 8)
    return bytes(out)


@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("size", [8, 24, 7])
def test_copies_past_the_cache_and_others_leave_the_same(offset, size):
    """Aligned targets take another way through the kernel than others;
    neither writes a word too many."""
    rng = np.random.default_rng(4)
    source = rng.integers(0, 2**63, 1024, dtype=np.uint64)
    memory = mmap.mmap(-1, 8192)
    target = np.frombuffer(memory, np.uint64)
    source_at = rng.permutation(16) * 48
    target_at = np.arange(16) * 48 + offset
    tallies = move(source, source_at, (size, size), target, target_at, (size, size), (1, 1), size)
    expected = np.zeros(1024, np.uint64)
    for start, to in zip(source_at, target_at, strict=True):
        expected[to : to + size] = source[start : start + size]
    assert (target == expected).all()
    assert (
        tallies
        == move(source, source_at, (size, size), None, target_at, (size, size), (1, 1), size)
    ).all()
