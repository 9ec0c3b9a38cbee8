"""A hand-over between two agents whose pools are split otherwise: by heads, by tokens, by both."""

import numpy as np
import pytest
from support.in_process_network import InProcessNetwork
from support.peers import (
    NUM_BLOCKS,
    PEER,
    TRANSFER,
    ReceiveCallbacks,
    SendCallbacks,
    World,
    fill,
    offer_of,
    settle,
)

from core.kv_layout import KVLayout
from core.ports import SharedPool
from core.types import Logprob
from kv_transfer.receiver import FetchOrder
from kv_transfer.reserved_blocks import Reservation
from kv_transfer.resharding import PoolView
from kv_transfer.sender import Blocks
from simulation.loop import run_virtual

NUM_LAYERS = 2
NUM_HEADS = 2
HEAD_BYTES = 8
NUM_TOKENS = 21
FIRST = {0: Logprob(5, -0.5)}
SHAPES = [
    ((1, 4), (1, 4)), ((1, 2), (1, 4)), ((1, 4), (1, 2)), ((1, 2), (1, 8)), ((1, 8), (1, 2)),
    ((2, 4), (1, 8)), ((1, 8), (2, 4)), ((4, 2), (1, 8)), ((1, 8), (4, 2)),
]  # fmt: skip


def layout_of(num_shards, block_size):
    return KVLayout("m", "uint8", NUM_LAYERS, NUM_HEADS, HEAD_BYTES, block_size, num_shards)


def table_of(layout):
    """Blocks of the sequence, in no order."""
    return tuple(NUM_BLOCKS - 1 - 3 * i for i in range(layout.blocks_for(NUM_TOKENS)))


def content(kv, layout, copy=0):
    """The sequence's bytes, whatever the split: uint8 [layers, 2, tokens, heads, head bytes]."""
    table, heads = table_of(layout), layout.heads_per_shard
    shards = range(copy, layout.num_shards, layout.num_copies)
    shape = 2, layout.block_size_tokens, heads, HEAD_BYTES
    return np.stack([
        np.concatenate([
            np.concatenate(
                [np.frombuffer(kv.view(layer, b, s), np.uint8).reshape(shape) for b in table], 1
            )
            for s in shards
        ], 2)
        for layer in range(NUM_LAYERS)
    ])  # fmt: skip


async def hand_over(theirs, mine, num_have_blocks, prepare=lambda prefill, decode: None):
    """Move the sequence; `num_have_blocks` leading blocks are with the receiver already."""
    directory = {}
    prefill = World(SendCallbacks(), InProcessNetwork(directory), theirs)
    decode = World(ReceiveCallbacks(), InProcessNetwork(directory), mine)
    fill(prefill.kv)
    prepare(prefill, decode)
    address = await prefill.agent.listen()
    prefill.agent.offer(offer_of(prefill))
    decode.agent.fetch(FetchOrder(TRANSFER, address, *PEER))
    prefill.agent.start(TRANSFER, NUM_TOKENS)
    await settle()
    table = table_of(mine)
    decode.agent.reserved(TRANSFER, Reservation(table, (0,) * len(table), num_have_blocks))
    await settle()
    [(_, _, first)] = prefill.host.calls
    num_tokens = NUM_TOKENS - first * theirs.block_size_tokens
    for layer in range(NUM_LAYERS):
        blocks = Blocks(layer, first, table_of(theirs)[first:], num_tokens)
        prefill.agent.publish(TRANSFER, 0, blocks)
    prefill.agent.commit(TRANSFER, 0, FIRST, frozenset())
    await settle()
    decode.agent.ack(TRANSFER)
    await settle()
    prefill.agent.end_send(TRANSFER, None)
    await prefill.agent.stop()
    await decode.agent.stop()
    return prefill, decode, first


@pytest.mark.parametrize("num_have_blocks", [0, 1, 2])
@pytest.mark.parametrize(("theirs", "mine"), SHAPES)
def test_every_token_of_every_head_arrives_in_its_place_and_what_was_there_stays(
    theirs, mine, num_have_blocks
):
    theirs, mine = layout_of(*theirs), layout_of(*mine)
    prefill, decode, first = run_virtual(hand_over(theirs, mine, num_have_blocks))
    num_have = num_have_blocks * mine.block_size_tokens
    assert first == num_have // theirs.block_size_tokens
    assert decode.host.names() == ["starting", "arrived", "closed"]
    sent = content(prefill.kv, theirs)
    for copy in range(mine.num_copies):
        got = content(decode.kv, mine, copy)
        assert np.array_equal(got[:, :, num_have:NUM_TOKENS], sent[:, :, num_have:NUM_TOKENS])
        assert not got[:, :, :num_have].any(), "blocks that were here already were written"
    arrival = decode.host.calls[1][3]
    grid_tokens = min(theirs.block_size_tokens, mine.block_size_tokens)
    num_parts = -(-NUM_TOKENS // grid_tokens) - num_have // grid_tokens
    size = num_parts * grid_tokens * NUM_LAYERS * NUM_HEADS * 2 * HEAD_BYTES
    assert arrival.num_bytes == prefill.agent.num_sent_bytes == size
    assert arrival.num_blocks == len(table_of(mine)) - num_have_blocks


class _MappedNetwork(InProcessNetwork):
    """Both ends in one process, so the dialling one may as well read the other's pool."""

    def __init__(self, directory, theirs):
        super().__init__(directory)
        self.theirs = theirs

    async def dial(self, address):
        stream = await super().dial(address)
        for end in (stream, stream.peer):
            setattr(end, "pool_name", self.theirs.shared().name)
            setattr(end, "peer_segments", None)
        setattr(stream, "peer_segments", self.theirs.segments())
        return stream


@pytest.mark.parametrize(("theirs", "mine"), SHAPES)
def test_what_is_mapped_is_read_where_it_lies_and_does_not_travel(theirs, mine, monkeypatch):
    theirs, mine = layout_of(*theirs), layout_of(*mine)
    monkeypatch.delattr(PoolView, "gather")

    def mapped(prefill, decode):
        prefill.kv.shared = lambda: SharedPool(b"p" * 16, (), ())
        decode.agent._network = _MappedNetwork(prefill.network._directory, prefill.kv)

    prefill, decode, _ = run_virtual(hand_over(theirs, mine, 0, mapped))
    assert decode.host.names() == ["starting", "arrived", "closed"]
    sent = content(prefill.kv, theirs)[:, :, :NUM_TOKENS]
    for copy in range(mine.num_copies):
        assert np.array_equal(content(decode.kv, mine, copy)[:, :, :NUM_TOKENS], sent)
    assert decode.host.calls[1][3].num_bytes == prefill.agent.num_sent_bytes > 0


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_of_unequal_blocks_too_only_those_of_a_new_owner_are_refused(taken):
    """Four parts fill one block here: each stands for the block that it lies in."""

    async def scenario():
        directory = {}
        prefill = World(SendCallbacks(), InProcessNetwork(directory), layout_of(1, 2))
        decode = World(ReceiveCallbacks(), InProcessNetwork(directory), layout_of(1, 8))
        fill(prefill.kv)
        address = await prefill.agent.listen()
        prefill.agent.offer(offer_of(prefill))
        decode.agent.fetch(FetchOrder(TRANSFER, address, *PEER))
        prefill.agent.start(TRANSFER, NUM_TOKENS)
        await settle()
        generations = tuple(int(block == taken) for block in range(3))
        decode.agent.reserved(TRANSFER, Reservation((9, 8, 7), generations, 0))
        await settle()
        table = table_of(layout_of(1, 2))
        told = []
        for part in range(4 * taken + 1):  # the last of them is the first of the block taken
            prefill.agent.publish(TRANSFER, 0, Blocks(0, part, table[part : part + 1], 2))
            await settle()
            told.append("failed" in decode.host.names())
        await prefill.agent.stop()
        await decode.agent.stop()
        return told, decode.host.error("failed")

    told, error = run_virtual(scenario())
    assert told == [False] * 4 * taken + [True]
    assert f"block {(9, 8, 7)[taken]} has a new owner" in error.message
