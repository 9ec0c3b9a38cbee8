"""`baton bench transfer`: how fast KV goes from one process to another over one transport.

Owns the measurement with two real transfer agents in two processes, without engines: the child
publishes whole pools of blocks, the parent fetches, verifies and acknowledges them. In alternating
turns it is compared with a plain copy in memory and, over gRPC and gloo, with a bare stream of
messages of the same size. Does not know requests.
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

from bench.transfer_plan import (
    BARE,
    LAYOUT,
    RECEIVER,
    SIDECAR_TRANSPORTS,
    TransferPlan,
    make_network,
    make_pool,
)
from core.config import TransferConfig
from core.errors import ServingError, WorkerLost
from core.ids import TransferId
from core.session import RouteReport
from core.types import Logprob
from engine.ranks.shared_kv import SharedKV
from kv_transfer.copying import move, warm
from kv_transfer.receive_agent import ReceiveAgent
from kv_transfer.receiver import Arrival, FetchOrder
from kv_transfer.reserved_blocks import Reservation
from transport.fetch_streams import FETCH_CHANNELS
from transport.grpc_network import GrpcNetwork

CHILD_TIMEOUT_S = 30.0
TRANSFER_TIMEOUT_S = 60.0
COPY_BYTES = 64 << 20


@dataclass(slots=True)
class Turn:
    """One turn: seconds, bytes, CPU seconds of either side, and the machine's own speeds."""

    seconds: float
    num_bytes: int
    receiver_cpu_s: float
    sender_cpu_s: float
    memcpy_gb_per_s: float
    sum_s_per_gb: float
    bare_gb_per_s: float | None = None


class _ReceiveCallbacks:
    """Reserves at once, and resolves a future for each whole transfer."""

    def __init__(self, plan: TransferPlan, kv: SharedKV) -> None:
        self._plan = plan
        self.slots: dict[TransferId, int] = {}
        self.done: dict[TransferId, asyncio.Future[None]] = {}
        self.agent = ReceiveAgent(
            make_network(plan.transport, kv),
            self,
            kv,
            LAYOUT,
            TransferConfig(copy_threads=plan.copy_threads),
            lambda block: 0,
        )

    def transfer_starting(self, transfer_id: TransferId, num_tokens: int) -> None:
        """Reserve: there is always room."""
        count = self._plan.num_blocks
        slot = self.slots[transfer_id]
        table = tuple(range(slot * count, (slot + 1) * count))
        self.agent.reserved(transfer_id, Reservation(table, (0,) * count, 0))

    def transfer_arrived(
        self, transfer_id: TransferId, first_tokens: dict[int, Logprob], arrival: Arrival
    ) -> None:
        """Acknowledge: every block is verified."""
        self.agent.ack(transfer_id)
        self.done[transfer_id].set_result(None)

    def transfer_finished(self, transfer_id: TransferId) -> None:
        """Never called: no first token here is final."""

    def transfer_failed(self, transfer_id: TransferId, error: ServingError) -> None:
        """Fail the measurement."""
        if not self.done[transfer_id].done():
            self.done[transfer_id].set_exception(error)

    def transfer_closed(self, transfer_id: TransferId) -> None:
        """Nothing to free."""

    def route_found(self, route: RouteReport) -> None:
        """Ignore it."""


class Bench:
    """Both ends, for one plan; `async with Bench(plan) as bench: turn = await bench.turn()`."""

    def __init__(self, plan: TransferPlan) -> None:
        """Prepare; entering starts the child."""
        self._plan = plan
        self._kv = make_pool(plan.num_blocks * plan.streams)
        self._callbacks = _ReceiveCallbacks(plan, self._kv)
        self._agent = self._callbacks.agent
        self._bare = GrpcNetwork(BARE, num_channels=FETCH_CHANNELS)
        self._addresses: dict[str, str] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._life_fd = -1
        self._pair: _BarePair | None = None

    async def __aenter__(self) -> Bench:
        """Start the child, and run one transfer a stream as a warm-up."""
        life_read, self._life_fd = os.pipe()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "bench.transfer_sender",
            str(life_read),
            pass_fds=(life_read,),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        # The child has its own; ours would keep the pipe open when it ends.
        os.close(life_read)
        plan = self._plan
        names = ("transport", "mib", "streams", "turns", "transfers", "frame_bytes")
        self._send({name: getattr(plan, name) for name in names})
        warm()
        self._addresses = await self._recv()
        if plan.transport in SIDECAR_TRANSPORTS:
            await self._agent.listen()  # a sidecar must run before it can dial
            self._pair = await _BarePair.start(plan)
        for slot in range(plan.streams):
            await self._one(slot)
        return self

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None:
            raise WorkerLost("the sending process is not running")
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _recv(self) -> dict[str, Any]:
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
        self._callbacks.slots[transfer_id] = slot
        self._callbacks.done[transfer_id] = asyncio.get_running_loop().create_future()
        self._send({"offer": transfer_id.hex(), "slot": slot})
        self._agent.fetch(FetchOrder(transfer_id, self._addresses["address"], *RECEIVER))
        async with asyncio.timeout(TRANSFER_TIMEOUT_S):
            await self._callbacks.done[transfer_id]

    async def _stream(self, slot: int) -> None:
        for _ in range(self._plan.transfers):
            await self._one(slot)

    async def _child_cpu_s(self) -> float:
        self._send({"cpu": True})
        return float((await self._recv())["cpu_s"])

    async def turn(self) -> Turn:
        """Measure the transfers, and then what they are compared with."""
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
        # Within the turn: the memory bandwidth of shared machines drifts in minutes.
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
        num_bytes = count * plan.frame_bytes * plan.transfers * plan.streams
        return num_bytes / (time.perf_counter() - began) / 1e9

    async def __aexit__(self, *_: object) -> None:
        """End both processes."""
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
    async def start(cls, plan: TransferPlan) -> _BarePair:
        """Start both and let them connect."""
        pair = cls([])
        port = "0"
        for rank in range(2):
            module = ("-m", "bench.bare_pair")
            command = (*module, plan.transport, str(rank), port, str(plan.frame_bytes))
            pipe = asyncio.subprocess.PIPE
            pair._ends.append(
                await asyncio.create_subprocess_exec(
                    sys.executable, *command, stdin=pipe, stdout=pipe
                )
            )
            if rank == 0:
                port = str(int(await pair._recv(0)))
        await pair.gb_per_s(plan)
        return pair

    async def _recv(self, rank: int) -> float:
        stdout = self._ends[rank].stdout
        async with asyncio.timeout(CHILD_TIMEOUT_S):
            line = await stdout.readline() if stdout else b""
        if not line:
            raise WorkerLost("a bare pair's process has ended")
        return float(line)

    async def gb_per_s(self, plan: TransferPlan) -> float:
        """Send as many bytes as one turn does; return the speed."""
        count = -(-plan.transfer_bytes * plan.transfers * plan.streams // plan.frame_bytes)
        for end in self._ends:
            if end.stdin is not None:
                end.stdin.write(f"{count}\n".encode())
        seconds = [await self._recv(rank) for rank in range(2)]
        return count * plan.frame_bytes / max(seconds) / 1e9

    async def stop(self) -> None:
        """End both processes."""
        for end in self._ends:
            end.kill()
            await end.wait()


def _memory_speeds() -> tuple[float, float]:
    """Return the speed of a plain copy by one thread (GB/s), and seconds to checksum a GB."""
    source = np.ones(COPY_BYTES // 8, np.uint64)
    target = np.zeros(COPY_BYTES // 8, np.uint64)
    size = LAYOUT.layer_block_bytes // 8
    at = np.arange(len(source) // size) * size
    copies = []
    sums = []
    # The best of three: whatever else runs here only slows it down.
    for _ in range(3):
        began = time.perf_counter()
        np.copyto(target, source)
        copies.append(time.perf_counter() - began)
        began = time.perf_counter()
        move(source, at, (size, size), None, at, (size, size), (1, 1), size)
        sums.append(time.perf_counter() - began)
    return COPY_BYTES / min(copies) / 1e9, min(sums) / COPY_BYTES * 1e9
