"""The configuration: every setting with its unit and meaning, and how a cluster gets them.

Owns the names that others import; each group of settings has its module. Does not know what a
component does with its group.
"""

from core.config.pools import EngineConfig, ModelConfig, OwnPoolsConfig, PoolConfig, PoolsConfig
from core.config.prefix_cache import PrefixCacheConfig
from core.config.renamed import log_renamed
from core.config.router import PlacementConfig, RouterConfig
from core.config.security import SecurityConfig, check_key
from core.config.services import LogConfig, RedisConfig, TracingConfig
from core.config.sources import load_config
from core.config.tier_pools import SHARED_PAIR, PoolPair, all_pools, own_pair, pairs_of
from core.config.tiers import TierConfig, default_tiers
from core.config.transfer import TransferConfig
from core.config.tree import BatonConfig, known_keys

__all__ = [
    "BatonConfig",
    "EngineConfig",
    "LogConfig",
    "ModelConfig",
    "OwnPoolsConfig",
    "PlacementConfig",
    "SHARED_PAIR",
    "PoolConfig",
    "PoolPair",
    "PoolsConfig",
    "PrefixCacheConfig",
    "RedisConfig",
    "RouterConfig",
    "SecurityConfig",
    "TierConfig",
    "TracingConfig",
    "TransferConfig",
    "all_pools",
    "check_key",
    "default_tiers",
    "known_keys",
    "load_config",
    "log_renamed",
    "own_pair",
    "pairs_of",
]
