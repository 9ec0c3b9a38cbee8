"""One transfer agent on virtual time, and a peer of it that says exactly what a test wants.

Owns the host that writes down what it is told, real parts of a real pool to send, and the peer's
two roles.
"""

import asyncio
import random

import numpy as np

from core.config import TransferConfig
from core.ids import Incarnation, TransferId, WorkerId
from core.kv_layout import KVLayout
from core.types import Logprob
from kv_transfer import codec, frames
from kv_transfer.receive_agent import ReceiveAgent
from kv_transfer.receiver import FetchOrder
from kv_transfer.reserved_blocks import Reservation
from kv_transfer.resharding import PoolView, common_grid
from kv_transfer.send_agent import SendAgent
from kv_transfer.sender import Blocks, Offer
from simulation.hash_runner import MemoryKV
from simulation.loop import run_virtual
from support.in_process_network import InProcessNetwork

LAYOUT = KVLayout("m", "uint8", 2, 1, 8, 4)
TRANSFER = TransferId(b"t" * 16)
OTHER = TransferId(b"o" * 16)
PEER = (WorkerId("decode1"), Incarnation(7))
NUM_BLOCKS = 128
NUM_TOKENS = 12
TABLE = (3, 4, 5)
FIRST = {0: Logprob(5, -0.5)}


class Heard:
    """What an agent's host was told, in order: (what, transfer id, ...)."""

    def __init__(self):
        self.calls = []

    def names(self, transfer_id=TRANSFER):
        return [call[0] for call in self.calls if call[1] == transfer_id]

    def error(self, what, transfer_id=TRANSFER):
        return next(call[2] for call in self.calls if call[:2] == (what, transfer_id))


def _says(name):
    return lambda self, *told: self.calls.append((name, *told))


class SendCallbacks(Heard):
    transfer_reserved = _says("reserved")
    transfer_sent = _says("sent")
    transfer_lost = _says("lost")
    transfer_drained = _says("drained")

    def make_agent(self, network, kv, layout, config, on_fault):
        return SendAgent(network, self, kv, layout, config, on_fault)


class ReceiveCallbacks(Heard):
    transfer_starting = _says("starting")
    transfer_arrived = _says("arrived")
    transfer_finished = _says("finished")
    transfer_failed = _says("failed")
    transfer_closed = _says("closed")
    route_found = _says("route")

    def make_agent(self, network, kv, layout, config, on_fault):
        return ReceiveAgent(network, self, kv, layout, config, lambda block: 0, on_fault=on_fault)


class World:
    """An agent and its pool."""

    def __init__(self, host, network=None, layout=LAYOUT, **transfer):
        self.directory, self.host = {}, host
        self.address = ""
        self.kv = MemoryKV(layout, NUM_BLOCKS)
        self.network = network or InProcessNetwork(self.directory)
        self.broken = []
        self.agent = host.make_agent(
            self.network, self.kv, layout, TransferConfig(**transfer), self.broken.append
        )


def run(scenario, host, **world):
    """Run `scenario(world)` on a fresh virtual loop; then nothing may be left of any transfer."""

    async def main():
        w = World(host, **world)
        w.address = await w.agent.listen()
        result = await scenario(w)
        await w.agent.stop()
        assert w.agent.num_live == 0
        return result

    return run_virtual(main())


def lost(scenario, host=None, **world):
    """Run a scenario that must end a sender's transfer; returns why."""
    host = host or SendCallbacks()
    run(scenario, host, **world)
    assert host.names()[-2:] == ["lost", "drained"] and "sent" not in host.names()
    return host.error("lost")


def failure(scenario, **world):
    """Run a scenario that must end the transfer; returns why. Nothing has arrived."""
    host = ReceiveCallbacks()
    run(scenario, host, **world)
    assert host.names()[-2:] == ["failed", "closed"] and "arrived" not in host.names()
    return host.error("failed")


def fill(kv):
    """Put other bytes into every place of every shard."""
    for number, segment in enumerate(kv.segments()):
        segment[:] = random.Random(number).randbytes(len(segment))


class Talk:
    """One stream, numbered as peers number theirs."""

    def __init__(self, stream):
        self.stream, self.number = stream, 0

    async def say(self, message):
        await self.stream.send(codec.encode(self.number, message))
        self.number += 1

    async def hear(self):
        """The next message that is no beat."""
        while True:
            message = codec.decode(await self.stream.recv())[1]
            if message != frames.Heartbeat():
                return message


class Source(Talk):
    """A prefill worker with a pool of random bytes, whose one prompt lies in `TABLE`."""

    def __init__(self, stream, num_tokens=NUM_TOKENS):
        super().__init__(stream)
        self.num_tokens = num_tokens
        self.kv = MemoryKV(LAYOUT, NUM_BLOCKS)
        fill(self.kv)
        self.pool = PoolView(self.kv.segments(), LAYOUT, common_grid(LAYOUT, *LAYOUT.shape))
        self.checksums = np.zeros((LAYOUT.num_layers, 1, LAYOUT.blocks_for(num_tokens)), np.uint64)

    def entries(self, layer, table=TABLE):
        return self.pool.entries(layer, 0, table, self.num_tokens)

    async def frame(self, sub_attempt, entries, spoil=None):
        """Send these parts; `spoil(payload)` damages them on their way."""
        payload, tallies = self.pool.gather(entries)
        sums = frames.keyed_checksums(TRANSFER, sub_attempt, entries, tallies)
        entries["checksum"] = sums
        self.checksums[entries["layer"], entries["shard"], entries["block"]] = sums
        if spoil is not None:
            payload = bytearray(payload)
            spoil(payload)
            payload = memoryview(payload)
        data = codec.encode_frame(self.number, sub_attempt, entries, payload)
        self.number += 1
        await self.stream.send(data)

    async def commit(self, sub_attempt, tokens, checksum=None):
        whole = frames.combined_checksum(self.checksums) if checksum is None else checksum
        await self.say(frames.Commit(sub_attempt, self.checksums.size, whole, tokens, frozenset()))

    async def start(self):
        await self.say(frames.Starting(0, self.num_tokens, *LAYOUT.shape))


async def fetched(world, num_tokens=NUM_TOKENS, transfer_id=TRANSFER):
    """Let the agent fetch from a scripted source; returns it after the Open."""
    streams = asyncio.Queue()
    over = asyncio.Event()

    async def serve(stream):
        await streams.put(stream)
        await over.wait()

    address = f"source-{len(world.directory)}"
    world.directory[address] = serve
    world.agent.fetch(FetchOrder(transfer_id, address, *PEER))
    source = Source(await streams.get(), num_tokens)
    assert isinstance(await source.hear(), frames.Open)
    return source


async def reserved(world, source, table=(0, 1, 2), generations=None):
    """Go on until blocks are reserved; in this world all of them are in generation 0."""
    await source.start()
    await settle()
    generations = generations or (0,) * len(table)
    world.agent.reserved(TRANSFER, Reservation(table, generations, 0))
    assert isinstance(await source.hear(), frames.Reserved)


def offer_of(world, transfer_id=TRANSFER):
    return Offer(transfer_id, *PEER, world.kv.generation)


def blocks_of(layer, num_tokens=NUM_TOKENS):
    return Blocks(layer, 0, TABLE, num_tokens)


async def opened(world, transfer_id=TRANSFER, peer=PEER):
    """Dial the agent and ask for a transfer."""
    worker_id, incarnation = peer
    talk = Talk(await world.network.dial(world.address))
    await talk.say(frames.Open(transfer_id, worker_id, incarnation, LAYOUT.identity, *LAYOUT.shape))
    return talk


async def partnered(world):
    """An offered, started transfer whose receiver has reserved."""
    world.agent.offer(offer_of(world))
    talk = await opened(world)
    world.agent.start(TRANSFER, NUM_TOKENS)
    assert isinstance(await talk.hear(), frames.Starting)
    await talk.say(frames.Reserved(0, 0))
    await settle()
    return talk


async def finished(world, talk):
    """Acknowledge, as after a whole transfer."""
    await talk.say(frames.Ack())
    await settle()
    world.agent.end_send(TRANSFER, None)


async def settle(seconds=0.1):
    """Let everything that can happen without waiting for a beat happen."""
    await asyncio.sleep(seconds)
