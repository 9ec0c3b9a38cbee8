"""Which pools of workers a config asks for.

Owns the pools of a whole config, those of its tiers included. Does not know workers.
"""

from __future__ import annotations

from core.config import BatonConfig, PoolConfig, all_pools
from core.session import PoolId, Role


def pools_of(config: BatonConfig) -> dict[PoolId, PoolConfig]:
    """Return the pools of a cluster, which may have no replicas."""
    return all_pools(config.pools, config.tiers, colocated=config.colocated)


def num_workers(config: BatonConfig, *roles: Role) -> int:
    """Count the workers that a config asks for; only those of some roles if these are given."""
    pools = pools_of(config).items()
    return sum(pool.replicas for pool_id, pool in pools if not roles or pool_id.role in roles)
