"""Requests of tiers that hold a permit until a test lets them go."""

import asyncio

from core.config import TierConfig
from core.types import GenerateRequest, SamplingParams

TIERS = {
    "high": TierConfig(),
    "low": TierConfig(delay_s=60.0, max_running_share=0.75, tenant_weights={"a": 2}),
}


def in_tier(tier, tenant="t", n=1):
    sampling = SamplingParams(n=n)
    return GenerateRequest("r", "m", (1,), sampling, 1, 1e9, tenant=tenant, tier=tier)


async def hold(admission, request, log, until):
    """Note whose permit it is, and give it back then."""
    async with admission.permit(request):
        log.append(request.tenant)
        await until.wait()


async def take(admission, request):
    """Give the permit back at once."""
    async with admission.permit(request):
        pass


async def started(admission, log, until, *requests):
    """Tasks that hold a permit until then, each after its turn to join."""
    tasks = []
    for request in requests:
        tasks.append(asyncio.create_task(hold(admission, request, log, until)))
        await asyncio.sleep(0)
    return tasks
