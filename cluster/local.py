"""The cluster as child processes, without Ray.

Owns the children: start, watch, restart with a growing pause, send routers the list of workers.
Does not know what they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from dataclasses import asdict
from typing import Any

from cluster.members import from_json, to_json
from cluster.pools import pools_of
from cluster.redis.server import RedisServer, with_redis
from cluster.secrets import with_cluster_keys
from core import events
from core.config import BatonConfig
from core.errors import ServingError, WorkerLost, from_wire
from core.session import WorkerDescriptor
from router.observe.routers import RouterEntry

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 12.0
MAX_PAUSE_S = 30.0
MAX_ROUTER_FAILURES = 3
MAX_LINE_BYTES = 64 << 20
"""Longest report of a child."""


class Child:
    """One child process, and the pipe that ends it with its parent."""

    def __init__(self, process: asyncio.subprocess.Process, life_fd: int) -> None:
        """Use `spawn` or `start`."""
        self.process = process
        self._life_fd = life_fd

    @classmethod
    async def spawn(cls, kind: str, config: BatonConfig) -> Child:
        """Start a child and send it its config."""
        child = await cls.start("cluster.child", kind)
        # On standard input: a command line is there for every user to read, and secrets are in it.
        await child.send(config.model_dump_json())
        return child

    @classmethod
    async def start(cls, module: str, *arguments: str) -> Child:
        """Start `python -m MODULE ARGUMENT... LIFE_FD`, which exchanges lines with this process."""
        life_read, life_write = os.pipe()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            str(life_read),
            pass_fds=(life_read,),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C is for the parent, which ends it in order
            limit=MAX_LINE_BYTES,
        )
        # The parent's copy goes: the child sees the end of the pipe only when no other end is open.
        os.close(life_read)
        return cls(process, life_write)

    async def send(self, line: str) -> None:
        """Send one line; a dead child's pipe is no error here, as its exit is watched elsewhere."""
        if self.process.stdin is not None:
            with contextlib.suppress(ConnectionError):
                self.process.stdin.write(line.encode() + b"\n")
                await self.process.stdin.drain()

    async def recv(self, name: str, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """Wait for the child's next line.

        Args:
            name: Its name in errors.
            timeout_s: How long; by default, that of a start.

        Raises:
            ServingError: The child reported it, died, or was not ready in time and is killed.
        """
        if self.process.stdout is None:
            raise WorkerLost(f"{name} has no output pipe")
        try:
            async with asyncio.timeout(timeout_s):
                line = await self.process.stdout.readline()
        except TimeoutError as error:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            raise WorkerLost(
                f"{name} was not ready within {timeout_s:g} s; its last line in the log says "
                "how far it came: start again with less beside it, or with a smaller model"
            ) from error
        if not line:
            await self.process.wait()
            raise WorkerLost(f"{name} ended ({self.how_it_ended()}) before it was ready")
        report: dict[str, Any] = json.loads(line)
        if "error" in report:
            raise from_wire(report["error"], report["message"])
        return report

    async def stop(self) -> None:
        """Terminate it; kill it if it does not end in time."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self.process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self.process.kill()
                await self.process.wait()
        self.close()

    def how_it_ended(self) -> str:
        """Describe its end: the signal, or the exit code."""
        code = self.process.returncode
        if code is None or code >= 0:
            return f"exit code {code}"
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"

    def close(self) -> None:
        """Close the pipe, which ends the child if it still runs."""
        if self._life_fd >= 0:
            os.close(self._life_fd)
            self._life_fd = -1


class LocalCluster:
    """Workers and routers as children of this process."""

    def __init__(self, config: BatonConfig) -> None:
        """Prepare; `start` starts the children."""
        self.config = config
        self.http_port = 0
        self.grpc_port = 0
        self._members: dict[str, WorkerDescriptor] = {}
        self._routers: dict[int, Child] = {}
        self.routers: dict[int, RouterEntry] = {}
        """Where each router listens, or is about to again."""
        self._workers: dict[str, Child] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._desired = 0
        self.failed: asyncio.Future[None] | None = None
        self._redis: RedisServer | None = None

    async def start(self) -> None:
        """Start everything, and return when the routers know every worker.

        Raises:
            ServingError: A child could not start; everything is stopped again.
        """
        self.failed = asyncio.get_running_loop().create_future()
        names = [
            f"{pool_id}-{index}"
            for pool_id, pool in pools_of(self.config).items()
            for index in range(pool.replicas)
        ]
        self._desired = len(names)
        self.config = with_cluster_keys(self.config)
        if self.config.redis.enabled and not self.config.redis.url:
            self._redis = RedisServer()
            self.config = with_redis(self.config, self._redis.url)
        try:
            await asyncio.gather(
                *(self._start_worker(name) for name in names), self._start_routers()
            )
            await self._update_routers()
        except ServingError:
            await self.stop()
            raise
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._keep(name)) for name in names]
        self._tasks += [loop.create_task(self._keep_router(index)) for index in self._routers]

    async def _start_worker(self, name: str) -> None:
        child = await Child.spawn(name.rpartition("-")[0], self.config)
        self._workers[name] = child
        report = await child.recv(name)
        self._members[name] = from_json(report["worker"])
        events.CHILD_STARTED.log(child=name, child_pid=child.process.pid)

    async def _start_routers(self) -> None:
        for index in range(self.config.router.replicas):
            await self._start_router(index, self.config)
        self.http_port, self.grpc_port = self.addresses[0]

    @property
    def addresses(self) -> list[tuple[int, int]]:
        """(HTTP port, gRPC port) of each router; equal if they share fixed ones."""
        return [(entry.http_port, entry.grpc_port) for entry in self.routers.values()]

    async def _start_router(self, index: int, config: BatonConfig) -> None:
        name = f"router-{index}"
        child = await Child.spawn("router", config)
        self._routers[index] = child
        report = await child.recv(name)
        events.CHILD_STARTED.log(child=name, child_pid=child.process.pid)
        self.routers[index] = RouterEntry(**report["router"])

    async def _update_routers(self) -> None:
        update = {
            "members": [to_json(m) for m in self._members.values()],
            "is_starting": len(self._members) < self._desired,
            "routers": [asdict(entry) for entry in self.routers.values()],
        }
        for router in self._routers.values():
            await router.send(json.dumps(update))

    async def _keep(self, name: str) -> None:
        """Restart a worker whenever it ends, with a longer pause after each failed start."""
        pause_s = 0.0
        while True:
            child = self._workers.get(name)
            if child is not None:
                await child.process.wait()
                _log_end(name, child)
                child.close()
                # Routers stop placing on it before its successor has loaded the model.
                self._members.pop(name, None)
                await self._update_routers()
            await asyncio.sleep(pause_s)
            try:
                await self._start_worker(name)
                pause_s = 0.0
                await self._update_routers()
            except ServingError as error:
                # What cannot start, for want of memory or files, must not be tried in a busy loop.
                pause_s = min(max(1.0, pause_s * 2), MAX_PAUSE_S)
                events.CHILD_FAILED.log(child=name, reason=str(error), retry_in_s=pause_s)

    async def _keep_router(self, index: int) -> None:
        """Restart a router on the ports it had; three failed starts in a row end the cluster."""
        had = self.routers[index]
        # On the ports it had: clients, load balancers and Prometheus know these.
        ports = {name: getattr(had, name) for name in ("http_port", "grpc_port", "metrics_port")}
        config = self.config.model_copy(
            update={"router": self.config.router.model_copy(update=ports)}
        )
        num_failures = 0
        while True:
            child = self._routers[index]
            code = await child.process.wait()
            _log_end(f"router-{index}", child)
            child.close()
            try:
                await self._start_router(index, config)
                await self._update_routers()
                num_failures = 0
            except ServingError as error:
                num_failures += 1
                events.CHILD_FAILED.log(
                    child=f"router-{index}", reason=str(error), retry_in_s=num_failures
                )
                # Without a router nobody is served: then the end of all is the clearer sign.
                if num_failures >= MAX_ROUTER_FAILURES:
                    break
                await asyncio.sleep(num_failures)
        if self.failed is not None and not self.failed.done():
            self.failed.set_exception(
                WorkerLost(f"a router process ended with code {code} and did not start again")
            )

    async def stop(self) -> None:
        """Stop the routers first, so that requests end in order, then the workers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Routers first: their requests end in order while workers still answer.
        await asyncio.gather(*(child.stop() for child in self._routers.values()))
        await asyncio.gather(*(child.stop() for child in self._workers.values()))
        if self._redis is not None:
            self._redis.stop()
        if self.failed is not None and not self.failed.done():
            self.failed.cancel()


def _log_end(name: str, child: Child) -> None:
    if child.process.returncode == 0:  # only SIGTERM or SIGINT end a child like this
        events.CHILD_LEFT.log(child=name, child_pid=child.process.pid)
        return
    events.CHILD_ENDED.log(child=name, child_pid=child.process.pid, reason=child.how_it_ended())
