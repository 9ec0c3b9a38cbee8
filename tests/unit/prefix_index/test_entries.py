"""What of the bytes in a store counts: formats, limits, and whose they are."""

import pytest

from core.block_hash import DIGEST_BYTES, BlockHash
from core.ids import Incarnation, WorkerId
from core.prefix_changes import PrefixChange, StorageTier
from prefix_index import entries
from prefix_index.entries import BadEntry, Batch, EntryCodec, Head, entry_key

CODEC = EntryCodec(entry_key("a secret of sufficient length"))
LIFE = (WorkerId("prefill-a"), Incarnation(3))
DISK = StorageTier.DISK


def names(count):
    return [BlockHash(number.to_bytes(DIGEST_BYTES)) for number in range(count)]


def batch(num_stored, num_evicted=0):
    both = names(num_stored + num_evicted)
    return Batch(7, PrefixChange(both[:num_stored], both[num_stored:], DISK))


def refusal(read, *args):
    with pytest.raises(BadEntry) as caught:
        read(*args)
    return caught.value.reason


def test_what_was_written_is_read():
    for one in (batch(3, 2), batch(0, 1), batch(0)):
        assert CODEC.read_batch(LIFE, CODEC.batch(LIFE, one)) == one
    entry = CODEC.segment(LIFE, 7, 2, DISK, names(3))
    assert CODEC.read_segment(LIFE, 7, 2, entry) == PrefixChange(names(3), (), DISK)
    for head in (Head(7, 2, "12-0"), Head(0, 0, "")):
        assert CODEC.read_head(LIFE, CODEC.head(LIFE, head)) == head


@pytest.mark.parametrize("too_many", [0, 1])
def test_entries_are_read_up_to_their_limits(too_many):
    num_batch = entries.MAX_BATCH_BLOCKS + too_many
    num_segment = entries.SEGMENT_BLOCKS + too_many
    reads = [
        (CODEC.read_batch, LIFE, CODEC.batch(LIFE, batch(num_batch - 1, 1))),
        (CODEC.read_segment, LIFE, 7, 2, CODEC.segment(LIFE, 7, 2, DISK, names(num_segment))),
        (CODEC.read_head, LIFE, CODEC.head(LIFE, Head(7, entries.MAX_SEGMENTS + too_many, ""))),
        (
            CODEC.read_head,
            LIFE,
            CODEC.head(LIFE, Head(7, 0, "1" * (entries.MAX_POSITION_BYTES + too_many))),
        ),
    ]
    for read, *args in reads:
        if too_many:
            assert refusal(read, *args) == "malformed"
        else:
            read(*args)


def test_a_segment_counts_in_its_own_place_alone():
    entry = CODEC.segment(LIFE, 7, 2, DISK, names(1))
    for number, index in ((8, 2), (7, 1), (2, 7)):
        assert refusal(CODEC.read_segment, LIFE, number, index, entry) == "malformed"


def test_what_was_written_as_something_else_or_by_another_is_forged():
    other_lives = [(WorkerId("prefill-b"), LIFE[1]), (LIFE[0], Incarnation(4))]
    written = [
        (CODEC.read_batch, (), CODEC.batch(LIFE, batch(4))),
        (CODEC.read_segment, (7, 2), CODEC.segment(LIFE, 7, 2, DISK, names(4))),
        (CODEC.read_head, (), CODEC.head(LIFE, Head(7, 2, "1" * 40))),
    ]
    for read, place, entry in written:
        for life in other_lives:
            assert refusal(read, life, *place, entry) == "forged"
        for of_another_kind in (one for _, _, one in written if one is not entry):
            assert refusal(read, LIFE, *place, of_another_kind) == "forged"
        assert refusal(read, LIFE, *place, entry[:-1]) == "forged"
        assert refusal(read, LIFE, *place, entry[:20]) == "malformed"


def sealed(kind, body):
    """What a worker with a bug, or of another version, may publish under its own name."""
    return CODEC._sealed(kind, LIFE, body)


@pytest.mark.parametrize(
    ("numbers", "tail", "reason"),
    [
        ((entries.VERSION, DISK, 7, 1, 1), b"n" * DIGEST_BYTES * 2, None),
        ((entries.VERSION + 1, DISK, 7, 1, 1), b"n" * DIGEST_BYTES * 2, "version"),
        ((entries.VERSION, 99, 7, 1, 1), b"n" * DIGEST_BYTES * 2, "malformed"),
        ((entries.VERSION, DISK, 7, 1, 0), b"n" * DIGEST_BYTES * 2, "malformed"),
        ((entries.VERSION, DISK, 7, 2, 1), b"n" * DIGEST_BYTES * 2, "malformed"),
        ((entries.VERSION, DISK, 7, 1, 1), b"n" * (DIGEST_BYTES * 2 + 1), "malformed"),
    ],
    ids=["fine", "version", "tier", "too few", "too many", "half a name"],
)
def test_a_batch_whose_numbers_do_not_fit_is_refused(numbers, tail, reason):
    entry = sealed(b"b", entries._BATCH.pack(*numbers) + tail)
    if reason is None:
        assert CODEC.read_batch(LIFE, entry).number == 7
    else:
        assert refusal(CODEC.read_batch, LIFE, entry) == reason


def test_heads_and_segments_of_another_version_or_in_no_text_are_refused():
    newer = entries.VERSION + 1
    head = sealed(b"h", entries._HEAD.pack(newer, 7, 0))
    assert refusal(CODEC.read_head, LIFE, head) == "version"
    head = sealed(b"h", entries._HEAD.pack(entries.VERSION, 7, 0) + b"\xff")
    assert refusal(CODEC.read_head, LIFE, head) == "malformed"
    segment = sealed(b"p", entries._SEGMENT.pack(newer, DISK, 7, 2))
    assert refusal(CODEC.read_segment, LIFE, 7, 2, segment) == "version"
