"""The worker's side of its ranks: start, execute, notice death and standstill, restart.

Owns the rank processes, their pipes, the KV segments and the memory that ranks share: a page on
which they count the layers they finish, and the slots of their collectives. Does not know torch: a
worker process never imports it.

    start ──▶ READY ──execute──▶ READY
                │ a pipe ends, a process exits, or nothing is counted for STALL_S in mid-step
                └──▶ DEAD ──restart──▶ READY (fresh, empty KV segments)

Every rank gets the same plan. A rank answers for the sequences it draws for, and rank 0 reports
when a layer is done: it cannot be done there before it is done everywhere, for the ranks add up
their terms after it. One rank's end is the end of the group: the others wait for its term.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from core import events
from core.config import EngineConfig
from core.errors import ModelLoadError, WorkerDied, WorkerLost
from core.plan import StepPlan, StepResult
from core.ports import OnLayer
from engine.checkpoint.model_spec import ModelSpec
from engine.model.sharding import check_split
from engine.ranks.attention_choice import attention_of
from engine.ranks.plan_wire import PlanEncoder
from engine.ranks.rank_wire import (
    FROM_RANK,
    MAX_MESSAGE_BYTES,
    PREFIX,
    Executed,
    Fatal,
    FromRank,
    LayerDone,
    pack,
    unpack,
)
from engine.ranks.shared_kv import HEARTBEAT, SharedKV, can_share_sums, check_fits, common_bytes
from process.shared_memory import PAGE_BYTES, available_bytes, create_segment, map_segment, touch

START_TIMEOUT_S = 120.0
KILL_TIMEOUT_S = 5.0
STALL_S = 3.0
WATCH_S = 0.5


class RankProcess(Protocol):
    """A started rank, as `subprocess.Popen` gives it."""

    @property
    def pid(self) -> int:
        """Its process id."""
        ...

    def poll(self) -> int | None:
        """None while it lives."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...

    def wait(self, timeout: float) -> int:
        """Wait for its end and forget it.

        Raises:
            subprocess.TimeoutExpired: It has not ended.
        """
        ...


Launch = Callable[[int, tuple[int, ...]], Awaitable[RankProcess]]
"""(rank, descriptors to hand on in this order) -> process. They stay open here until it returns."""


async def launch_child(_: int, fds: tuple[int, ...]) -> RankProcess:
    """Start a rank as a child of this process."""
    return subprocess.Popen(  # noqa: ASYNC220, S603 - our own module; forking takes milliseconds
        [sys.executable, "-m", "engine.ranks.rank", *map(str, fds)],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
    )


@dataclass(slots=True)
class _Rank:
    """One live process."""

    process: RankProcess
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    life_fd: int

    async def read(self) -> FromRank:
        """Wait for a message.

        Raises:
            WorkerDied: The process is gone.
        """
        try:
            (length,) = PREFIX.unpack(await self.reader.readexactly(PREFIX.size))
            body = await self.reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise WorkerDied("the rank process died; its KV cache is lost") from error
        return unpack(body, FROM_RANK)


class RankGroup:
    """The ranks of one worker, their pipes and their KV segments."""

    def __init__(
        self,
        spec: ModelSpec,
        engine: EngineConfig,
        launch: Launch = launch_child,
        *,
        exports_kv: bool = True,
    ) -> None:
        """Nothing is started yet.

        Args:
            spec: The model.
            engine: Sizes of the pool and of the group.
            launch: Starts one rank process.
            exports_kv: Whether others fetch KV computed here, so that a device has to copy it out.

        Raises:
            ModelLoadError: The model cannot be split over this many ranks.
        """
        check_split(spec, engine.tensor_parallel_size)
        self._launch = launch
        self._layout = spec.layout(engine.block_size_tokens, engine.tensor_parallel_size)
        self.kv = SharedKV(self._layout, engine.num_blocks)
        self._lost = asyncio.Event()
        self._num_blocks = engine.num_blocks
        self._pool_bytes = self._layout.pool_bytes(engine.num_blocks)
        self._common_bytes = common_bytes(
            engine.tensor_parallel_size, engine.max_step_tokens, spec.hidden_size
        )
        self._ranks: list[_Rank] = []
        self._encoder = PlanEncoder(engine.block_size_tokens)
        self._heartbeat = memoryview(bytes(PAGE_BYTES))
        self._layers_before = 0
        self._step_id: int | None = None
        self._watch_task: asyncio.Task[None] | None = None
        self._setup = {
            "folder": str(spec.folder),
            "dtype": spec.dtype,
            "max_model_len": spec.max_model_len,
            "block_size_tokens": engine.block_size_tokens,
            "num_blocks": engine.num_blocks,
            "threads": engine.threads,
            "attention": attention_of(engine),
            "exports_kv": exports_kv,
            "device": engine.device,
            "size": engine.tensor_parallel_size,
            "shares_sums": engine.collectives == "shm"
            and engine.device == "cpu"
            and can_share_sums(),
            "common_bytes": self._common_bytes,
        }

    def check_memory(self) -> None:
        """Refuse a pool that this machine has no memory for; before the first start only.

        Later the pool of the ranks that have ended may still count. A pool on a device has its
        stage here; of the device's own memory each rank asks when it starts.

        Raises:
            ModelLoadError: States how much there is, and how many blocks fit.
        """
        block_bytes = self._layout.pool_bytes(1) * self._layout.num_shards
        check_fits(block_bytes, self._num_blocks, available_bytes(), "this machine")

    async def start(self) -> None:
        """Start the ranks and wait until every one has loaded its share of the model.

        Raises:
            ModelLoadError: A rank could not load the model.
            WorkerLost: One died or did not get ready in time.
        """
        common_fd = create_segment(self._common_bytes)
        self._encoder = PlanEncoder(self._layout.block_size_tokens)
        # Read from the old page before it goes: the count must never fall.
        self._layers_before = self.layers_done
        self._heartbeat = map_segment(common_fd, self._common_bytes)[HEARTBEAT]
        with self._rendezvous_folder() as folder:
            segments = []
            try:
                for index in range(self._layout.num_shards):
                    setup = {
                        **self._setup,
                        "rank": index,
                        "rendezvous": str(Path(folder) / "ranks"),
                    }
                    segments.append(await self._spawn(setup, common_fd))
            # The segments are not the pool's yet, which closes only what it uses.
            except WorkerLost:
                for fd in segments:
                    os.close(fd)
                await self.stop()
                raise
            finally:
                os.close(common_fd)
            self.kv.use(segments)
            try:
                async with asyncio.timeout(START_TIMEOUT_S), asyncio.TaskGroup() as tasks:
                    for rank in self._ranks:
                        tasks.create_task(_ready(rank))
            except TimeoutError as error:
                await self.stop()
                raise WorkerLost(
                    f"the ranks were not ready within {START_TIMEOUT_S:g} s"
                ) from error
            except ExceptionGroup as group:
                await self.stop()
                # A rank that cannot load takes its siblings along; its message is the cause.
                raise min(
                    group.exceptions, key=lambda error: not isinstance(error, ModelLoadError)
                ) from None
        for segment in self.kv.segments():
            # The worker maps it too, and its first transfer should not take the page faults.
            await asyncio.to_thread(touch, segment)
        self._watch_task = asyncio.get_running_loop().create_task(self._watch())

    def _rendezvous_folder(self) -> contextlib.AbstractContextManager[str]:
        """Where ranks that do not share memory for their sums find one another."""
        if self._layout.num_shards == 1 or self._setup["shares_sums"]:
            return contextlib.nullcontext("")
        return tempfile.TemporaryDirectory(prefix="baton-ranks-")

    async def _spawn(self, setup: dict[str, object], common_fd: int) -> int:
        """Start one rank; returns the descriptor of its KV segment."""
        mine, theirs = socket.socketpair()
        life_read, life_write = os.pipe()
        kv_fd = create_segment(self._pool_bytes)
        fds = (theirs.fileno(), life_read, kv_fd, common_fd)
        try:
            process = await self._launch(len(self._ranks), fds)
        except WorkerLost:
            mine.close()
            for fd in (life_write, kv_fd):
                os.close(fd)
            raise
        finally:
            # With a copy of it here, the end of the rank would not end the pipe.
            theirs.close()
            os.close(life_read)
        reader, writer = await asyncio.open_connection(sock=mine, limit=MAX_MESSAGE_BYTES)
        self._ranks.append(_Rank(process, reader, writer, life_write))
        writer.write(pack(setup))
        return kv_fd

    async def execute(self, plan: StepPlan, on_layer: OnLayer) -> StepResult:
        """See `Runner`."""
        if not self._ranks:
            raise WorkerLost("the rank processes are not running")
        message = pack(self._encoder.encode(plan))
        self._step_id = plan.step_id
        try:
            for rank in self._ranks:
                # To all ranks before any is awaited: they compute together, and wait in their sums.
                rank.writer.write(message)
            first, *others = self._ranks
            result = await _result(first, on_layer)
            for rank in others:
                other = await _result(rank, on_layer)
                result.tokens.update(other.tokens)
                result.failed.update(other.failed)
                result.scored.update(other.scored)
        finally:
            self._step_id = None
        return result

    async def _watch(self) -> None:
        """End a group that stands still in mid-step; report one that dies between steps.

        Only watches of its own are counted, so a worker that was stopped itself blames nobody.
        """
        before: object = None
        num_still = 0
        while True:
            await asyncio.sleep(WATCH_S)
            is_broken = any(rank.process.poll() is not None for rank in self._ranks)
            # Between steps ranks stand still in good order.
            if self._step_id is None:
                before = None
                if is_broken:
                    self._lost.set()
                continue
            if is_broken:
                self._kill()  # the others would wait for its term
            # With the step's number: one that was just begun has not stood still.
            now = (self._step_id, bytes(self._heartbeat))
            num_still = num_still + 1 if now == before else 0
            before = now
            if num_still * WATCH_S >= STALL_S:
                num_still = 0
                self._kill()

    async def lost(self) -> None:
        """Return when a rank has died while no step was in hand."""
        await self._lost.wait()
        self._lost.clear()

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.process.kill()

    async def restart(self) -> None:
        """Replace a dead group."""
        began_at = time.monotonic()
        codes = await self.stop()
        await self.start()
        took_s = round(time.monotonic() - began_at, 3)
        events.RANKS_RESTARTED.log(rank_pids=self.rank_pids(), exit_codes=codes, took_s=took_s)

    async def stop(self) -> list[int | None]:
        """Kill the ranks, reap them, close their pipes.

        Returns:
            How each ended, as `Popen.wait`; None for one that has not within `KILL_TIMEOUT_S`.
        """
        watch, self._watch_task = self._watch_task, None
        if watch is not None:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        self._kill()
        self.kv.close()
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.writer.close()
            os.close(rank.life_fd)
        until_s = time.monotonic() + KILL_TIMEOUT_S  # in a thread, as heartbeats go on meanwhile
        return [await asyncio.to_thread(_reap, rank.process, until_s) for rank in ranks]

    @property
    def layers_done(self) -> int:
        """Layers finished since the worker began, by every group it had; it never falls.

        Read from the page that ranks count on, so it moves in every step, reported or not.
        """
        return self._layers_before + int(self._heartbeat[:8].cast("Q")[0])

    def rank_pids(self) -> tuple[int, ...]:
        """Process ids of the ranks."""
        return tuple(rank.process.pid for rank in self._ranks)


def _reap(process: RankProcess, until_s: float) -> int | None:
    """Wait for the end of a killed process; returns None if it has not come.

    Only the kernel's book-keeping is waited for: it frees a large pool, or a driver's call cannot
    be interrupted.
    """
    timeout_s = max(0.0, until_s - time.monotonic())
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        events.RANK_LINGERS.log(rank_pid=process.pid, waited_s=KILL_TIMEOUT_S)
        return None


async def _ready(rank: _Rank) -> None:
    message = await rank.read()
    if isinstance(message, Fatal):
        raise ModelLoadError(message.message)


async def _result(rank: _Rank, on_layer: OnLayer) -> StepResult:
    while True:
        message = await rank.read()
        if isinstance(message, LayerDone):
            on_layer(message.step_id, message.layer)
        elif isinstance(message, Executed):
            return message.result
