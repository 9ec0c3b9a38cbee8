"""What storage tiers need of a store: host memory, a disk and the simulation's keep the same."""

import pytest

from core.block_hash import block_hashes, pack_tokens, root_hash
from core.kv_layout import KVLayout
from core.ports import BlockCopy, BlockStore
from core.stored_block import StorageFault, StoredBlock, chain_digests, root_chain
from kv_storage.disk import DiskStore
from kv_storage.host import HostStore
from simulation.block_store import MemoryBlockStore
from simulation.hash_runner import MemoryKV

NUM_BLOCKS = 40
SIZE = 4
LAYOUTS = {
    "one shard": KVLayout("m", "uint8", 2, 1, 8, SIZE),
    "two shards": KVLayout("m", "bfloat16", 3, 2, 16, SIZE, num_shards=2),
    "copies of a head": KVLayout("m", "bfloat16", 3, 1, 16, SIZE, num_shards=2),
    "odd sizes": KVLayout("m", "uint8", 3, 1, 7, 3),
}


def blocks_of(tokens, size=SIZE, scope=""):
    """Every full block of some tokens."""
    parents = [root_chain("m", scope)]
    parents += chain_digests(parents[0], tokens, size)
    names = block_hashes(root_hash("m", scope), tokens, size)
    return [
        StoredBlock(parents[i], pack_tokens(tokens[i * size : (i + 1) * size]), name, i)
        for i, name in enumerate(names)
    ]


def still(copy):
    """Nobody else is given a block."""
    return True


def fill(kv, layout, block_id, seed):
    """Give each place of a block bytes of its own; copies of a head are equal."""
    for layer in range(layout.num_layers):
        for shard in range(layout.num_shards):
            head = shard // layout.num_copies
            view = kv.view(layer, block_id, shard)
            view[:] = bytes(
                (seed * 7 + layer * 31 + head * 101 + i) % 251 for i in range(len(view))
            )


def content(kv, layout, block_id):
    return [
        bytes(kv.view(layer, block_id, shard))
        for layer in range(layout.num_layers)
        for shard in range(layout.num_shards)
    ]


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(params=["memory", "host", "disk"])
async def store(request, layout, tmp_path):
    made: BlockStore = {
        "memory": lambda: MemoryBlockStore(layout),
        "host": lambda: HostStore(layout, 50),
        "disk": lambda: DiskStore(layout, 50, tmp_path, b"key", lambda: 0.0),
    }[request.param]()
    assert list(await made.find()) == []
    yield made
    await made.close()


@pytest.fixture
def kv(layout):
    return MemoryKV(layout, NUM_BLOCKS)


async def test_blocks_come_back_as_they_were_to_any_place(store, layout, kv):
    blocks = blocks_of(list(range(20 * layout.block_size_tokens)), layout.block_size_tokens)
    for block_id in range(20):
        fill(kv, layout, block_id, block_id)
    before = [content(kv, layout, block_id) for block_id in range(20)]
    out = [BlockCopy(block, i, 49 - 2 * i) for i, block in enumerate(blocks)]
    assert list(await store.write(out, kv, still)) == [None] * 20
    # Others write to the pool's blocks from now on.
    for block_id in range(NUM_BLOCKS):
        fill(kv, layout, block_id, 200)
    back = [BlockCopy(block, 20 + i, 49 - 2 * i) for i, block in enumerate(blocks)]
    assert list(await store.read(back, kv)) == [None] * 20
    assert [content(kv, layout, 20 + i) for i in range(20)] == before


async def test_a_slot_that_was_written_again_holds_the_last_block_alone(store, layout, kv):
    size = layout.block_size_tokens
    old, new = blocks_of([1] * size, size)[0], blocks_of([2] * size, size)[0]
    for block, seed in ((old, 1), (new, 2)):
        fill(kv, layout, 0, seed)
        assert list(await store.write([BlockCopy(block, 0, 5)], kv, still)) == [None]
    expected = content(kv, layout, 0)
    assert list(await store.read([BlockCopy(old, 1, 5)], kv)) == [StorageFault.FOREIGN]
    assert list(await store.read([BlockCopy(new, 1, 5)], kv)) == [None]
    assert content(kv, layout, 1) == expected


async def test_equal_tokens_after_another_beginning_are_another_block(store, layout, kv):
    size = layout.block_size_tokens
    mine = blocks_of([1] * size + [9] * size, size)[1]
    other = blocks_of([2] * size + [9] * size, size)[1]
    foreign = blocks_of([1] * size + [9] * size, size, scope="tenant")[1]
    fill(kv, layout, 0, 1)
    await store.write([BlockCopy(mine, 0, 0)], kv, still)
    for block in (other, foreign):
        assert list(await store.read([BlockCopy(block, 1, 0)], kv)) == [StorageFault.FOREIGN]


async def test_reading_ends_at_the_first_block_that_is_not_there(store, layout, kv):
    size = layout.block_size_tokens
    blocks = blocks_of(list(range(6 * size)), size)
    fill(kv, layout, 0, 1)
    await store.write([BlockCopy(blocks[i], 0, i) for i in (0, 1, 3, 4)], kv, still)
    copies = [BlockCopy(block, 10 + i, i) for i, block in enumerate(blocks)]
    results = list(await store.read(copies, kv))
    assert results[:2] == [None, None] and results[2] is not None and len(results) == 3


async def test_a_block_that_was_given_away_meanwhile_is_in_no_slot(store, layout, kv):
    size = layout.block_size_tokens
    old, new = blocks_of([1] * size, size)[0], blocks_of([2] * size, size)[0]
    await store.write([BlockCopy(old, 0, 5)], kv, still)
    asked = []

    def given_away(copy):
        asked.append(copy.block_id)
        return copy.slot != 5

    copies = [BlockCopy(new, 3, 5), BlockCopy(old, 4, 6)]
    results = list(await store.write(copies, kv, given_away))
    assert results == [StorageFault.REPLACED, None] and asked == [3, 4]
    assert list(await store.read([BlockCopy(new, 1, 5)], kv)) != [None]
    assert list(await store.read([BlockCopy(old, 1, 6)], kv)) == [None]
