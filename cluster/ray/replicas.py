"""What Ray runs of ours: a worker, a router, the Redis server, each inside an actor.

Owns these classes, whose methods Ray calls. Does not know how many there are or where they run.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import asdict
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.members import PushedMembership, from_json, to_json
from cluster.pools import num_workers, pools_of
from cluster.ray.ranks import ActorRanks
from cluster.redis.server import RedisServer
from cluster.router_process import RunningRouter
from cluster.worker_process import RunningWorker
from core import logs
from core.config import BatonConfig
from core.session import PoolId, WorkerDescriptor
from engine.ranks.rank_group import launch_child
from router.observe.routers import RouterEntry

FOLLOW_S = 0.5
"""After so long at most a router knows of a new worker."""
FOLLOW_ROUTERS_S = 5.0
"""The same of a new router, whom only monitoring looks for; each of n asks n of them."""
DESCRIBE_TIMEOUT_S = 2.0
log = logging.getLogger(__name__)


def _node_host(*, is_loopback: bool) -> str:
    return "127.0.0.1" if is_loopback else str(ray.util.get_node_ip_address())


class WorkerReplica:
    """A worker inside a Serve replica: Serve restarts it, routers connect to it directly."""

    async def __init__(  # type: ignore[misc]
        self, config_json: str, pool_name: str, is_loopback: bool
    ) -> None:
        """Load the model and listen, as a worker of the pool with this name."""
        config = BatonConfig.model_validate_json(config_json)
        logs.configure(pool_name, config.log.format, config.log.level)
        node = ray.get_runtime_context().get_node_id()[:12]
        pool_id = PoolId.parse(pool_name)
        pool = pools_of(config)[pool_id]
        launch = ActorRanks(pool) if pool.engine.tensor_parallel_size > 1 else launch_child
        host = _node_host(is_loopback=is_loopback)
        self._worker = await RunningWorker.start(config, pool_id, node, host, launch)

    async def describe(self) -> dict[str, Any]:
        """Return the worker's descriptor."""
        return to_json(self._worker.descriptor)

    def check_health(self) -> None:
        """Raise if the worker's loop has ended; Serve then replaces the replica."""
        self._worker.check()

    async def __del__(self) -> None:
        """Stop in good order when Serve scales down."""
        if hasattr(self, "_worker"):  # its start may have failed
            await self._worker.stop()


class RouterReplica:
    """A router inside a Serve replica, with its own HTTP and gRPC server."""

    async def __init__(  # type: ignore[misc]
        self, config_json: str, *pools: DeploymentHandle
    ) -> None:
        """Start the servers and follow the pools."""
        config = BatonConfig.model_validate_json(config_json)
        logs.configure("router", config.log.format, config.log.level)
        self._membership = PushedMembership()
        self._desired = num_workers(config)
        node_host = str(ray.util.get_node_ip_address())
        self._router = RunningRouter(config, self._membership, node_host)
        await self._router.start()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._follow(pools))]
        if config.router.replicas > 1:
            self._tasks.append(loop.create_task(self._follow_routers()))

    async def _follow(self, pools: tuple[DeploymentHandle, ...]) -> None:
        """Ask every replica of every pool who it is, twice a second."""
        known: dict[int, list[WorkerDescriptor]] = {}
        while True:
            for index, pool in enumerate(pools):
                try:
                    async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                        answers = await pool.broadcast("describe").results_async()
                    known[index] = [from_json(answer) for answer in answers]
                except Exception as error:  # noqa: BLE001 - Ray raises many kinds
                    # The list stays as it was: each session notices a lost worker itself.
                    log.debug("pool did not answer", extra={"pool": index, "error": str(error)})
            members = [member for pool_members in known.values() for member in pool_members]
            self._membership.update(members, is_starting=len(members) < self._desired)
            await asyncio.sleep(FOLLOW_S)

    async def _follow_routers(self) -> None:
        """Ask every router where it listens: Prometheus and `baton status` ask any of them."""
        context = serve.get_replica_context()
        routers = serve.get_deployment_handle(context.deployment, context.app_name)
        while True:
            try:
                async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                    answers = await routers.broadcast("entry").results_async()
                entries = [RouterEntry(**answer) for answer in answers]
                self._router.service.status.routers.update(entries)
            except Exception as error:  # noqa: BLE001 - Ray raises many kinds
                log.debug("routers did not answer", extra={"error": str(error)})
            await asyncio.sleep(FOLLOW_ROUTERS_S)

    async def entry(self) -> dict[str, Any]:
        """Return where this router listens."""
        return asdict(self._router.entry)

    async def ports(self) -> dict[str, int]:
        """Return the servers' ports."""
        return {"http": self._router.http_port, "grpc": self._router.grpc_port, "pid": os.getpid()}

    async def replicas(self) -> list[dict[str, Any]]:
        """Describe every worker this router knows."""
        return self._router.service.status.replicas()

    async def drain(self) -> None:
        """Refuse new requests, and let running ones finish."""
        for task in self._tasks:
            task.cancel()
        await self._router.stop()

    def check_health(self) -> None:
        """Raise if a task that follows the pools or the routers has failed."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()


class RedisActor:
    """Redis on the head node, so that it outlives workers and the CLI."""

    def __init__(self, config_json: str) -> None:
        """Start the server."""
        config = BatonConfig.model_validate_json(config_json)
        logs.configure("redis", config.log.format, config.log.level)
        self._server = RedisServer()

    def reference(self) -> str:
        """Return the file of this machine that holds the address."""
        return self._server.reference

    def stop(self) -> None:
        """End the server and remove its files."""
        self._server.stop()
