"""What a router listens on, takes, and how it places requests.

Owns the routers' addresses, limits and times, and the rules of placement. Does not know servers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from core.config.node import Node, Port, Seconds

Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s*]+)$")]


class RouterConfig(Node):
    """The servers and the orchestrator."""

    replicas: int = Field(1, ge=1, le=64, description="router processes")
    num_cpus: float = Field(0.5, ge=0, description="CPUs Ray reserves for one router")
    host: str = Field("127.0.0.1", description="address that the HTTP and gRPC servers bind")
    http_port: Port = Field(8000, description="port of the HTTP server; 0: any free one")
    grpc_port: Port = Field(9000, description="port of the gRPC server; 0: any free one")
    cors_origins: tuple[Origin, ...] = Field(
        (), description="whose pages may call the HTTP server from a browser; *: anybody's"
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
    public_prompts: str = Field(
        "",
        description="file with a JSON list of at most 64 system prompts, in 1 MiB, whose KV blocks "
        "all tenants share; what follows them, and any other text, stays a tenant's own",
    )
    trust_request_chat_template: bool = Field(
        default=False, description="let requests bring a chat_template"
    )
    body_timeout_s: Seconds = Field(30.0, description="longest time for receiving one HTTP body")
    keep_alive_s: Seconds = Field(
        10.0, description="silence after which a stream gets a comment line"
    )
    strict: bool = Field(
        default=False, description="refuse unknown request fields instead of ignoring them"
    )
    max_explained: int = Field(
        2048,
        ge=1,
        le=65_536,
        description="ended requests of which a router keeps why they went where they did, for "
        "`baton explain request`",
    )
    log_requests: bool = Field(default=True, description="an event for each request and refusal")


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
    min_local_saving: float = Field(
        0.25,
        ge=0,
        le=1,
        description="auto: share of the price of path pd that a longer prompt must save to stay "
        "local; 1: only `local_below_tokens` keeps prompts local",
    )
    peer_fetch: bool = Field(
        default=True,
        description="let a worker fetch what another one has cached of a prompt, where that is "
        "predicted to be cheaper than to compute it",
    )
    prefill_tokens_per_s: float = Field(
        8_000.0,
        gt=0,
        description="speed at which workers compute prompts, until it is measured",
    )
    sequence_tokens: int = Field(
        16,
        ge=1,
        description="what a decoding sequence takes from a prompt that is computed beside it, in "
        "tokens of prompt",
    )
