"""What a config needs of this machine beside its model: secrets, files, folders and room.

Owns these checks, which come before any process is started. Does not know the command line.
"""

from __future__ import annotations

import asyncio

from cluster.block_stores import check_tiers
from cluster.pools import pools_of
from cluster.secrets import with_read_secrets
from core.config import BatonConfig
from engine.checkpoint.model_spec import ModelSpec
from router.public_prompts import PublicPrompts, read_prompts
from router.text.tokenizing import TokenizerPool


def check_machine(config: BatonConfig, spec: ModelSpec) -> None:
    """Refuse what a worker or a router of this config would refuse when it starts here.

    Raises:
        ConfigError: Names the setting, what is wrong with it, and what to do.
        Unavailable: The tokenizer did not start.
    """
    with_read_secrets(config)
    for pool_id, pool in pools_of(config).items():
        engine = pool.engine
        layout = spec.layout(engine.block_size_tokens, engine.tensor_parallel_size)
        check_tiers(config.prefix_cache, engine, pool_id.role, layout)
    if prompts := read_prompts(config.router.public_prompts):
        tokenizer = TokenizerPool(spec.folder, config.router.tokenize_timeout_s)
        asyncio.run(_begin_conversations(PublicPrompts(prompts), tokenizer))


async def _begin_conversations(prompts: PublicPrompts, tokenizer: TokenizerPool) -> None:
    try:
        await prompts.start(tokenizer)
    finally:
        await tokenizer.stop()
