"""A receiver whose pool is replaced, whose peer cannot be reached, or in which something breaks."""

import asyncio

from support.peers import (
    FIRST,
    TRANSFER,
    ReceiveCallbacks,
    failure,
    fetched,
    reserved,
    run,
    settle,
)

from core.errors import (
    ChecksumMismatch,
    KVTransferError,
    PoolExhausted,
)
from core.ids import TransferId
from kv_transfer import frames
from kv_transfer.receiver import FetchOrder, Receiver
from kv_transfer.reserved_blocks import Reservation
from kv_transfer.resharding import PoolView

OTHER = TransferId(b"o" * 16)


def test_more_damage_than_may_be_asked_for_again_fails_at_once():
    """A Resend that names every part of a large frame would be longer than a message may be."""
    num_tokens = 4 * (frames.MAX_RESENDS + 1)
    table = tuple(range(frames.MAX_RESENDS + 1))

    async def scenario(world):
        source = await fetched(world, num_tokens)
        await reserved(world, source, table=table)

        def flip_all(payload):
            for at in range(0, len(payload), 64):
                payload[at] ^= 1

        await source.frame(0, source.entries(0, table), flip_all)
        await settle()

    error = failure(scenario)
    assert isinstance(error, ChecksumMismatch) and "65 fragments" in error.message


# --- the pool is replaced ------------------------------------------------------------------------


def test_blocks_that_were_reserved_in_a_replaced_pool_are_not_used():
    async def scenario(world):
        source = await fetched(world)
        await source.start()
        await settle()
        reservation = Reservation((0, 1, 2), (0, 0, 0), 0, world.kv.generation)
        world.kv.replace()
        world.agent.reserved(TRANSFER, reservation)
        await settle()

    assert "generation 2, this transfer was promised in 1" in failure(scenario).message


def test_a_frame_for_a_replaced_pool_is_refused():
    async def scenario(world):
        source = await fetched(world)
        await reserved(world, source)
        await source.frame(0, source.entries(0))
        await settle()
        world.kv.replace()
        await source.frame(0, source.entries(1))
        await settle()
        assert not any(world.kv.segments()[0])

    assert "generation 2, this transfer was promised in 1" in failure(scenario).message


def test_what_arrived_in_a_replaced_pool_has_not_arrived():
    async def scenario(world):
        source = await fetched(world)
        await reserved(world, source)
        for layer in range(2):
            await source.frame(0, source.entries(layer))
        await settle()
        world.kv.replace()
        await source.commit(0, FIRST)
        await settle()

    assert "generation 2, this transfer was promised in 1" in failure(scenario).message


# --- faults of this side -------------------------------------------------------------------------


def test_a_bug_while_a_frame_is_taken_fails_that_transfer_alone(monkeypatch, caplog):
    scatter, broken = PoolView.scatter, []

    def breaks(self, *args):
        if not broken:
            broken.append(1)
            raise ValueError("cannot reshape array")
        return scatter(self, *args)

    monkeypatch.setattr(PoolView, "scatter", breaks)

    async def scenario(world):
        bad = await fetched(world, transfer_id=OTHER)
        await bad.start()
        await settle()
        world.agent.reserved(OTHER, Reservation((10, 11, 12), (0, 0, 0), 0))
        await bad.hear()
        await bad.frame(0, bad.entries(0))
        await settle()
        source = await fetched(world)
        await reserved(world, source)
        for layer in range(2):
            await source.frame(0, source.entries(layer))
        await source.commit(0, FIRST)
        await settle()
        world.agent.ack(TRANSFER)
        await settle()

    host = ReceiveCallbacks()
    run(scenario, host)
    assert broken and "cannot reshape array" in caplog.text
    assert host.names(OTHER) == ["starting", "failed", "closed"]
    assert host.error("failed", OTHER).message.endswith("a bug of this worker: ValueError")
    assert host.names() == ["starting", "arrived", "closed"]


def test_a_bug_in_a_call_of_the_workers_fails_that_transfer(monkeypatch):
    def breaks(self, reservation):
        raise IndexError("no such block")

    monkeypatch.setattr(Receiver, "reserved", breaks)

    async def scenario(world):
        source = await fetched(world)
        await source.start()
        await settle()
        world.agent.reserved(TRANSFER, Reservation((0, 1, 2), (0, 0, 0), 0))
        await settle()

    assert isinstance(failure(scenario), KVTransferError)


class _Dialling:
    """A network of one way: `dial` is the test's."""

    def __init__(self, dial):
        self.dial = dial

    async def listen(self, on_stream):
        return ""

    async def close(self):
        pass


def test_a_transport_that_breaks_while_it_dials_is_an_unreached_peer():
    async def dial(address):
        raise KeyError("a carrier's books are wrong")

    async def scenario(world):
        world.agent.fetch(FetchOrder(TRANSFER, "anywhere", "decode1", 7))
        await settle()

    assert isinstance(failure(scenario, network=_Dialling(dial)), KVTransferError)


def test_a_stream_whose_open_cannot_be_sent_is_cut():
    class Stuck:
        transport = "stuck"
        num_resets = 0

        async def send(self, message):
            await asyncio.sleep(3600)

        def reset(self):
            self.num_resets += 1

    stream = Stuck()

    async def dial(address):
        return stream

    async def scenario(world):
        world.agent.fetch(FetchOrder(TRANSFER, "anywhere", "decode1", 7))
        await settle(6)

    error = failure(scenario, network=_Dialling(dial), open_timeout_s=5.0)
    assert "could not be reached" in error.message and stream.num_resets == 1


def test_a_refusal_says_why_and_closes():
    async def scenario(world):
        source = await fetched(world)
        await source.start()
        await settle()
        world.agent.refuse(TRANSFER, PoolExhausted("no 3 free blocks"))
        return await source.hear()

    host = ReceiveCallbacks()
    assert run(scenario, host) == frames.Refused("no 3 free blocks")
    assert host.names() == ["starting", "closed"]
