"""The whole frozen tree of settings.

Owns what groups there are and which settings must fit one another. Does not know where they come
from, nor what a component does with its group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from core.addresses import is_loopback
from core.config.node import Node
from core.config.pools import ModelConfig, PoolsConfig
from core.config.prefix_cache import PrefixCacheConfig
from core.config.router import PlacementConfig, RouterConfig, check_ports
from core.config.security import SecurityConfig, check_key
from core.config.services import LogConfig, RedisConfig, TracingConfig
from core.config.tier_pools import all_pools, check_pools
from core.config.tiers import TierConfig, check_tiers, default_tiers, with_built_in
from core.config.transfer import TransferConfig
from core.tenant_classes import check_tenant_classes


class BatonConfig(Node):
    """The whole tree."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="what is served")
    router: RouterConfig = Field(
        default_factory=RouterConfig, description="servers and orchestrator"
    )
    pools: PoolsConfig = Field(default_factory=PoolsConfig, description="workers")
    placement: PlacementConfig = Field(
        default_factory=PlacementConfig, description="who serves what"
    )
    tiers: dict[str, TierConfig] = Field(
        default_factory=default_tiers,
        description="classes of requests by name; interactive, standard and batch are always there",
    )
    default_tier: str = Field("standard", description="tier of a key that has none of its own")
    tenant_classes: tuple[str, ...] = Field(
        (),
        description="classes that keys may name (`baton keys add --class`), by which some metrics "
        "and traces sum tenants up; default is always there",
    )
    transfer: TransferConfig = Field(default_factory=TransferConfig, description="KV hand-over")
    prefix_cache: PrefixCacheConfig = Field(
        default_factory=PrefixCacheConfig, description="blocks kept below the KV pools"
    )
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

    @field_validator("tiers", mode="before")
    @classmethod
    def _has_built_in_tiers(cls, given: Any) -> Any:  # noqa: ANN401 - whatever somebody wrote
        return with_built_in(given)

    @model_validator(mode="after")
    def _tiers_fit(self) -> BatonConfig:
        check_tiers(self.tiers, self.default_tier, self.router, self.model)
        check_tenant_classes(self.tenant_classes)
        return self

    @model_validator(mode="after")
    def _servers_are_closed(self) -> BatonConfig:
        security = self.security
        if not security.api_keys and not is_loopback(self.router.host):
            raise ValueError(
                f"router.host is {self.router.host}, which others can reach, and "
                "security.api_keys is empty; make keys with `baton keys add`, or bind 127.0.0.1"
            )
        check_ports(self.router)
        if bool(security.door_certificate) != bool(security.door_key):
            raise ValueError(
                "security.door_certificate and security.door_key go together; set both or none"
            )
        # Checked here and not at the fields, whose messages would show the value.
        check_key("security.cluster_key", security.cluster_key)
        check_key("seed_key", self.seed_key)
        return self

    @model_validator(mode="after")
    def _pools_fit(self) -> BatonConfig:
        if self.colocated and self.placement.path == "pd":
            raise ValueError("placement.path is pd but colocated has one pool; use auto or local")
        check_pools(
            all_pools(self.pools, self.tiers, colocated=self.colocated),
            self.tiers,
            colocated=self.colocated,
            must_cross=self.placement.path == "pd",
        )
        return self


def known_keys(node: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Walk the tree's leaves: dotted key and field; a group of groups counts as a leaf, too."""
    for name, info in node.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from known_keys(kind, f"{prefix}{name}.")
            continue
        yield f"{prefix}{name}", info
        if get_origin(kind) is dict and isinstance(inner := get_args(kind)[1], type):
            yield from known_keys(inner, f"{prefix}{name}.NAME.")
