"""The cluster on Ray Serve: one application, a deployment per pool and one for the routers.

Owns the deployments, the fresh local Ray (or joining a running one) and the Redis actor. Ray
places, restarts and scales; no token and no KV ever travels as a Ray object (docs/adr/0004). Does
not know what a worker does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.members import PushedMembership, from_json, to_json
from cluster.network_check import check_network
from cluster.ray.probe import LOCAL_RAY, RayEndpoint, probe
from cluster.ray.ranks import STRATEGY, ActorRanks, bundles, check_fit
from cluster.redis.server import RedisServer, with_redis
from cluster.router_process import RunningRouter
from cluster.secrets import with_cluster_keys, with_secrets_in_files
from cluster.served_model import pool_of
from cluster.worker_process import RunningWorker
from core import logs
from core.config import BatonConfig, PoolConfig
from core.errors import ConfigError
from core.session import Role, WorkerDescriptor
from engine.ranks.rank_group import launch_child

APP = "baton"
REDIS_ACTOR = "baton-redis"
NAMESPACE = "baton"
FOLLOW_S = 0.5
DESCRIBE_TIMEOUT_S = 2.0
STOP_REDIS_S = 10.0
ROLE_LABEL = "baton.role"
OBJECT_STORE_BYTES = 80 << 20
START_TIMEOUT_S = 180.0
HEALTH = {"health_check_period_s": 1.0, "health_check_timeout_s": 5.0}
QUIET = {"log_level": "WARNING", "enable_access_log": False}
log = logging.getLogger(__name__)


def _node_host(*, is_loopback: bool) -> str:
    return "127.0.0.1" if is_loopback else str(ray.util.get_node_ip_address())


class WorkerReplica:
    """A worker inside a Serve replica: Serve restarts it, routers connect to it directly."""

    async def __init__(  # type: ignore[misc]
        self, config_json: str, role: str, is_loopback: bool
    ) -> None:
        """Load the model and listen."""
        config = BatonConfig.model_validate_json(config_json)
        logs.configure(role, config.log.format, config.log.level)
        node = ray.get_runtime_context().get_node_id()[:12]
        pool = pool_of(config, Role(role))
        launch = ActorRanks(pool) if pool.engine.tensor_parallel_size > 1 else launch_child
        host = _node_host(is_loopback=is_loopback)
        self._worker = await RunningWorker.start(config, Role(role), node, host, launch)

    async def describe(self) -> dict[str, Any]:
        """Return the worker's descriptor."""
        return to_json(self._worker.descriptor)

    def check_health(self) -> None:
        """Raise if the worker's loop has ended; Serve then replaces the replica."""
        self._worker.check()

    async def __del__(self) -> None:
        """Stop in good order when Serve scales down."""
        if hasattr(self, "_worker"):
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
        self._desired = desired_workers(config)
        self._router = RunningRouter(config, self._membership)
        await self._router.start()
        self._task = asyncio.get_running_loop().create_task(self._follow(pools))

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

    async def ports(self) -> dict[str, int]:
        """Return the servers' ports."""
        return {"http": self._router.http_port, "grpc": self._router.grpc_port, "pid": os.getpid()}

    async def replicas(self) -> list[dict[str, Any]]:
        """Describe every worker this router knows."""
        return self._router.service.status.replicas()

    async def drain(self) -> None:
        """Refuse new requests, and let running ones finish."""
        self._task.cancel()
        await self._router.stop()

    def check_health(self) -> None:
        """Raise if the task that follows the pools has failed."""
        if self._task.done() and not self._task.cancelled():
            self._task.result()


def desired_workers(config: BatonConfig) -> int:
    """Workers the config asks for."""
    return config.pools.decode.replicas + (0 if config.colocated else config.pools.prefill.replicas)


def _pools(config: BatonConfig) -> dict[str, PoolConfig]:
    pools = {} if config.colocated else {"prefill": config.pools.prefill}
    return {**pools, "decode": config.pools.decode}


def _pool(
    config: BatonConfig,
    role: Role,
    pool: PoolConfig,
    *,
    is_loopback: bool,
) -> Any:  # noqa: ANN401 - Ray's type
    options: dict[str, Any] = {"num_cpus": pool.num_cpus}
    group: dict[str, Any] = {}
    if pool.engine.tensor_parallel_size > 1:
        members = bundles(pool)
        group = {"placement_group_bundles": members, "placement_group_strategy": STRATEGY}
        if pool.node_label:
            selector = [{ROLE_LABEL: pool.node_label}] * len(members)
            group["placement_group_bundle_label_selector"] = selector
    elif pool.num_gpus:
        options["num_gpus"] = pool.num_gpus
    if pool.node_label and not group:
        options["label_selector"] = {ROLE_LABEL: pool.node_label}
    deployment = serve.deployment(WorkerReplica).options(
        name=role.value,
        num_replicas=pool.replicas,
        ray_actor_options=options,
        max_ongoing_requests=64,
        graceful_shutdown_timeout_s=10.0,
        logging_config=QUIET,
        **group,
        **HEALTH,
    )
    return deployment.bind(config.model_dump_json(), role.value, is_loopback)


def build_app(config: BatonConfig, *, is_loopback: bool = True) -> Any:  # noqa: ANN401 - Ray's type
    """Bind the Serve application: routers over their pools."""
    pools = (
        [_pool(config, Role.DECODE, config.pools.decode, is_loopback=is_loopback)]
        if config.pools.decode.replicas
        else []
    )
    if not config.colocated and config.pools.prefill.replicas:
        pools.append(_pool(config, Role.PREFILL, config.pools.prefill, is_loopback=is_loopback))
    router = serve.deployment(RouterReplica).options(
        name="router",
        num_replicas=config.router.replicas,
        ray_actor_options={"num_cpus": config.router.num_cpus},
        max_ongoing_requests=1024,
        graceful_shutdown_timeout_s=10.0,
        logging_config=QUIET,
        **HEALTH,
    )
    return router.bind(config.model_dump_json(), *pools)


def _join(address: str) -> None:
    """Join a running Ray.

    Raises:
        ConfigError: There is none at that address, or it requires another token.
    """
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ConfigError(
            f"no Ray cluster can be joined at {address}: {error}; if it asks for a token, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH here as on its nodes"
        ) from error


def remove_application(address: str) -> None:
    """Remove our application, and its Redis, from a running Ray cluster.

    Raises:
        ConfigError: There is no cluster at that address.
    """
    _join(address)
    serve.delete(APP)
    try:
        _end_redis(ray.get_actor(REDIS_ACTOR, namespace=NAMESPACE))
    except ValueError:
        log.debug("there was no Redis actor")
    ray.shutdown()


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


class RayCluster:
    """The application on a fresh local Ray, or on a running one."""

    def __init__(
        self,
        config: BatonConfig,
        address: str = "",
        on_session: Callable[[str], None] = lambda folder: None,
    ) -> None:
        """Prepare; `start` starts or joins Ray.

        Args:
            config: The whole tree.
            address: A running cluster; empty: a fresh local Ray.
            on_session: Called with the session folder of a fresh Ray as soon as there is one.
        """
        self.on_session = on_session
        self.config = config
        self._address = address
        self.http_port = 0
        self.grpc_port = 0
        self._router: Any = None
        self._redis: Any = None
        self._is_deployed = False
        self._secrets: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Start or join Ray, then deploy; returns when all replicas run.

        Raises:
            ConfigError: Ray or the application did not come up.
        """
        guard = self._init_ray()
        is_loopback = sum(1 for node in ray.nodes() if node["Alive"]) == 1
        check_network(self.config, guard, is_loopback=is_loopback)
        for name, pool in _pools(self.config).items():
            check_fit(name, pool, ray.nodes())
        if is_loopback:
            self._secrets = tempfile.TemporaryDirectory(prefix="baton-secrets-")
            self.config = with_secrets_in_files(
                with_cluster_keys(self.config), Path(self._secrets.name)
            )
            if self.config.redis.enabled and not self.config.redis.url:
                self._start_redis()
        elif self.config.redis.enabled and not self.config.redis.url:
            log.warning("redis.url is empty: a cluster of several machines runs without a store")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        self._is_deployed = True
        try:
            self._router = serve.run(
                build_app(self.config, is_loopback=is_loopback), name=APP, route_prefix=None
            )
            ports = self._router.ports.remote().result(timeout_s=START_TIMEOUT_S)
        except (RuntimeError, TimeoutError) as error:
            raise ConfigError(f"the application did not start: {error}") from error
        self.http_port = ports["http"]
        self.grpc_port = ports["grpc"]

    def _start_redis(self) -> None:
        """Run Redis on this node, the head: it neither moves nor ends with a worker's node."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {
            "name": REDIS_ACTOR,
            "namespace": NAMESPACE,
            "num_cpus": 0,
            "get_if_exists": True,
        }
        lifetime = "detached" if self._address else None
        actor = (
            ray.remote(RedisActor)
            .options(**options, lifetime=lifetime, scheduling_strategy=here)
            .remote(self.config.model_dump_json())
        )
        reference = ray.get(actor.reference.remote(), timeout=START_TIMEOUT_S)
        self.config = with_redis(self.config, reference)
        self._redis = actor

    def _init_ray(self) -> RayEndpoint:
        """Join or start Ray; return how it is guarded."""
        if self._address:
            _join(self._address)
            return probe(ray.get_runtime_context().gcs_address)
        pools = _pools(self.config).values()
        cpus = sum(sum(part["CPU"] for part in bundles(p)) * p.replicas for p in pools)
        cpus += self.config.router.num_cpus * self.config.router.replicas
        # On one machine `num_cpus` is a label, not a limit: enough for the pools and Serve's own
        # actors.
        context = ray.init(
            address="local",
            namespace=NAMESPACE,
            num_cpus=int(cpus) + 4,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="ERROR",
        )
        self.on_session(str(context.address_info["session_dir"]))
        return LOCAL_RAY

    def stop(self) -> None:
        """Drain the routers; end our own Ray, or on a shared one only our application."""
        if not ray.is_initialized():
            return
        if self._router is not None:
            try:
                self._router.broadcast("drain").results(timeout_s=15.0)
            except Exception as error:  # noqa: BLE001 - a router that is gone needs no drain
                log.debug("drain failed", extra={"error": str(error)})
        if self._address and self._is_deployed:  # a refused start must not remove another's
            serve.delete(APP)
        if self._redis is not None:
            _end_redis(self._redis)
        ray.shutdown()
        if self._secrets is not None:
            self._secrets.cleanup()


def _end_redis(actor: Any) -> None:  # noqa: ANN401 - Ray's type
    """Let Redis remove its files, then end its actor."""
    try:
        ray.get(actor.stop.remote(), timeout=STOP_REDIS_S)
    except RayError as error:
        log.debug("Redis was gone already", extra={"error": str(error)})
    ray.kill(actor)
