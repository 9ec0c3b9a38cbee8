"""Quotas in the processes of a cluster: their store over Redis.

Owns which Redis and which keys they use. Does not know limits.
"""

from __future__ import annotations

from cluster.redis.quota_store import RedisQuotaStore
from core.config import BatonConfig
from prefix_index.entries import namespace_of


def make_quota_store(config: BatonConfig) -> RedisQuotaStore:
    """Put together a router's store of quotas."""
    return RedisQuotaStore(config.redis.url, namespace_of(config.security.cluster_key))
