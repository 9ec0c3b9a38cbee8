"""The model, the pools of workers that serve it, and their engines.

Owns these settings. Does not know what an engine does with them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from core.config.node import Node

SHARED = "shared"
"""What `tiers.NAME.spill_to` calls the pools that all tiers share."""


class ModelConfig(Node):
    """What is served."""

    path: str = Field(
        "",
        description="Hugging Face folder, or a hub id like Qwen/Qwen3-0.6B; empty: the tiny "
        "model of the repository",
    )
    revision: str = Field("main", description="branch, tag or commit of a hub id")
    name: str = Field("", description="name in the API; empty: the folder's name")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: as the weights are stored"
    )
    max_model_len: int = Field(
        0, ge=0, description="longest prompt plus output (tokens); 0: the model's own"
    )


class EngineConfig(Node):
    """One worker's engine."""

    block_size_tokens: int = Field(
        16,
        ge=1,
        le=256,
        description="tokens per KV block; one pool's must be a multiple of the other's",
    )
    num_blocks: int = Field(512, ge=2, description="blocks in a worker's KV pool")
    max_step_tokens: int = Field(512, ge=1, description="token budget of one step")
    max_sequences: int = Field(
        64,
        ge=1,
        description="sequences that run at once, always fewer than max_step_tokens; choices of "
        "one request may come on top",
    )
    attention: Literal["auto", "cpu", "triton", "gathered", "dense"] = Field(
        "auto",
        description="attention backend; auto: cpu on CPU, triton on CUDA (gathered without the "
        "package triton, and then not batch-invariant); dense is the oracle",
    )
    tensor_parallel_size: int = Field(1, ge=1, le=64, description="ranks that share one model")
    collectives: Literal["shm", "gloo"] = Field(
        "shm",
        description="how ranks on CPU add up their parts; shm falls back to gloo where it is not "
        "possible",
    )
    threads: int = Field(1, ge=1, le=256, description="torch threads per rank")
    device: Literal["cpu", "cuda"] = Field("cpu", description="torch device of the ranks")
    cache_prefixes: bool = Field(
        default=True, description="share full blocks between requests of one scope"
    )


class PoolConfig(Node):
    """A pool of equal workers."""

    replicas: int = Field(1, ge=0, le=1024, description="workers in the pool")
    num_cpus: float = Field(0.5, ge=0, description="CPUs Ray reserves for one worker")
    num_gpus: float = Field(0.0, ge=0, description="GPUs Ray reserves for one worker of one rank")
    rank_num_cpus: float = Field(
        1.0, ge=0, description="CPUs Ray reserves for each of several ranks, beside num_cpus"
    )
    rank_num_gpus: float = Field(
        0.0, ge=0, description="GPUs Ray reserves for each of several ranks"
    )
    price_per_hour: float = Field(
        0.0,
        ge=0,
        le=1e9,
        description="what one worker costs you an hour, in your currency; for the cost per million "
        "tokens in `baton_pool_price_per_hour`",
    )
    node_label: str = Field(
        "", description="value of the node label baton.role a worker needs; empty: any node"
    )
    engine: EngineConfig = Field(
        default_factory=EngineConfig, description="the engine of each worker"
    )


class OwnPoolsConfig(Node):
    """Pools that one tier has for itself."""

    prefill: PoolConfig | None = Field(
        None,
        description="workers that compute prompts of this tier alone, with the settings of "
        "`pools.prefill`; none: it uses the shared ones",
    )
    decode: PoolConfig | None = Field(
        None,
        description="workers that compute outputs of this tier alone, with the settings of "
        "`pools.decode`; none: it uses the shared ones",
    )


class PoolsConfig(Node):
    """The pools. With `colocated`, the decode pool does both phases and prefill has none."""

    prefill: PoolConfig = Field(
        default_factory=PoolConfig, description="workers that compute prompts"
    )
    decode: PoolConfig = Field(
        default_factory=PoolConfig, description="workers that compute outputs"
    )
