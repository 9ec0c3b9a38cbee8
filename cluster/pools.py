"""Which pools of workers a config asks for.

Owns that a colocated cluster has one pool, whose workers prefill and decode. Does not know workers.
"""

from __future__ import annotations

from core.config import BatonConfig, PoolConfig
from core.session import Role


def pool_of(config: BatonConfig, role: Role) -> PoolConfig:
    """Return the pool of a role."""
    return config.pools.prefill if role is Role.PREFILL else config.pools.decode


def pools_of(config: BatonConfig) -> dict[Role, PoolConfig]:
    """Return the pools of a cluster, which may have no replicas."""
    roles = (Role.DECODE,) if config.colocated else (Role.PREFILL, Role.DECODE)
    return {role: pool_of(config, role) for role in roles}


def num_workers(config: BatonConfig) -> int:
    """Count the workers that a config asks for."""
    return sum(pool.replicas for pool in pools_of(config).values())
