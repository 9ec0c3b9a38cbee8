"""Whether tenants of one tier share it by their weights, while each asks for all there is.

Owns the tenants and the shares. Permits are few, so that they are what tenants compete for.
"""

import asyncio
import time

from benchmarks.tiers.cluster import NUM_ROUTERS, TieredCluster
from benchmarks.tiers.load import closed_loop, counts, latencies

PERMITS = 8
"""Of each router."""
PROMPT_TOKENS = 40
OUTPUT_TOKENS = 16
LONG_OUTPUT_TOKENS = 64
ALL = NUM_ROUTERS * PERMITS
"""Outstanding requests of a tenant that could take every permit."""
RAMP_SHARE = 0.25
WEIGHTS = {f"weight-{weight}": weight for weight in range(1, 11)}


async def measure(step, seconds):
    """Three mixes of tenants, one after the other."""
    tenants = ("modest", "greedy", "short", "long", *WEIGHTS)
    settings = {
        "router.max_running": PERMITS,
        "router.queue_wait_s": 120.0,
        "tiers.standard.tenant_weights": WEIGHTS,
    }
    mixes = {
        "two, one sends 20 times as much": {
            "modest": (ALL, OUTPUT_TOKENS),
            "greedy": (20 * ALL, OUTPUT_TOKENS),
        },
        "ten with weights": dict.fromkeys(WEIGHTS, (ALL, OUTPUT_TOKENS)),
        "two, one asks for 4 times the output": {
            "short": (ALL, OUTPUT_TOKENS),
            "long": (ALL, LONG_OUTPUT_TOKENS),
        },
    }
    found = {}
    async with TieredCluster(dict.fromkeys(tenants, "standard"), **settings) as cluster:
        for name, mix in mixes.items():
            step(f"fairness: {name}")
            found[name] = await shares(cluster, mix, seconds)
    return {"permits_of_each_router": PERMITS, "mixes": found}


async def shares(cluster, mix, seconds):
    """What each tenant of a mix got in the steady part of the time."""
    began = time.monotonic() + RAMP_SHARE * seconds
    loops = [
        closed_loop(cluster.clients(tenant, 10 * i), PROMPT_TOKENS, output, outstanding, seconds)
        for i, (tenant, (outstanding, output)) in enumerate(mix.items())
    ]
    outcomes = dict(zip(mix, await asyncio.gather(*loops), strict=True))
    rows = {}
    for tenant, mine in outcomes.items():
        answers = sum(o.is_ok and o.ended_at >= began for o in mine)
        tokens = answers * (PROMPT_TOKENS + mix[tenant][1])
        figures = {"answers": answers, "tokens": tokens, **counts(mine), **latencies(mine)}
        rows[tenant] = {"weight": WEIGHTS.get(tenant, 1), "outstanding": mix[tenant][0], **figures}
    weights = sum(row["weight"] for row in rows.values())
    for row in rows.values():
        row["fair_share"] = row["weight"] / weights
        for kind in ("answers", "tokens"):
            total = sum(other[kind] for other in rows.values())
            row[f"share_of_{kind}"] = row[kind] / total if total else None
    return rows


def lines(found):
    """Rows of the table: what, figure, target, whether it is met."""
    for name, rows in found["mixes"].items():
        ratios = [row["share_of_tokens"] / row["fair_share"] for row in rows.values()]
        shown = f"{min(ratios):.2f} to {max(ratios):.2f}"
        is_met = min(ratios) >= 0.9 and max(ratios) <= 1.1
        yield f"{name}: tokens of a fair share", shown, "0.9 to 1.1", is_met
