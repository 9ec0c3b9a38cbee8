"""The frozen configuration tree and its sources: defaults, YAML, `BATON_*`, flags; later wins.

Owns every knob, with unit and meaning, and the only reading of the environment below the command
line. Does not know what a component does with its node.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from core.addresses import bare_host
from core.config_file import read_file
from core.errors import ConfigError
from core.references import is_reference

Port = Annotated[int, Field(ge=0, le=65535)]
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s*]+)$")]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
MIN_KEY_CHARACTERS = 16
MAX_SEED_KEY_BYTES = 64


class Node(BaseModel):
    """A frozen group of settings; unknown keys are errors, and no error quotes a value."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _read_lists(cls, tree: Any) -> Any:  # noqa: ANN401 - whatever somebody wrote
        """A list may be one string, as environment variables are: `shm,grpc`."""
        if not isinstance(tree, dict):
            return tree
        lists = {
            name
            for name, field in cls.model_fields.items()
            if get_origin(field.annotation) is tuple
        }
        return {
            name: [part.strip() for part in value.split(",")]
            if name in lists and isinstance(value, str)
            else value
            for name, value in tree.items()
        }


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
    attention: Literal["auto", "cpu", "gathered", "dense"] = Field(
        "auto",
        description="attention backend; auto: cpu on CPU, gathered on CUDA; dense is the oracle",
    )
    tensor_parallel_size: int = Field(1, ge=1, le=64, description="ranks that share one model")
    collectives: Literal["shm", "gloo"] = Field(
        "shm",
        description="how ranks on CPU add up their parts; shm falls back to gloo where it is not "
        "possible",
    )
    threads: int = Field(1, ge=1, le=256, description="torch threads per rank")
    device: Literal["cpu", "cuda"] = Field("cpu", description="torch device of the ranks")
    is_prefix_cache_on: bool = Field(
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
    node_label: str = Field(
        "", description="value of the node label baton.role a worker needs; empty: any node"
    )
    engine: EngineConfig = Field(
        default_factory=EngineConfig, description="the engine of each worker"
    )


class PoolsConfig(Node):
    """The pools. With `colocated`, the decode pool does both phases and prefill has none."""

    prefill: PoolConfig = Field(
        default_factory=PoolConfig, description="workers that compute prompts"
    )
    decode: PoolConfig = Field(
        default_factory=PoolConfig, description="workers that compute outputs"
    )


class PlacementConfig(Node):
    """How a request finds its workers."""

    path: Literal["auto", "pd", "local"] = Field(
        "auto", description="force a path, or choose by cost"
    )
    local_below_tokens: int = Field(
        32,
        ge=0,
        description="auto: a prompt of which the local worker must compute fewer tokens than "
        "this stays local; without a prefix index, every token of a prompt counts",
    )


class TransferConfig(Node):
    """The hand-over of KV."""

    transports: tuple[Literal["shm", "grpc", "gloo", "nccl", "nixl"], ...] = Field(
        ("shm", "grpc"),
        min_length=1,
        description="ways for KV, best first; a pair takes the first it has in common",
    )
    frame_bytes: int = Field(
        1 << 20, ge=4096, le=1 << 24, description="frames are coalesced up to this size"
    )
    copy_threads: int = Field(
        1, ge=1, le=16, description="cores that copy and verify what arrives at one worker"
    )
    lease_s: Seconds = Field(5.0, description="silence after which source blocks are freed")
    park_s: Seconds = Field(
        1.0, description="how long an unknown transfer id may wait for its Submit"
    )
    reserve_wait_s: Seconds = Field(
        10.0, description="how long decode lets a transfer wait for free blocks"
    )
    open_timeout_s: Seconds = Field(5.0, description="longest wait for the sender's first answer")


class RouterConfig(Node):
    """The doors and the orchestrator."""

    replicas: int = Field(1, ge=1, le=64, description="router processes")
    num_cpus: float = Field(0.5, ge=0, description="CPUs Ray reserves for one router")
    host: str = Field("127.0.0.1", description="address both doors bind")
    http_port: Port = Field(8000, description="HTTP door; 0: any free port")
    grpc_port: Port = Field(9000, description="gRPC door; 0: any free port")
    cors_origins: tuple[Origin, ...] = Field(
        (), description="whose pages may call the HTTP door from a browser; *: anybody's"
    )
    max_body_bytes: int = Field(4 << 20, ge=1024, description="longest HTTP body or gRPC message")
    max_connections: int = Field(
        4096,
        ge=1,
        description="HTTP connections at once per router; fewer where descriptors are scarce",
    )
    max_connections_per_address: int = Field(
        0, ge=0, description="those of one address; 0: three quarters of them"
    )
    max_running: int = Field(256, ge=1, description="outputs in flight per router: requests x n")
    max_queued: int = Field(1024, ge=0, description="requests that may wait for a permit")
    max_queued_tokens: int = Field(
        1 << 22, ge=1, description="prompt tokens of all requests that wait for a permit"
    )
    queue_wait_s: Seconds = Field(30.0, description="longest wait for a permit")
    deadline_s: Seconds = Field(300.0, description="time limit of a request that names none")
    max_fault_attempts: int = Field(
        3, ge=0, le=10, description="attempts of a request caused by faults, after the first"
    )
    retry_burst: int = Field(
        1024, ge=1, description="fault attempts the whole cluster may start at once"
    )
    retry_per_s: float = Field(
        50.0, gt=0, description="fault attempts per second the cluster may start in the long run"
    )
    slow_reader_s: Seconds = Field(
        30.0, description="silence of a client with output waiting after which it is cut off"
    )
    credit_positions: int = Field(
        256, ge=1, description="positions a worker may run ahead of the client"
    )
    max_prompt_logprobs: int = Field(
        1 << 18, ge=1, description="prompt tokens x (prompt_logprobs + 1) of one request"
    )
    canary_interval_s: Seconds = Field(
        10.0, description="time between canary requests behind /ready"
    )
    tokenize_timeout_s: Seconds = Field(
        5.0, description="longest time for rendering and encoding one prompt"
    )
    tokenizer_processes: int = Field(2, ge=1, le=64, description="processes that tokenize")
    chat_template_kwargs: tuple[str, ...] = Field(
        ("enable_thinking", "thinking", "reasoning_effort", "custom_instructions"),
        description="names a request may set in chat_template_kwargs",
    )
    trust_request_chat_template: bool = Field(
        default=False, description="let requests bring a chat_template"
    )
    body_timeout_s: Seconds = Field(30.0, description="longest time for receiving one HTTP body")
    keep_alive_s: Seconds = Field(
        10.0, description="silence after which a stream gets a comment line"
    )
    is_strict: bool = Field(
        default=False, description="refuse unknown request fields instead of ignoring them"
    )
    has_request_log: bool = Field(default=True, description="an event for each request and refusal")


class RedisConfig(Node):
    """The advisory store. Losing it costs cache hits across workers, nothing else."""

    url: str = Field(
        "",
        repr=False,
        description="redis://, rediss:// or unix://, or file:PATH or env:NAME that hold it; empty: "
        "one is started for this machine, none for several",
    )
    is_on: bool = Field(default=True, description="false: run without a store")


class SecurityConfig(Node):
    """Who may come in, and how the inside is closed."""

    api_keys: str = Field(
        "", description="file of hashed keys (`baton keys add`); empty: doors on loopback, anybody"
    )
    tls_dir: str = Field(
        "", description="certificates of `baton certs`: mutual TLS between routers and workers"
    )
    door_certificate: str = Field("", description="PEM chain of both doors; empty: plain text")
    door_key: str = Field("", description="PEM key of both doors")
    cluster_key: str = Field(
        "",
        repr=False,
        description="secret of this cluster's processes, at least 16 characters, which keys the "
        "names of KV blocks and, without TLS, opens the ports inside; file:PATH and env:NAME name "
        "it; empty: made at each start",
    )
    trusts_network: bool = Field(
        default=False, description="allow plain text inside a cluster of several machines"
    )
    production: bool = Field(default=False, description="no reflection, no /docs")


class TracingConfig(Node):
    """OpenTelemetry spans, with W3C trace context through doors and workers."""

    otlp_endpoint: str = Field(
        "", description="OTLP/gRPC collector, like http://localhost:4317; empty: no spans"
    )
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="share of requests traced when the caller did not decide"
    )


class LogConfig(Node):
    """What every process says on standard error."""

    format: Literal["auto", "text", "json"] = Field(
        "auto", description="one line an event; auto: text on a terminal, JSON elsewhere"
    )
    level: Literal["info", "warning", "error"] = Field("info", description="the least that is told")


class BatonConfig(Node):
    """The whole tree."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="what is served")
    router: RouterConfig = Field(default_factory=RouterConfig, description="doors and orchestrator")
    pools: PoolsConfig = Field(default_factory=PoolsConfig, description="workers")
    placement: PlacementConfig = Field(
        default_factory=PlacementConfig, description="who serves what"
    )
    transfer: TransferConfig = Field(default_factory=TransferConfig, description="KV hand-over")
    redis: RedisConfig = Field(default_factory=RedisConfig, description="advisory store")
    tracing: TracingConfig = Field(default_factory=TracingConfig, description="spans")
    log: LogConfig = Field(default_factory=LogConfig, description="events on standard error")
    security: SecurityConfig = Field(
        default_factory=SecurityConfig, description="keys and certificates"
    )
    colocated: bool = Field(default=False, description="one pool does both phases")
    seed_key: str = Field(
        "",
        repr=False,
        description="secret of this cluster's routers, 16 to 64 bytes, which turns request ids "
        "into seeds; file:PATH and env:NAME name it; empty: made at each start",
    )

    @model_validator(mode="after")
    def _doors_are_closed(self) -> BatonConfig:
        security = self.security
        if not security.api_keys and not is_loopback(self.router.host):
            raise ValueError(
                f"router.host is {self.router.host}, which others can reach, and "
                "security.api_keys is empty; make keys with `baton keys add`, or bind 127.0.0.1"
            )
        if self.router.http_port and self.router.http_port == self.router.grpc_port:
            raise ValueError(
                f"router.http_port and router.grpc_port are both {self.router.http_port}; "
                "make them different"
            )
        if bool(security.door_certificate) != bool(security.door_key):
            raise ValueError(
                "security.door_certificate and security.door_key go together; set both or none"
            )
        # Checked here and not at the fields, whose messages would show the value.
        check_key("security.cluster_key", security.cluster_key)
        check_key("seed_key", self.seed_key)
        return self

    @model_validator(mode="after")
    def _pair_fits(self) -> BatonConfig:
        prefill, decode = self.pools.prefill, self.pools.decode
        if prefill.replicas + decode.replicas == 0:
            raise ValueError(
                "pools: prefill.replicas and decode.replicas are both 0; start at least one worker"
            )
        if self.colocated and self.placement.path == "pd":
            raise ValueError("placement.path is pd but colocated has one pool; use auto or local")
        if self.placement.path == "pd" and 0 in (prefill.replicas, decode.replicas):
            raise ValueError(
                "placement.path is pd but a pool has 0 replicas; give both pools at least 1"
            )
        sizes = prefill.engine.block_size_tokens, decode.engine.block_size_tokens
        if not self.colocated and max(sizes) % min(sizes):
            raise ValueError(
                f"pools.prefill.engine.block_size_tokens is {sizes[0]}, "
                f"pools.decode.engine.block_size_tokens is {sizes[1]}, and KV goes only between "
                "blocks that divide one another; make one a multiple of the other"
            )
        return self


def check_key(name: str, secret: str) -> None:
    """Refuse a key that can be guessed; one that is named only is checked where it is read.

    Raises:
        ValueError: It is too short, or too long for the hash.
    """
    if is_reference(secret):
        return
    if 0 < len(secret) < MIN_KEY_CHARACTERS:
        raise ValueError(
            f"{name} has {len(secret)} characters and can be guessed; use "
            f"{MIN_KEY_CHARACTERS} or more, or leave it empty to have one made"
        )
    if name == "seed_key" and len(secret.encode()) > MAX_SEED_KEY_BYTES:
        raise ValueError(
            f"seed_key has {len(secret.encode())} bytes, the hash takes at most "
            f"{MAX_SEED_KEY_BYTES}"
        )


def is_loopback(host: str) -> bool:
    """Can only this machine reach an address?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare_host(host)).is_loopback
    except ValueError:
        return False


def known_keys(node: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Walk the tree's leaves: dotted key and field."""
    for name, info in node.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from known_keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Read `BATON_ROUTER__HTTP_PORT=8001` as `router.http_port: 8001`."""
    tree: dict[str, Any] = {}
    for name, value in sorted(environment.items()):
        if name.startswith("BATON_"):
            set_key(tree, name.removeprefix("BATON_").lower().replace("__", "."), value)
    return tree


def set_key(tree: dict[str, Any], dotted: str, value: object) -> None:
    """Set one leaf of a nested mapping."""
    *parents, leaf = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"config key {dotted}: {parent} is a value, not a group")
    tree[leaf] = value


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` on top, group by group."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = (
            merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def load_config(
    path: Path | None = None,
    flags: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> BatonConfig:
    """Build the tree from its four sources.

    Raises:
        ConfigError: Names every wrong key, with the nearest known one.
    """
    tree = read_file(path) if path is not None else {}
    tree = merge(tree, from_environment(os.environ if environment is None else environment))
    for dotted, value in (flags or {}).items():
        set_key(tree, dotted, value)
    try:
        return BatonConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    lines = []
    fields = dict(known_keys(BatonConfig))
    keys = list(fields)
    groups = sorted(
        {key.rpartition(".")[0] for key in keys} | {key.partition(".")[0] for key in keys} - {""}
    )
    problems = error.errors()
    wrong = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    for problem in problems:
        if problem["loc"] and problem["loc"] in wrong:
            continue  # what is wrong within it is told
        said = problem["msg"].removeprefix("Value error, ")
        dotted = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(dotted, keys + groups, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"unknown key {dotted}{hint}")
        else:
            got = f" (got {problem['input']!r})" if _may_show(fields, dotted) else ""
            lines.append(f"{dotted}: {said}{got}" if dotted else said)
    return "config is not valid: " + "; ".join(lines)


def _may_show(fields: Mapping[str, FieldInfo], dotted: str) -> bool:
    """Only a setting's value may, or a part of one: a whole group may have a secret in it."""
    return any(info.repr and f"{dotted}.".startswith(f"{key}.") for key, info in fields.items())
