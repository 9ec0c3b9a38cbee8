"""Whether tenants of one tier share it by their weights, while each asks for all there is.

Owns the tenants and the shares. Permits are few, so that they are what tenants compete for.
"""

import asyncio

from benchmarks.tiers.cluster import NUM_ROUTERS, TieredCluster
from benchmarks.tiers.load import closed_loop, counts, latencies

PERMITS = 8
"""Of each router."""
PROMPT_TOKENS = 20
OUTPUT_TOKENS = 8
LONG_OUTPUT_TOKENS = 32
ALL = NUM_ROUTERS * PERMITS
"""Outstanding requests of a tenant that could take every permit."""
RAMP_SHARE = 0.25
"""Of the answers, before all tenants are there."""
NUM_TURNS = 20
"""For each unit of weight: with fewer, chance is more than the tolerance."""
MAX_TIMES = 4
"""Of the given seconds; a mix ends then, however few its answers."""
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
    """What each tenant of a mix got of the answers after the ramp."""
    wanted = NUM_TURNS * sum(WEIGHTS.get(tenant, 1) for tenant in mix) / (1 - RAMP_SHARE)
    ended = []

    def ends(outcome):
        if outcome.is_ok:
            ended.append(outcome.ended_at)
        return len(ended) >= wanted

    async def loop(i, tenant):
        outstanding, output = mix[tenant]
        clients = cluster.clients(tenant, 10 * i)
        time_limit_s = MAX_TIMES * seconds
        return await closed_loop(clients, PROMPT_TOKENS, output, outstanding, time_limit_s, ends)

    loops = [loop(i, tenant) for i, tenant in enumerate(mix)]
    outcomes = dict(zip(mix, await asyncio.gather(*loops), strict=True))
    began = ended[int(RAMP_SHARE * len(ended))] if ended else 0.0
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
        ratios = [(row["share_of_tokens"] or 0.0) / row["fair_share"] for row in rows.values()]
        shown = f"{min(ratios):.2f} to {max(ratios):.2f}"
        is_met = min(ratios) >= 0.9 and max(ratios) <= 1.1
        yield f"{name}: tokens of a fair share", shown, "0.9 to 1.1", is_met
