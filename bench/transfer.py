"""`baton bench transfer`: how fast KV goes from one process to another over one transport.

Owns two real transfer agents in two processes, without engines: the child publishes whole pools of
blocks, the parent fetches, verifies and acknowledges them. Compared, in alternating turns, with a
plain copy in memory and, over gRPC and gloo, with a bare stream of messages of the same size. Does
not know requests. The child is `python -m bench.transfer LIFE_FD`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.config import TransferConfig
from core.errors import ConfigError, ServingError, WorkerLost
from core.ids import Incarnation, TransferId, WorkerId
from core.kv_layout import KVLayout
from core.ports import MessageStream, Network, StreamClosed
from core.session import RouteReport
from core.types import Logprob
from engine.ranks.shared_kv import SharedKV
from kv_transfer.copying import move, warm
from kv_transfer.receive_agent import ReceiveAgent
from kv_transfer.receiver import Arrival, FetchOrder, Reservation
from kv_transfer.send_agent import SendAgent
from kv_transfer.sender import Blocks, Offer
from kv_transfer.sidecar.network import SidecarNetwork
from kv_transfer.transports.choice import Transports
from kv_transfer.transports.shared_memory import SharedNetwork
from process.parent_death import exit_with_parent
from process.shared_memory import create_segment
from transport.grpc_streams import FETCH_CHANNELS, GrpcNetwork, fetch_network

LAYOUT = KVLayout(
    "bench", "bfloat16", num_layers=24, num_kv_heads=2, head_size=64, block_size_tokens=16
)
"""Qwen2.5-0.5B's."""
CHILD_TIMEOUT_S = 30.0
TRANSFER_TIMEOUT_S = 60.0
RECEIVER = (WorkerId("bench-receiver"), Incarnation(1))
BARE = "/baton.internal.v1.Bench/Bare"
COPY_BYTES = 64 << 20
CARRIED = ("gloo", "nccl", "nixl")
CARRIED_BYTES = (1 << 20) + (1 << 16)
"""Room for a frame and what it says about its parts."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    transport: str
    mib: int
    streams: int
    turns: int = 5
    transfers: int = 8
    frame_bytes: int = 1 << 20
    copy_threads: int = 1

    @property
    def num_blocks(self) -> int:
        """Blocks of one transfer."""
        return max(1, (self.mib << 20) // LAYOUT.block_bytes)

    @property
    def transfer_bytes(self) -> int:
        """Bytes of one transfer, in whole blocks."""
        return self.num_blocks * LAYOUT.block_bytes


@dataclass(slots=True)
class Turn:
    """One turn: seconds, bytes, CPU seconds of either side, and what the machine can do."""

    seconds: float
    num_bytes: int
    receiver_cpu_s: float
    sender_cpu_s: float
    memcpy_gb_per_s: float
    sum_s_per_gb: float
    bare_gb_per_s: float | None = None


def _network(transport: str, kv: SharedKV) -> Network:
    if transport == "shm":
        return Transports({"shm": SharedNetwork(kv.shared)})
    if transport == "grpc":
        return Transports({"grpc": fetch_network()})
    if transport in CARRIED:
        return Transports({transport: SidecarNetwork(transport, "127.0.0.1", CARRIED_BYTES)})
    raise ConfigError(
        f"--transport {transport!r} is unknown; possible: shm, grpc, {', '.join(CARRIED)}"
    )


def _pool(num_blocks: int) -> SharedKV:
    kv = SharedKV(LAYOUT, num_blocks)
    kv.use([create_segment(LAYOUT.pool_bytes(num_blocks))])
    return kv


# --- the child: it sends --------------------------------------------------------------------------


class _SendCallbacks:
    """Publishes everything as soon as the receiver has room."""

    def __init__(self, plan: Plan, kv: SharedKV) -> None:
        self.tables: dict[TransferId, tuple[int, ...]] = {}
        self.agent = SendAgent(
            _network(plan.transport, kv),
            self,
            kv,
            LAYOUT,
            TransferConfig(frame_bytes=plan.frame_bytes),
        )

    def transfer_reserved(self, transfer_id: TransferId, have_blocks: int) -> None:
        """Publish layer by layer, as a prompt would be computed, only at once."""
        table = self.tables[transfer_id]
        for layer in range(LAYOUT.num_layers):
            self.agent.publish(
                transfer_id, 0, Blocks(layer, 0, table, len(table) * LAYOUT.block_size_tokens)
            )
        self.agent.commit(transfer_id, 0, {0: Logprob(1, 0.0)}, frozenset())

    def transfer_sent(self, transfer_id: TransferId) -> None:
        """Nothing to free."""

    def transfer_lost(self, transfer_id: TransferId, error: ServingError) -> None:
        """Heard on the other side too."""

    def transfer_drained(self, transfer_id: TransferId, sub_attempt: int) -> None:
        """Nothing to free."""


async def _send(lines: asyncio.StreamReader) -> None:
    plan = Plan(**json.loads(await lines.readline()))
    kv = _pool(plan.num_blocks * plan.streams)
    rng = np.random.default_rng(1)
    for segment in kv.segments():
        words = np.frombuffer(segment, np.uint64)
        words[:] = rng.integers(0, 2**63, len(words), dtype=np.uint64)
    host = _SendCallbacks(plan, kv)
    agent = host.agent
    warm()
    bare = GrpcNetwork(BARE, num_channels=FETCH_CHANNELS)
    address = await agent.listen()
    bare_address = await bare.listen(lambda stream: _send_bare(stream, plan))
    _say({"address": address, "bare_address": bare_address})
    while line := await lines.readline():
        order = json.loads(line)
        if "offer" in order:
            transfer_id = TransferId(bytes.fromhex(order["offer"]))
            slot = order["slot"]
            host.tables[transfer_id] = tuple(
                range(slot * plan.num_blocks, (slot + 1) * plan.num_blocks)
            )
            agent.offer(Offer(transfer_id, *RECEIVER))
            agent.start(transfer_id, plan.num_blocks * LAYOUT.block_size_tokens)
        else:
            _say({"cpu_s": time.process_time()})
    await agent.stop()
    await bare.close()


async def _send_bare(stream: MessageStream, plan: Plan) -> None:
    message = bytes(plan.frame_bytes)
    try:
        while await stream.recv():
            for _ in range(-(-plan.transfer_bytes // plan.frame_bytes)):
                await stream.send(message)
    except StreamClosed:
        pass  # the parent has measured enough


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


# --- the parent: it receives ----------------------------------------------------------------------


class _ReceiveCallbacks:
    """Reserves at once and says when a transfer is whole."""

    def __init__(self, plan: Plan, kv: SharedKV) -> None:
        self._plan = plan
        self.slots: dict[TransferId, int] = {}
        self.done: dict[TransferId, asyncio.Future[None]] = {}
        self.agent = ReceiveAgent(
            _network(plan.transport, kv),
            self,
            kv,
            LAYOUT,
            TransferConfig(copy_threads=plan.copy_threads),
            lambda block: 0,
        )

    def transfer_starting(self, transfer_id: TransferId, num_tokens: int) -> None:
        """There is always room."""
        count = self._plan.num_blocks
        slot = self.slots[transfer_id]
        table = tuple(range(slot * count, (slot + 1) * count))
        self.agent.reserved(transfer_id, Reservation(table, (0,) * count, 0))

    def transfer_arrived(
        self, transfer_id: TransferId, first_tokens: dict[int, Logprob], arrival: Arrival
    ) -> None:
        """Verified."""
        self.agent.ack(transfer_id)
        self.done[transfer_id].set_result(None)

    def transfer_finished(self, transfer_id: TransferId) -> None:
        """Never: no first token here is final."""

    def transfer_failed(self, transfer_id: TransferId, error: ServingError) -> None:
        """The measurement is void."""
        if not self.done[transfer_id].done():
            self.done[transfer_id].set_exception(error)

    def transfer_closed(self, transfer_id: TransferId) -> None:
        """Nothing to free."""

    def route_found(self, route: RouteReport) -> None:
        """Nobody asked."""


class Bench:
    """Both ends, for one plan; `async with Bench(plan) as bench: turn = await bench.turn()`."""

    def __init__(self, plan: Plan) -> None:
        """Nothing is started yet."""
        self._plan = plan
        self._kv = _pool(plan.num_blocks * plan.streams)
        self._host = _ReceiveCallbacks(plan, self._kv)
        self._agent = self._host.agent
        self._bare = GrpcNetwork(BARE, num_channels=FETCH_CHANNELS)
        self._addresses: dict[str, str] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._life_fd = -1
        self._pair: _BarePair | None = None

    async def __aenter__(self) -> Bench:
        """Start the child and carry one transfer, so that no turn is the first."""
        life_read, self._life_fd = os.pipe()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.transfer", str(life_read), pass_fds=(life_read,),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        os.close(life_read)
        plan = self._plan
        names = ("transport", "mib", "streams", "turns", "transfers", "frame_bytes")
        self._tell({name: getattr(plan, name) for name in names})
        warm()
        self._addresses = await self._hear()
        if plan.transport in CARRIED:
            await self._agent.listen()  # only a carrier that is up can dial
            self._pair = await _BarePair.start(plan)
        for slot in range(plan.streams):
            await self._one(slot)
        return self

    def _tell(self, message: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None:
            raise WorkerLost("the sending process is not running")
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _hear(self) -> dict[str, Any]:
        if self._process is None or self._process.stdout is None:
            raise WorkerLost("the sending process is not running")
        async with asyncio.timeout(CHILD_TIMEOUT_S):
            line = await self._process.stdout.readline()
        if not line:
            raise WorkerLost("the sending process has ended")
        found: dict[str, Any] = json.loads(line)
        return found

    async def _one(self, slot: int) -> None:
        transfer_id = TransferId(os.urandom(16))
        self._host.slots[transfer_id] = slot
        self._host.done[transfer_id] = asyncio.get_running_loop().create_future()
        self._tell({"offer": transfer_id.hex(), "slot": slot})
        self._agent.fetch(FetchOrder(transfer_id, self._addresses["address"], *RECEIVER))
        async with asyncio.timeout(TRANSFER_TIMEOUT_S):
            await self._host.done[transfer_id]

    async def _stream(self, slot: int) -> None:
        for _ in range(self._plan.transfers):
            await self._one(slot)

    async def _child_cpu_s(self) -> float:
        self._tell({"cpu": True})
        return float((await self._hear())["cpu_s"])

    async def turn(self) -> Turn:
        """Measure the transfers, and beside them what they are compared with."""
        plan = self._plan
        sent_at = await self._child_cpu_s()
        cpu_at = time.process_time()
        began = time.perf_counter()
        await asyncio.gather(*(self._stream(slot) for slot in range(plan.streams)))
        seconds = time.perf_counter() - began
        cpu_s = time.process_time() - cpu_at
        num_bytes = plan.transfer_bytes * plan.transfers * plan.streams
        turn = Turn(
            seconds, num_bytes, cpu_s, await self._child_cpu_s() - sent_at, *_memory_speeds()
        )
        if plan.transport == "grpc":
            turn.bare_gb_per_s = await self._bare_speed()
        elif self._pair is not None:
            turn.bare_gb_per_s = await self._pair.gb_per_s(plan)
        return turn

    async def _bare_speed(self) -> float:
        plan = self._plan
        count = -(-plan.transfer_bytes // plan.frame_bytes)

        async def one() -> None:
            stream = await self._bare.dial(self._addresses["bare_address"])
            for _ in range(plan.transfers):
                await stream.send(b"go")
                for _ in range(count):
                    await stream.recv()
            stream.reset()

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(plan.streams)))
        return (
            count
            * plan.frame_bytes
            * plan.transfers
            * plan.streams
            / (time.perf_counter() - began)
            / 1e9
        )

    async def __aexit__(self, *_: object) -> None:
        """End both."""
        await self._agent.stop()
        await self._bare.close()
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        if self._pair is not None:
            await self._pair.stop()
        os.close(self._life_fd)
        self._kv.close()


class _BarePair:
    """Two processes of `bench.bare_pair`."""

    def __init__(self, ends: list[asyncio.subprocess.Process]) -> None:
        self._ends = ends

    @classmethod
    async def start(cls, plan: Plan) -> _BarePair:
        """Start both and let them meet."""
        pair = cls([])
        port = "0"
        for rank in range(2):
            command = (
                "-m",
                "bench.bare_pair",
                plan.transport,
                str(rank),
                port,
                str(plan.frame_bytes),
            )
            pipe = asyncio.subprocess.PIPE
            pair._ends.append(
                await asyncio.create_subprocess_exec(
                    sys.executable, *command, stdin=pipe, stdout=pipe
                )
            )
            if rank == 0:
                port = str(int(await pair._hear(0)))
        await pair.gb_per_s(plan)
        return pair

    async def _hear(self, rank: int) -> float:
        stdout = self._ends[rank].stdout
        async with asyncio.timeout(CHILD_TIMEOUT_S):
            line = await stdout.readline() if stdout else b""
        if not line:
            raise WorkerLost("a bare pair's process has ended")
        return float(line)

    async def gb_per_s(self, plan: Plan) -> float:
        """Send as much as one turn does."""
        count = -(-plan.transfer_bytes * plan.transfers * plan.streams // plan.frame_bytes)
        for end in self._ends:
            if end.stdin is not None:
                end.stdin.write(f"{count}\n".encode())
        seconds = [await self._hear(rank) for rank in range(2)]
        return count * plan.frame_bytes / max(seconds) / 1e9

    async def stop(self) -> None:
        """End both."""
        for end in self._ends:
            end.kill()
            await end.wait()


def _memory_speeds() -> tuple[float, float]:
    """Speed of a plain copy by one thread, GB/s, and seconds that the checksum of a GB takes."""
    source = np.ones(COPY_BYTES // 8, np.uint64)
    target = np.zeros(COPY_BYTES // 8, np.uint64)
    size = LAYOUT.layer_block_bytes // 8
    at = np.arange(len(source) // size) * size
    copies = []
    sums = []
    for _ in range(3):
        began = time.perf_counter()
        np.copyto(target, source)
        copies.append(time.perf_counter() - began)
        began = time.perf_counter()
        move(source, at, (size, size), None, at, (size, size), (1, 1), size)
        sums.append(time.perf_counter() - began)
    return COPY_BYTES / min(copies) / 1e9, min(sums) / COPY_BYTES * 1e9


async def _main() -> None:
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    await _send(lines)


if __name__ == "__main__":
    exit_with_parent(int(sys.argv[1]))
    asyncio.run(_main())
