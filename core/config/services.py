"""What a cluster is connected to: its store, a collector of spans, a log.

Owns these settings. Does not know clients.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from core.config.node import Node


class RedisConfig(Node):
    """The advisory store. Losing it costs cache hits across workers, and quotas their exactness."""

    url: str = Field(
        "",
        repr=False,
        description="redis://, rediss:// or unix://, or file:PATH or env:NAME that hold it; empty: "
        "one is started for this machine, none for several",
    )
    enabled: bool = Field(default=True, description="false: run without a store")


class TracingConfig(Node):
    """OpenTelemetry spans, with W3C trace context through routers and workers."""

    otlp_endpoint: str = Field(
        "", description="OTLP/gRPC collector, like http://localhost:4317; empty: no spans"
    )
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="share of requests traced when the caller did not decide"
    )


class LogConfig(Node):
    """What every process logs to standard error."""

    format: Literal["auto", "text", "json"] = Field(
        "auto", description="one line an event; auto: text on a terminal, JSON elsewhere"
    )
    level: Literal["info", "warning", "error"] = Field(
        "info", description="events below it are dropped"
    )
