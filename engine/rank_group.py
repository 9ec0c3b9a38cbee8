"""The worker's side of its ranks: start, execute, notice death, restart.

Owns the rank processes, their pipes and the shared KV segments. Does not know torch: a worker
process never imports it. Called by `worker` through the `Runner` port. Tensor parallelism will add
ranks here; one rank serves until then.

    start ──▶ READY ──execute──▶ READY
                │ pipe ends, process exits
                └──▶ DEAD ──restart──▶ READY (fresh, empty KV segments)
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from dataclasses import dataclass

from core.config import EngineConfig
from core.errors import ModelLoadError, WorkerDied, WorkerLost
from core.plan import StepPlan, StepResult
from core.ports import OnLayer
from engine.model_spec import ModelSpec
from engine.rank_wire import MAX_MESSAGE_BYTES, PREFIX, pack, plan_to_wire, result_from_wire, unpack
from engine.shared_kv import SharedKV, create_segment, map_segment

START_TIMEOUT_S = 120.0
KILL_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Rank:
    """One live process."""

    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    life_fd: int


class RankGroup:
    """One rank, its pipe and its KV segment."""

    def __init__(self, spec: ModelSpec, engine: EngineConfig) -> None:
        """Nothing is started yet."""
        layout = spec.layout(engine.block_size_tokens)
        self.kv = SharedKV(layout, engine.num_blocks)
        self.num_restarts = 0
        self._pool_bytes = layout.pool_bytes(engine.num_blocks)
        self._rank: _Rank | None = None
        self._order = {
            "folder": str(spec.folder),
            "dtype": spec.dtype,
            "max_model_len": spec.max_model_len,
            "block_size_tokens": engine.block_size_tokens,
            "num_blocks": engine.num_blocks,
            "threads": engine.threads,
            "attention": engine.attention,
            "device": engine.device,
        }

    async def start(self) -> None:
        """Start the rank and wait until the model is loaded.

        Raises:
            ModelLoadError: The rank could not load the model.
            WorkerLost: It died or did not get ready in time.
        """
        mine, theirs = socket.socketpair()
        life_read, life_write = os.pipe()
        kv_fd = create_segment(self._pool_bytes)
        fds = (theirs.fileno(), life_read, kv_fd)
        process = subprocess.Popen(  # noqa: ASYNC220, S603 - our own module; forking takes milliseconds
            [sys.executable, "-m", "engine.rank", *map(str, fds)], pass_fds=fds, stdin=subprocess.DEVNULL
        )
        self.kv.use([map_segment(kv_fd, self._pool_bytes)])
        theirs.close()
        os.close(life_read)
        os.close(kv_fd)
        reader, writer = await asyncio.open_connection(sock=mine, limit=MAX_MESSAGE_BYTES)
        self._rank = _Rank(process, reader, writer, life_write)
        writer.write(pack(self._order))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                message = await self._read(self._rank)
        except TimeoutError as error:
            await self.stop()
            raise WorkerLost(f"the rank was not ready within {START_TIMEOUT_S:g} s") from error
        if message[0] == "fatal":
            await self.stop()
            raise ModelLoadError(str(message[1]))

    async def _read(self, rank: _Rank) -> list[object]:
        try:
            (length,) = PREFIX.unpack(await rank.reader.readexactly(PREFIX.size))
            message: list[object] = unpack(await rank.reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise WorkerDied("the rank process died; its KV cache is lost") from error
        return message

    async def execute(self, plan: StepPlan, on_layer: OnLayer) -> StepResult:
        """See `Runner`."""
        rank = self._rank
        if rank is None:
            raise WorkerLost("the rank process is not running")
        rank.writer.write(pack(["plan", plan_to_wire(plan)]))
        while True:
            message = await self._read(rank)
            if message[0] == "layer":
                on_layer(message[1], message[2])  # type: ignore[arg-type]
            else:
                return result_from_wire(message[1])  # type: ignore[arg-type]

    async def restart(self) -> None:
        """Replace a dead rank."""
        self.num_restarts += 1
        await self.stop()
        await self.start()

    async def stop(self) -> None:
        """Kill the rank, reap it, close its pipes."""
        rank, self._rank = self._rank, None
        if rank is None:
            return
        rank.process.kill()
        rank.writer.close()
        os.close(rank.life_fd)
        # The process is dead already; only the kernel's book-keeping is waited for.
        rank.process.wait(timeout=KILL_TIMEOUT_S)

    def rank_pids(self) -> tuple[int, ...]:
        """Process ids of the ranks."""
        return (self._rank.process.pid,) if self._rank else ()
