"""Tiers: classes of requests that differ in how long they may wait and how much they may take.

Owns the settings of a tier, the tiers that every cluster has, and what in them contradicts itself
or the limits of a router. Does not know who is in a tier.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf
from typing import Annotated, Any

from pydantic import Field

from core.config.node import Node, Seconds
from core.config.pools import SHARED, ModelConfig, OwnPoolsConfig
from core.config.router import RouterConfig
from core.prices import Prices
from core.types import CANARY_TIER, DEFAULT_TIER

MAX_TIERS = 16
"""Each is a label of several metrics."""
MAX_PRICE = 1e9
RESERVED = ("auto", DEFAULT_TIER, CANARY_TIER, SHARED)
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
Weight = Annotated[float, Field(ge=0.001, le=1000)]


class TierConfig(Node):
    """One tier; limits are those of each router, but for those of a key."""

    delay_s: float = Field(
        0.0,
        ge=0,
        le=86_400,
        description="its requests are ordered as if they had come this much later: the tier with "
        "the smallest delay goes first, and a request that has waited its delay is level with a "
        "newcomer of a tier that has none",
    )
    max_running_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="most of router.max_running that it may take; always one permit at least",
    )
    max_queued: int | None = Field(
        None, ge=0, description="its requests that may wait for a permit; none: router.max_queued"
    )
    max_queued_tokens: int | None = Field(
        None, ge=1, description="prompt tokens of them all; none: router.max_queued_tokens"
    )
    queue_wait_s: Seconds | None = Field(
        None, description="longest wait for a permit; none: router.queue_wait_s"
    )
    overflow_to: str = Field(
        "",
        description="tier in which a request is served that finds no room or time in this one; it "
        "must stand back further; empty: such a request is refused",
    )
    max_ttft_s: float = Field(
        0.0,
        ge=0,
        description="longest predicted wait for other requests before the first token; beyond it "
        "a request is refused at once; 0: queue_wait_s and its deadline alone limit it",
    )
    slo_ttft_s: float = Field(
        0.0,
        ge=0,
        description="longest time to the first token that meets its SLO; it counts in "
        "`baton_slo_requests_total` and refuses nobody; 0: any",
    )
    slo_tpot_s: float = Field(
        0.0,
        ge=0,
        description="longest mean time of each further token that meets its SLO; 0: any",
    )
    slo_objective: float = Field(
        0.99,
        gt=0,
        lt=1,
        description="share of its requests that should meet its SLO; alerts measure by it",
    )
    max_prompt_tokens: int = Field(
        0, ge=0, description="longest prompt (tokens); 0: what the model takes"
    )
    requests_per_minute: int = Field(
        0, ge=0, description="requests of one API key in any minute, over all routers; 0: no limit"
    )
    tokens_per_minute: int = Field(
        0,
        ge=0,
        description="prompt tokens and max_tokens of one API key's requests in any minute, over "
        "all routers; 0: no limit",
    )
    tokens_at_once: int = Field(
        0,
        ge=0,
        description="prompt tokens and max_tokens of one API key's requests that run or wait at "
        "once, in each router: what they may hold of the KV pools; 0: no limit",
    )
    prompt_price_per_mtok: float = Field(
        0.0,
        ge=0,
        le=MAX_PRICE,
        description="what a million prompt tokens cost the caller, in your currency; answers and "
        "`baton_cost_total` then say what each request cost; all prices 0: nothing is said",
    )
    cached_price_per_mtok: float | None = Field(
        None,
        ge=0,
        le=MAX_PRICE,
        description="the same for those that a prefix cache had; none: as for the others",
    )
    output_price_per_mtok: float = Field(
        0.0, ge=0, le=MAX_PRICE, description="the same for output tokens"
    )
    tenant_weights: dict[str, Weight] = Field(
        default_factory=dict,
        description="by tenant: turns at its permits for each turn of a tenant that is not named",
    )
    cache_weight: Weight = Field(
        1.0,
        description="how much longer than others' its blocks stay in the storage tiers of "
        "prefix_cache",
    )
    pools: OwnPoolsConfig = Field(
        default_factory=OwnPoolsConfig, description="pools of its own, beside the shared ones"
    )
    spill_to: tuple[str, ...] = Field(
        (),
        description="whose pools its requests may use, in this order, when its own have no worker "
        "that can take one, or would be late (max_ttft_s; 0: slo_ttft_s) and the other earlier: "
        "names of tiers, or shared",
    )

    @property
    def prices(self) -> Prices | None:
        """Its prices; None if it names none."""
        cached = self.cached_price_per_mtok
        prompt = self.prompt_price_per_mtok
        prices = Prices(prompt, prompt if cached is None else cached, self.output_price_per_mtok)
        return prices if prices != Prices(0.0, 0.0, 0.0) else None


BUILT_IN: Mapping[str, Mapping[str, float]] = {
    "interactive": {},
    "standard": {"delay_s": 5.0},
    "batch": {"delay_s": 120.0, "max_running_share": 0.75},
}
"""The tiers that every cluster has, and in which settings they differ from a new one."""


def default_tiers() -> dict[str, TierConfig]:
    """Make the tiers of a config that says nothing of them."""
    return {name: TierConfig.model_validate(given) for name, given in BUILT_IN.items()}


def with_built_in(given: Any) -> Any:  # noqa: ANN401 - whatever somebody wrote
    """Add the tiers and settings that are there without being given."""
    # Pydantic refuses what is no mapping, in words that name the group.
    if not isinstance(given, dict):
        return given
    tiers: dict[Any, Any] = {**BUILT_IN, **given}
    for name, own in BUILT_IN.items():
        if isinstance(tiers[name], dict):
            tiers[name] = {**own, **tiers[name]}
    return tiers


def check_tiers(
    tiers: Mapping[str, TierConfig], default: str, router: RouterConfig, model: ModelConfig
) -> None:
    """Refuse tiers that cannot be meant.

    Raises:
        ValueError: Names the setting, its value and what would fit.
    """
    if len(tiers) > MAX_TIERS:
        raise ValueError(
            f"tiers has {len(tiers)} entries, the limit is {MAX_TIERS}: each is a label of metrics"
        )
    if default not in tiers:
        raise ValueError(f"default_tier is {default[:40]!r}, must be one of {', '.join(tiers)}")
    for name, tier in tiers.items():
        if not _NAME.fullmatch(name) or name in RESERVED:
            raise ValueError(
                f"tiers has the name {name[:40]!r}; use 1 to 32 lower-case letters, digits, dashes "
                f"or underscores, a letter first, and none of {', '.join(RESERVED)}"
            )
        _check_limits(f"tiers.{name}", tier, router, model)
        if tier.overflow_to:
            _check_overflow(name, tiers)


def _check_overflow(name: str, tiers: Mapping[str, TierConfig]) -> None:
    tier = tiers[name]
    other = tiers.get(tier.overflow_to)
    if other is None:
        raise ValueError(
            f"tiers.{name}.overflow_to is {tier.overflow_to[:40]!r}, must be one of "
            f"{', '.join(tiers)}"
        )
    # So that nobody goes in a circle, and nobody gets more than its key may have.
    if other.delay_s <= tier.delay_s:
        raise ValueError(
            f"tiers.{name}.overflow_to is {tier.overflow_to}, whose delay_s is "
            f"{other.delay_s:g}: it must be more than {tier.delay_s:g}, the delay_s of {name}"
        )
    if 0 < other.max_prompt_tokens < (tier.max_prompt_tokens or inf):
        raise ValueError(
            f"tiers.{name}.overflow_to is {tier.overflow_to}, which takes prompts of "
            f"{other.max_prompt_tokens} tokens, and {name} longer ones; raise "
            f"tiers.{tier.overflow_to}.max_prompt_tokens or lower tiers.{name}.max_prompt_tokens"
        )


def _check_limits(name: str, tier: TierConfig, router: RouterConfig, model: ModelConfig) -> None:
    bounds = {
        "max_queued": ("router.max_queued", router.max_queued),
        "max_queued_tokens": ("router.max_queued_tokens", router.max_queued_tokens),
        "queue_wait_s": ("router.deadline_s", router.deadline_s),
        "max_ttft_s": ("router.deadline_s", router.deadline_s),
    }
    if model.max_model_len:
        bounds["max_prompt_tokens"] = ("model.max_model_len", model.max_model_len)
    for field, (bound, limit) in bounds.items():
        value = getattr(tier, field)
        if value is not None and value > limit:
            raise ValueError(
                f"{name}.{field} is {value:.10g}, which {bound} = {limit:.10g} lets nobody "
                "reach; lower the one or raise the other"
            )
    # With one token of output at least.
    least = max(tier.max_prompt_tokens, 1) + 1
    for field in ("tokens_per_minute", "tokens_at_once"):
        limit = getattr(tier, field)
        if 0 < limit < least:
            raise ValueError(
                f"{name}.{field} is {limit}, and a request that the tier allows may need {least}; "
                "raise it to that, or set it to 0 for no limit"
            )
    if tier.max_queued_tokens is not None and tier.max_prompt_tokens > tier.max_queued_tokens:
        raise ValueError(
            f"{name}.max_prompt_tokens is {tier.max_prompt_tokens} and max_queued_tokens "
            f"{tier.max_queued_tokens}: such a prompt could never wait; raise the second or lower "
            "the first"
        )
