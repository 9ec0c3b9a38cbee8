"""Config to Serve deployments: one of workers for each pool, and one of routers over them.

Owns what Ray is asked for: replicas, resources, placement groups, health checks. Does not know how
Ray is started, nor what a replica does.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from cluster.pools import pools_of
from cluster.ray.ranks import STRATEGY, bundles
from cluster.ray.replicas import RouterReplica, WorkerReplica
from core.config import BatonConfig, PoolConfig
from core.session import PoolId

ROLE_LABEL = "baton.role"
HEALTH = {"health_check_period_s": 1.0, "health_check_timeout_s": 5.0}
QUIET = {"log_level": "WARNING", "enable_access_log": False}
STOP_GRACE_S = 10.0
"""More than a worker takes to drain (5 s): Ray kills a replica that takes longer than this."""


def _pool(config: BatonConfig, pool_id: PoolId, pool: PoolConfig, *, is_loopback: bool) -> Any:  # noqa: ANN401 - Ray's type
    options: dict[str, Any] = {"num_cpus": pool.num_cpus}
    group: dict[str, Any] = {}
    if pool.engine.tensor_parallel_size > 1:
        # Bundle 0 is the replica's: its resources are in the group, and not asked for twice.
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
        name=str(pool_id),
        num_replicas=pool.replicas,
        ray_actor_options=options,
        max_ongoing_requests=64,
        graceful_shutdown_timeout_s=STOP_GRACE_S,
        logging_config=QUIET,
        **group,
        **HEALTH,
    )
    return deployment.bind(config.model_dump_json(), str(pool_id), is_loopback)


def build_app(config: BatonConfig, *, is_loopback: bool = True) -> Any:  # noqa: ANN401 - Ray's type
    """Bind the Serve application: routers over their pools."""
    pools = [
        _pool(config, pool_id, pool, is_loopback=is_loopback)
        for pool_id, pool in pools_of(config).items()
        if pool.replicas
    ]
    router = serve.deployment(RouterReplica).options(
        name="router",
        num_replicas=config.router.replicas,
        ray_actor_options={"num_cpus": config.router.num_cpus},
        max_ongoing_requests=1024,
        graceful_shutdown_timeout_s=STOP_GRACE_S,
        logging_config=QUIET,
        **HEALTH,
    )
    return router.bind(config.model_dump_json(), *pools)
