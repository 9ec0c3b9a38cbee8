"""Child processes that do one job at a time: fair, bounded, replaced when stuck.

Owns the processes, their pipes, the queue before them and the end of a job whose client has left.
Does not know what a job means.

Tenants take turns. Large jobs may occupy all processes but one, so that a small job never waits
seconds for another's.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from core import events
from core.errors import Overloaded, Unavailable
from router.fair_queue import FairQueue

MAX_LINE_BYTES = 64 << 20
MAX_WAITING = 256
LARGE_BYTES = 32 << 10
START_TIMEOUT_S = 30.0
NUM_STARTS = 2
"""A process may be killed while it starts, for instance by the kernel when memory is short."""
ABANDONED_S = 0.25
"""How long an abandoned job may still run: a new process costs about as much."""


class _Child:
    """One process: one job at a time."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._ended: asyncio.subprocess.Process | None = None

    async def ask(self, job: bytes, timeout_s: float) -> bytes:
        """Send a job and wait for the answer's line; empty if the process died.

        Raises:
            TimeoutError: It took too long; the process is replaced.
        """
        process = await self.start()
        if process.stdin is None or process.stdout is None:
            return b""
        reply = b""
        reason = "it died"
        try:
            async with asyncio.timeout(timeout_s):
                process.stdin.write(job)
                await process.stdin.drain()
                line = await process.stdout.readline()
                reply = line if line.endswith(b"\n") else b""  # it died while it answered
        except (ConnectionError, ValueError):
            return b""
        except TimeoutError:
            reason = f"a job took more than {timeout_s:g} s"
            raise
        except asyncio.CancelledError:
            reason = ""  # the caller has left: the process did nothing wrong
            raise
        finally:
            if not reply and reason:
                events.SIDE_PROCESS_REPLACED.log(module=self._command[0], reason=reason)
            if not reply:  # timed out, died or abandoned: the pipe may hold half an answer
                self._kill()
        return reply

    async def start(self) -> asyncio.subprocess.Process:
        """Start the process unless it runs, and wait until it is ready; try twice.

        Raises:
            Unavailable: It did not come up.
        """
        if self._process is not None and self._process.returncode is None:
            return self._process
        for _ in range(NUM_STARTS):
            process = await self._start_once()
            if process is not None:
                return process
            reason = "it ended before it was ready"
            events.SIDE_PROCESS_REPLACED.log(module=self._command[0], reason=reason)
        raise Unavailable(f"{self._command[0]} ended before it was ready; try again")

    async def _start_once(self) -> asyncio.subprocess.Process | None:
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
        )
        is_ready = False
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                is_ready = process.stdout is not None and bool(await process.stdout.readline())
        except TimeoutError as error:
            raise Unavailable(
                f"{self._command[0]} was not ready within {START_TIMEOUT_S:g} s; try again"
            ) from error
        finally:
            if not is_ready:
                self._kill()
        return process if is_ready else None

    def _kill(self) -> None:
        """End the process without waiting; the event loop reaps it."""
        process = self._process
        self._process = None
        if process is not None and process.returncode is None:
            process.kill()
            self._ended = process

    async def stop(self) -> None:
        """End the process."""
        self._kill()
        if self._ended is not None:
            await self._ended.wait()


class ChildPool:
    """Equal children behind fair queues, one for small jobs and one for large ones."""

    def __init__(
        self, command: Sequence[str], num_processes: int, timeout_s: float, wait_s: float
    ) -> None:
        """Prepare; `start` or the first job starts the processes.

        Args:
            command: Module and arguments of `python -m`; it writes a line when it is ready.
            num_processes: At least 1.
            timeout_s: Longest time for one job.
            wait_s: Longest wait for a free process.
        """
        self._timeout_s = timeout_s
        self._wait_s = wait_s
        self._children = [_Child(command) for _ in range(num_processes)]
        self._free = list(self._children)
        # A lone process serves both kinds, in turn.
        self._max_large = max(1, num_processes - 1)
        self._num_large = 0
        self._small: FairQueue[asyncio.Future[_Child]] = FairQueue(MAX_WAITING)
        self._large: FairQueue[asyncio.Future[_Child]] = FairQueue(MAX_WAITING)
        self._is_turn_of_large = False
        self._working: set[asyncio.Task[bytes]] = set()

    @property
    def num_waiting(self) -> int:
        """Jobs that wait for a process."""
        return len(self._small) + len(self._large)

    async def start(self) -> None:
        """Start the processes now, so that the first job does not wait for one."""
        for child in self._children:
            await child.start()

    async def ask(self, job: bytes, tenant: str = "") -> bytes:
        """Wait for a process, then for the answer's line; empty if the process died.

        A cancelled caller leaves the queue; its running job is soon cancelled too.

        Raises:
            TimeoutError: The job itself took too long.
            Overloaded: Too many jobs wait, most of them this tenant's, or no process was free
                in time.
        """
        is_large = len(job) > LARGE_BYTES
        child = await self._free_child(tenant, is_large=is_large)
        work = asyncio.get_running_loop().create_task(child.ask(job, self._timeout_s))
        self._working.add(work)
        work.add_done_callback(lambda done: self._finish(done, child, is_large=is_large))
        try:
            # A caller that leaves must not cut the pipe in the middle of an answer that is nearly
            # there.
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(ABANDONED_S, work.cancel)
            raise

    async def _free_child(self, tenant: str, *, is_large: bool) -> _Child:
        queue = self._large if is_large else self._small
        loop = asyncio.get_running_loop()
        granted: asyncio.Future[_Child] = loop.create_future()
        evicted = queue.join(tenant, granted)
        if evicted is not None and not evicted.done():
            reason = f"{len(queue)} texts wait to be read; try again later"
            evicted.set_exception(Overloaded(reason))
        self._grant_next()
        timer = loop.call_later(self._wait_s, self._refuse, granted)
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self._give_back(granted.result(), is_large=is_large)
            raise
        finally:
            timer.cancel()
            queue.leave(tenant, granted)

    def _refuse(self, granted: asyncio.Future[_Child]) -> None:
        """End a wait that took too long, unless a process was granted before."""
        if not granted.done():
            granted.set_exception(
                Overloaded(
                    f"no process was free to read this within {self._wait_s:g} s; try again later"
                )
            )

    def _grant_next(self) -> None:
        """Grant free processes to the next jobs, small and large in turn."""
        while self._free:
            can_take_large = self._num_large < self._max_large and bool(self._large)
            is_large = can_take_large and (self._is_turn_of_large or not self._small)
            granted = (self._large if is_large else self._small).take()
            if granted is None:
                return
            # Its waiter has left or was refused in this turn of the loop.
            if granted.done():
                continue
            self._is_turn_of_large = not is_large
            self._num_large += is_large
            granted.set_result(self._free.pop())

    def _finish(self, work: asyncio.Task[bytes], child: _Child, *, is_large: bool) -> None:
        self._working.discard(work)
        if not work.cancelled():
            work.exception()  # the caller gets it; asyncio must not report it as unseen
        self._give_back(child, is_large=is_large)

    def _give_back(self, child: _Child, *, is_large: bool) -> None:
        self._free.append(child)
        self._num_large -= is_large
        self._grant_next()

    async def stop(self) -> None:
        """End the processes and what they work on."""
        for work in self._working:
            work.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)
        for child in self._children:
            await child.stop()
