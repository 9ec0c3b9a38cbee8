"""The cluster on Ray Serve: one application, on a Ray of its own or on a running one.

Owns starting or joining Ray, deploying, the Redis actor, and taking all of it away again. Ray
places, restarts and scales; no token and no KV ever travels as a Ray object (docs/adr/0004). Does
not know what a worker does.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.network_check import check_network
from cluster.pools import pools_of
from cluster.ray.deployments import QUIET, build_app
from cluster.ray.probe import LOCAL_RAY, RayEndpoint, probe
from cluster.ray.ranks import bundles, check_fit
from cluster.ray.replicas import RedisActor
from cluster.redis.server import with_redis
from cluster.secrets import with_cluster_keys, with_secrets_in_files
from core.config import BatonConfig
from core.errors import ConfigError

APP = "baton"
REDIS_ACTOR = "baton-redis"
NAMESPACE = "baton"
STOP_REDIS_S = 10.0
DRAIN_TIMEOUT_S = 15.0
"""Longer than a router's own grace for requests (5 s) and for its gRPC server (5 s)."""
OBJECT_STORE_BYTES = 80 << 20
"""Near Ray's minimum: nothing of ours is kept there."""
START_TIMEOUT_S = 180.0
log = logging.getLogger(__name__)


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
        endpoint = self._init_ray()
        # One node: nothing of ours leaves the machine, whichever Ray was joined.
        is_loopback = sum(1 for node in ray.nodes() if node["Alive"]) == 1
        check_network(self.config, endpoint, is_loopback=is_loopback)
        for pool_id, pool in pools_of(self.config).items():
            check_fit(pool_id.setting, pool, ray.nodes())
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
        # Serve's own proxy would be one more hop for every token; the routers listen themselves.
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        self._is_deployed = True  # a failed start, too, leaves something to delete
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
        # On this node and no other: workers and routers reach it by a socket's file.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {
            "name": REDIS_ACTOR,
            "namespace": NAMESPACE,
            "num_cpus": 0,
            "get_if_exists": True,
        }
        # In a Ray that goes on without this process the application does, and needs its store.
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
        """Join or start Ray; return how it is protected."""
        if self._address:
            _join(self._address)
            return probe(ray.get_runtime_context().gcs_address)
        pools = pools_of(self.config).values()
        cpus = sum(sum(bundle["CPU"] for bundle in bundles(p)) * p.replicas for p in pools)
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
                self._router.broadcast("drain").results(timeout_s=DRAIN_TIMEOUT_S)
            except Exception as error:  # noqa: BLE001 - a router that is gone needs no drain
                log.debug("drain failed", extra={"error": str(error)})
        if self._address and self._is_deployed:  # a refused start must not remove another's
            serve.delete(APP)
        if self._redis is not None:
            _end_redis(self._redis)
        ray.shutdown()
        # After the replicas' end: one that is restarted reads its secrets again.
        if self._secrets is not None:
            self._secrets.cleanup()


def _end_redis(actor: Any) -> None:  # noqa: ANN401 - Ray's type
    """Let Redis remove its files, then end its actor."""
    try:
        ray.get(actor.stop.remote(), timeout=STOP_REDIS_S)
    except RayError as error:
        log.debug("Redis was gone already", extra={"error": str(error)})
    ray.kill(actor)
