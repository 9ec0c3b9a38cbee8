"""Who goes first: one order for blocks, budget and places in a step.

Owns the rule that turns a request and its arrival into a place in line. Does not know queues,
blocks or steps.

A place is an instant, and a lower priority is a later one. So everything ages by itself: whoever
has waited as long as the delay of its tier stands level with a newcomer that has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from core.scopes import tenant_of
from core.types import GenerateRequest


class Order(Protocol):
    """Gives every request its place; `engine.scheduling.tenant_turns` moves it up."""

    def delay_of(self, request: GenerateRequest) -> float:
        """Return by how much a request's tier stands back (seconds).

        Who stands back less takes blocks from who stands back more and is due later.
        """
        ...

    def due_at(self, request: GenerateRequest, arrived_at: float) -> float:
        """Return the instant at which a request is due; the earliest goes first.

        Args:
            request: The request.
            arrived_at: When it reached its router, on this process's clock (seconds).
        """
        ...

    def weight_of(self, request: GenerateRequest) -> float:
        """Return how many turns a request's tenant has for each of an unnamed one."""
        ...


@dataclass(frozen=True, slots=True)
class ArrivalOrder:
    """First come, first served, but for tiers that stand back and tenants that take turns."""

    delay_s: Mapping[str, float] = field(default_factory=dict)
    """By tier: how much earlier its requests must have come to go before one of an unnamed tier."""
    tenant_weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By tier and tenant; 1 for those that are not named."""

    def delay_of(self, request: GenerateRequest) -> float:
        """See `Order`."""
        return self.delay_s.get(request.tier, 0.0)

    def due_at(self, request: GenerateRequest, arrived_at: float) -> float:
        """See `Order`."""
        return arrived_at + self.delay_of(request)

    def weight_of(self, request: GenerateRequest) -> float:
        """See `Order`."""
        return self.tenant_weights.get(request.tier, {}).get(tenant_of(request.scope), 1.0)
