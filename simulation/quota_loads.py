"""Limits of keys, for a part of the trials: who has which key, and what befalls their store.

Owns their drawing, with randomness of its own. Does not know how a plan is carried out.
"""

from __future__ import annotations

import random
from dataclasses import replace

from core.config import TierConfig
from simulation.faults.kinds import Fault, Part, draw
from simulation.metering import estimate_of
from simulation.plan import METERED, PlannedRequest, TrialPlan
from simulation.quota_record import FREE

METERED_SHARE = 0.25
"""Of all trials: a request that is refused tests nothing else."""
MINUTE_S = 61.0
"""Whoever is refused comes back so much later, and some faults then, too."""
KEYS = ["key1", "key1", "key2", ""]


def with_quotas(rng: random.Random, plan: TrialPlan, num_faults: int, within_s: float) -> TrialPlan:
    """Give a part of the plans keys with limits, of one to three routers.

    Args:
        rng: Of these draws alone.
        plan: Without limits.
        num_faults: At most, of their store and of routers' clocks.
        within_s: When each begins, within the load.
    """
    if rng.random() >= METERED_SHARE:
        return plan
    requests = tuple(_with_key(rng, planned) for planned in plan.requests)
    tier = _limits(rng, requests)
    routers = rng.choice([1, 2, 2, 3])
    router = plan.shape.router.model_copy(update={"replicas": routers})
    shape = replace(
        plan.shape,
        routers=routers,
        router=router,
        tiers={**plan.shape.tiers, METERED: tier},
        has_quota_store=rng.random() < 0.9,
    )
    count = round(num_faults * rng.choice([0.0, 0.5, 1.0])) if shape.has_quota_store else 0
    drawn = [_later(rng, fault) for fault in draw(rng, count, within_s, part=Part.QUOTAS)]
    faults = tuple(sorted((*plan.faults, *drawn), key=lambda fault: fault.at_s))
    return replace(plan, shape=shape, requests=requests, faults=faults)


def _with_key(rng: random.Random, planned: PlannedRequest) -> PlannedRequest:
    key = rng.choice(KEYS)
    is_length_open = rng.random() < 0.2
    is_named = rng.random() < 0.7
    is_repeated = rng.random() < 0.2
    if not key:
        return planned
    return replace(
        planned,
        key=key,
        is_length_open=is_length_open,
        is_named=is_named,
        is_repeated=is_repeated and is_named,
    )


def _limits(rng: random.Random, requests: tuple[PlannedRequest, ...]) -> TierConfig:
    """Draw limits that are much too small for the load, or just so, or never met."""
    metered = [planned for planned in requests if planned.key]
    costs = [estimate_of(planned, FREE).tokens for planned in metered]
    # Of a named length, none must be more than a whole minute's limit: that would be a 400.
    named = [c for c, planned in zip(costs, metered, strict=True) if not planned.is_length_open]
    least = max([*named, *(len(planned.prompt) + 1 for planned in metered)], default=1)
    tokens = max(least, int(sum(costs) * rng.choice([0.15, 0.3, 2.0])))
    num_requests = max(1, int(len(metered) * rng.choice([0.2, 0.4, 2.0])))
    has_tokens, has_requests = rng.choice([(True, False), (True, True), (False, True)])
    return TierConfig(
        requests_per_minute=num_requests * has_requests, tokens_per_minute=tokens * has_tokens
    )


def _later(rng: random.Random, fault: Fault) -> Fault:
    return replace(fault, at_s=fault.at_s + rng.choice([0.0, 0.0, MINUTE_S]))
