"""Files of blocks that were cut, flipped, exchanged or not ours; disks that are full or closed."""

import asyncio
import dataclasses
import errno
import os
import random
import threading

import pytest

from core.block_hash import pack_tokens
from core.kv_layout import KVLayout
from core.ports import BlockCopy
from core.stored_block import StorageFault, StoredBlock, root_chain
from kv_storage import disk as disk_module
from kv_storage.disk import UNUSED_S, DiskStore, disk_block_bytes
from kv_storage.segment_file import PAGE_BYTES
from simulation.hash_runner import MemoryKV

LAYOUT = KVLayout("m", "uint8", 2, 1, 64, 4)
KEY = b"cluster"
BLOCKS = [
    StoredBlock(root_chain("m", f"{i}"), pack_tokens([i] * 4), b"name of 16 bytes", 0)
    for i in range(12)
]
COPIES = [BlockCopy(block, i, i) for i, block in enumerate(BLOCKS)]


RECORD_BYTES = 86
"""Of a block of 4 tokens."""


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def kv():
    rng = random.Random(7)
    pool = MemoryKV(LAYOUT, len(BLOCKS))
    for block_id in range(len(BLOCKS)):
        for layer in range(LAYOUT.num_layers):
            pool.view(layer, block_id, 0)[:] = rng.randbytes(LAYOUT.layer_block_bytes)
    return pool


def disk(folder, *, num_slots=12, layout=LAYOUT, key=KEY, clock=None):
    return DiskStore(layout, num_slots, folder, key, clock or Clock())


def still(copy):
    """Nobody else is given a block."""
    return True


async def found_by(store):
    found = dict(await store.find())
    await store.close()
    return found


async def fill(folder, kv, copies=COPIES):
    """Write all blocks, and let the worker end."""
    store = disk(folder)
    assert list(await store.find()) == []
    assert list(await store.write(copies, kv, still)) == [None] * len(copies)
    await store.close()
    [path] = folder.rglob("*.kv")
    return path


async def test_what_was_written_is_found_and_read_by_the_next_worker(tmp_path, kv):
    await fill(tmp_path, kv)
    before = bytes(kv.segments()[0])
    kv.replace()
    store = disk(tmp_path)
    assert dict(await store.find()) == dict(enumerate(BLOCKS))
    assert list(await store.read(COPIES, kv)) == [None] * len(BLOCKS)
    assert bytes(kv.segments()[0]) == before
    await store.close()


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        (dataclasses.replace(LAYOUT, model_digest="other"), KEY),
        (dataclasses.replace(LAYOUT, tokenizer_digest="other"), KEY),
        (dataclasses.replace(LAYOUT, dtype="bfloat16", head_size=32), KEY),
        (dataclasses.replace(LAYOUT, block_size_tokens=8), KEY),
        (dataclasses.replace(LAYOUT, num_kv_heads=2, head_size=32, num_shards=2), KEY),
        (LAYOUT, b"another cluster"),
    ],
    ids=["model", "tokenizer", "dtype", "block size", "shards", "cluster key"],
)
async def test_another_model_layout_or_cluster_finds_nothing(tmp_path, kv, layout, key):
    await fill(tmp_path, kv)
    assert await found_by(disk(tmp_path, layout=layout, key=key)) == {}
    assert len(await found_by(disk(tmp_path))) == len(BLOCKS)


@pytest.mark.parametrize("version", ["NAMING_VERSION", "FORMAT"])
async def test_another_version_finds_nothing(tmp_path, kv, monkeypatch, version):
    await fill(tmp_path, kv)
    monkeypatch.setattr(disk_module, version, 99)
    assert await found_by(disk(tmp_path)) == {}


async def test_a_file_moved_here_from_another_cluster_is_foreign(tmp_path, kv):
    mine = await fill(tmp_path / "mine", kv)
    other = disk(tmp_path / "other", key=b"other")
    await other.find()
    await other.write(COPIES, kv, still)
    await other.close()
    [path] = (tmp_path / "other").rglob("*.kv")
    mine.write_bytes(path.read_bytes())
    store = disk(tmp_path / "mine")
    assert list(await store.find()) == []
    assert set(await store.write(COPIES, kv, still)) == {StorageFault.FOREIGN}
    await store.close()
    assert mine.read_bytes() == path.read_bytes(), "what is not ours stays as it is"


@pytest.mark.parametrize("content", [b"", bytes(3 * PAGE_BYTES)], ids=["empty", "no header"])
async def test_a_file_that_was_left_half_made_is_made_anew(tmp_path, kv, content):
    """Its header comes last: a worker that is killed before leaves a file that is nobody's."""
    path = await fill(tmp_path, kv)
    size = path.stat().st_size
    path.write_bytes(content)
    store = disk(tmp_path)
    assert list(await store.find()) == []
    assert list(await store.write(COPIES, kv, still)) == [None] * len(COPIES)
    assert path.stat().st_size == size, "its whole space is its own"
    await store.close()
    assert len(await found_by(disk(tmp_path))) == len(COPIES)


@pytest.mark.parametrize("left_share", [0.9, 0.7, 0.05, 0.0])
async def test_a_truncated_file_has_what_is_left_of_it(tmp_path, kv, left_share):
    path = await fill(tmp_path, kv)
    size = path.stat().st_size
    os.truncate(path, int(size * left_share))
    before = bytes(kv.segments()[0])
    store = disk(tmp_path)
    found = dict(await store.find())
    results = [list(await store.read([COPIES[slot]], kv)) for slot in found]
    assert [StorageFault.TRUNCATED] in results or not found
    good = [slot for slot, result in zip(found, results, strict=True) if result == [None]]
    assert len(good) < len(BLOCKS)
    for slot in good:
        for layer in range(LAYOUT.num_layers):
            start = LAYOUT.offset_bytes(layer, slot, len(BLOCKS))
            size = LAYOUT.layer_block_bytes
            assert bytes(kv.view(layer, slot, 0)) == before[start : start + size]
    await store.close()


async def test_a_file_truncated_under_a_running_worker_ends_nobody(tmp_path, kv):
    path = await fill(tmp_path, kv)
    store = disk(tmp_path)
    await store.find()
    os.truncate(path, PAGE_BYTES)
    assert list(await store.read(COPIES, kv)) == [StorageFault.TRUNCATED]
    path.unlink()
    assert list(await store.read(COPIES, kv)) == [StorageFault.TRUNCATED]
    await store.close()


async def test_each_flipped_byte_of_a_slot_is_noticed(tmp_path, kv):
    path = await fill(tmp_path, kv, COPIES[:1])
    content = path.read_bytes()
    before = bytes(kv.segments()[0])
    payload = bytes(kv.view(0, 0, 0))
    payload_at = content.index(payload)
    noticed = 0
    places = [
        *range(PAGE_BYTES, PAGE_BYTES + RECORD_BYTES),
        *range(payload_at, payload_at + 512, 7),
    ]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 0x10
        path.write_bytes(flipped)
        store = disk(tmp_path)
        await store.find()
        [fault] = await store.read([COPIES[0]], kv)
        await store.close()
        is_exact = fault is None and bytes(kv.segments()[0]) == before
        noticed += fault is StorageFault.DAMAGED
        assert fault is not None or is_exact
    assert noticed == len(places)


async def test_payloads_that_changed_places_are_noticed(tmp_path, kv):
    path = await fill(tmp_path, kv)
    content = bytearray(path.read_bytes())
    one, two = (content.index(bytes(kv.view(0, block_id, 0))) for block_id in (3, 4))
    size = LAYOUT.block_bytes
    content[one : one + size], content[two : two + size] = (
        content[two : two + size],
        content[one : one + size],
    )
    path.write_bytes(content)
    store = disk(tmp_path)
    await store.find()
    results = [(await store.read([copy], kv))[0] for copy in COPIES]
    assert results == [None] * 3 + [StorageFault.DAMAGED] * 2 + [None] * 7
    await store.close()


async def test_layers_of_a_block_that_changed_places_are_noticed(tmp_path, kv):
    path = await fill(tmp_path, kv)
    content = bytearray(path.read_bytes())
    at = content.index(bytes(kv.view(0, 3, 0)))
    size = LAYOUT.layer_block_bytes
    content[at : at + 2 * size] = content[at + size : at + 2 * size] + content[at : at + size]
    path.write_bytes(content)
    store = disk(tmp_path)
    await store.find()
    assert list(await store.read([COPIES[3]], kv)) == [StorageFault.DAMAGED]
    await store.close()


async def test_two_workers_have_a_folder_each_and_the_next_takes_over_the_first(tmp_path, kv):
    first, second = disk(tmp_path), disk(tmp_path)
    assert list(await first.find()) == list(await second.find()) == []
    await first.write(COPIES[:3], kv, still)
    await second.write(COPIES[3:5], kv, still)
    assert len(list(tmp_path.rglob("*.kv"))) == 2
    await first.close()
    assert len(await found_by(disk(tmp_path))) == 3
    await second.close()


async def test_a_full_disk_is_left_alone_for_a_while(tmp_path, kv, monkeypatch):
    clock = Clock()
    store = disk(tmp_path, clock=clock)
    await store.find()
    allocate = os.posix_fallocate
    calls = []

    def full(fd, offset, size):
        calls.append(size)
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert set(await store.write(COPIES, kv, still)) == {StorageFault.NO_SPACE}
    assert not list(tmp_path.rglob("*.kv")), "the space of a file that was begun is given back"
    assert set(await store.write(COPIES, kv, still)) == {StorageFault.NO_SPACE}
    assert len(calls) <= 8
    monkeypatch.setattr(os, "posix_fallocate", allocate)
    clock.now_s = disk_module.PAUSE_S + 1
    assert set(await store.write(COPIES, kv, still)) == {None}
    await store.close()


async def test_a_folder_that_cannot_be_made_costs_the_tier_alone(tmp_path, kv):
    (tmp_path / "file").write_text("in the way")
    store = disk(tmp_path / "file" / "folder")
    assert list(await store.find()) == []
    assert set(await store.write(COPIES, kv, still)) == {StorageFault.UNREACHABLE}
    assert list(await store.read(COPIES, kv)) == [StorageFault.FOREIGN]
    await store.close()


async def test_files_take_no_more_room_than_they_were_given(tmp_path, kv):
    for num_bytes in (100_000, 300_000):
        num_slots = num_bytes // disk_block_bytes(LAYOUT)
        store = disk(tmp_path / f"{num_bytes}", num_slots=num_slots)
        await store.find()
        copies = [BlockCopy(BLOCKS[i % 12], i % 12, i) for i in range(num_slots)]
        assert set(await store.write(copies, kv, still)) == {None}
        await store.close()
        taken = sum(path.stat().st_size for path in (tmp_path / f"{num_bytes}").rglob("*"))
        assert num_slots > 5 and taken - PAGE_BYTES * 3 <= num_bytes


async def test_segments_beyond_a_smaller_budget_are_removed(tmp_path, kv, monkeypatch):
    monkeypatch.setattr(disk_module, "SEGMENT_BYTES", 4 * LAYOUT.block_bytes)
    await fill_segments(tmp_path, kv)
    assert len(list(tmp_path.rglob("*.kv"))) == 3
    stranger = next(tmp_path.rglob("*.kv")).with_name("notes.kv")
    stranger.write_text("not ours")
    assert len(await found_by(disk(tmp_path, num_slots=5))) == 5
    assert len(list(tmp_path.rglob("0*.kv"))) == 2 and stranger.exists()


async def fill_segments(folder, kv):
    store = disk(folder)
    await store.find()
    assert set(await store.write(COPIES, kv, still)) == {None}
    await store.close()


async def test_files_can_be_read_by_their_owner_alone(tmp_path, kv):
    path = await fill(tmp_path, kv)
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0


async def test_a_block_that_was_given_away_meanwhile_is_not_found_by_the_next_worker(tmp_path, kv):
    """Its bytes may be another's, and its checksum would be right."""
    store = disk(tmp_path)
    await store.find()
    results = await store.write(COPIES, kv, lambda copy: copy.block_id != 4)
    assert list(results) == [None] * 4 + [StorageFault.REPLACED] + [None] * 7
    await store.close()
    assert sorted(await found_by(disk(tmp_path))) == [0, 1, 2, 3, *range(5, 12)]


OTHER = dataclasses.replace(LAYOUT, model_digest="other")


@pytest.mark.parametrize(
    ("age_s", "is_locked", "is_kept"),
    [(UNUSED_S + 60, False, False), (UNUSED_S - 60, False, True), (UNUSED_S + 60, True, True)],
)
async def test_what_nobody_has_used_for_a_week_is_removed(tmp_path, kv, age_s, is_locked, is_kept):
    """Blocks of a model that is gone; nobody would ever look for them again."""
    path = await fill(tmp_path, kv)
    stranger = path.with_name("notes.kv")
    stranger.write_text("not ours")
    running = disk(tmp_path)
    if is_locked:
        await running.find()
    for file in path.parent.iterdir():
        then_s = file.stat().st_mtime - age_s
        os.utime(file, (then_s, then_s))
    assert await found_by(disk(tmp_path, layout=OTHER)) == {}
    assert path.exists() is is_kept and stranger.exists()
    await running.close()
    assert (len(await found_by(disk(tmp_path))) == len(BLOCKS)) is is_kept


async def test_a_worker_that_ran_for_long_leaves_its_blocks_to_the_next(tmp_path, kv):
    """Its files are as old as their last block, and were in use until now."""
    path = await fill(tmp_path, kv)
    running = disk(tmp_path)
    await running.find()
    for file in path.parent.iterdir():
        then_s = file.stat().st_mtime - UNUSED_S - 60
        os.utime(file, (then_s, then_s))
    await running.close()
    assert await found_by(disk(tmp_path, layout=OTHER)) == {}
    assert len(await found_by(disk(tmp_path))) == len(BLOCKS)


async def test_a_disk_that_hangs_keeps_no_worker_from_ending(tmp_path, kv, monkeypatch):
    """The write goes on: its file and its lock stay as they are until the process ends."""
    monkeypatch.setattr(disk_module, "CLOSE_TIMEOUT_S", 0.05)
    store = disk(tmp_path)
    await store.find()
    hangs, goes_on = threading.Event(), threading.Event()

    def still_after_a_while(copy):
        hangs.set()
        return goes_on.wait(60)

    writing = asyncio.create_task(store.write(COPIES[:1], kv, still_after_a_while))
    try:
        assert await asyncio.to_thread(hangs.wait, 60)
        async with asyncio.timeout(30):
            await store.close()
        assert not writing.done() and await found_by(disk(tmp_path)) == {}
    finally:
        goes_on.set()
    assert list(await writing) == [None]
    os.close(store._lock_fd)  # as the process's end does
    assert await found_by(disk(tmp_path)) == {0: BLOCKS[0]}
