"""The model that a config names, and what a worker of each pool holds of it.

Owns reading the model's description and the check that every pool can split it. Does not know
processes; `cluster.model_source` finds the files.
"""

from __future__ import annotations

from pathlib import Path

from cluster.model_source import model_folder
from cluster.pools import pools_of
from core.config import BatonConfig
from engine.checkpoint.model_spec import ModelSpec, read_model
from engine.model.sharding import check_split


def model_of(config: BatonConfig) -> ModelSpec:
    """Read the configured model's description, and check that the pools can split it.

    Raises:
        ModelLoadError: It cannot be served, or not by so many ranks.
    """
    m = config.model
    is_hub_id = bool(m.path) and not Path(m.path).expanduser().exists()
    spec = read_model(
        model_folder(m), m.dtype, m.max_model_len, m.name or (m.path if is_hub_id else "")
    )
    for pool in pools_of(config).values():
        check_split(spec, pool.engine.tensor_parallel_size)
    return spec


def kv_pools_of(config: BatonConfig, spec: ModelSpec) -> dict[str, dict[str, int]]:
    """What one worker of each pool holds: bytes of a KV block, bytes and tokens of all of them."""
    pools = {}
    for pool_id, pool in pools_of(config).items():
        engine = pool.engine
        layout = spec.layout(engine.block_size_tokens, engine.tensor_parallel_size)
        pools[str(pool_id)] = {
            "kv_block_bytes": layout.block_bytes,
            "kv_pool_bytes": layout.block_bytes * engine.num_blocks,
            "kv_pool_tokens": engine.num_blocks * engine.block_size_tokens,
        }
    return pools
