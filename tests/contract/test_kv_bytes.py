"""The `KVBytes` port: views are windows into the pool's own memory, each block in its place."""

import contextlib

import pytest
from support.in_process_cluster import shared_pool

from core.kv_layout import KVLayout
from simulation.hash_runner import MemoryKV

LAYOUT = KVLayout("m", "float32", 2, 2, 4, 4)
NUM_BLOCKS = 8


@contextlib.contextmanager
def made(kind):
    """A pool that its test lets go of: a fixture would hold it longer than the test."""
    if kind == "a bytearray":
        yield MemoryKV(LAYOUT, NUM_BLOCKS)
        return
    pool = shared_pool(LAYOUT, NUM_BLOCKS)
    yield pool
    pool.close()


every_kind = pytest.mark.parametrize("kind", ["shared memory", "a bytearray"])


@every_kind
def test_a_segment_is_a_whole_shard_and_starts_zeroed(kind):
    with made(kind) as kv:
        segments = kv.segments()
        assert [len(s) for s in segments] == [LAYOUT.pool_bytes(NUM_BLOCKS)] * LAYOUT.num_shards
        assert not any(bytes(segment).strip(b"\0") for segment in segments)
        assert kv.generation >= 1


@every_kind
def test_each_layer_of_each_block_lies_where_the_layout_says_and_nowhere_else(kind):
    with made(kind) as kv:
        for shard in range(LAYOUT.num_shards):
            for layer in range(LAYOUT.num_layers):
                for block_id in range(NUM_BLOCKS):
                    view = kv.view(layer, block_id, shard)
                    assert view.nbytes == LAYOUT.layer_block_bytes and not view.readonly
                    view[:] = bytes([1 + shard * 64 + layer * NUM_BLOCKS + block_id]) * view.nbytes
        for shard, segment in enumerate(kv.segments()):
            for layer in range(LAYOUT.num_layers):
                for block_id in range(NUM_BLOCKS):
                    at = LAYOUT.offset_bytes(layer, block_id, NUM_BLOCKS)
                    found = bytes(segment[at : at + LAYOUT.layer_block_bytes])
                    assert set(found) == {1 + shard * 64 + layer * NUM_BLOCKS + block_id}


@every_kind
def test_a_pool_that_others_can_map_names_every_shard(kind):
    with made(kind) as kv:
        shared = kv.shared()
        if shared is not None:
            assert shared.name and len(shared.fds) == len(shared.sizes) == LAYOUT.num_shards
            assert set(shared.sizes) == {LAYOUT.pool_bytes(NUM_BLOCKS)}
