"""How many interactive requests meet their SLO while batch work bursts to ten times its rate.

Owns both loads and the phases, calm and burst in turn. The batch rate of a calm phase is a share of
the capacity that was measured just before, so that the burst is more than the cluster can do.
"""

import asyncio

from benchmarks.tiers.cluster import TieredCluster
from benchmarks.tiers.load import closed_loop, counts, latencies, open_loop

SLO_TTFT_S = 1.0
SLO_TPOT_S = 0.1
CHAT = (40, 16)
CHATS_PER_S = 4.0
BATCH = (400, 32)
CAPACITY_OUTSTANDING = 16
CAPACITY_S = 5.0
CALM_SHARE = 0.25
"""Of the capacity for batch work."""
TIMES = 10
PHASES = ("calm", "burst", "calm", "burst")
MAX_RUNNING = 32
MAX_QUEUED = 128


async def measure(step, seconds):
    settings = {
        "router.max_running": MAX_RUNNING,
        "router.max_queued": MAX_QUEUED,
        "router.queue_wait_s": 10.0,
        "tiers.interactive": {"slo_ttft_s": SLO_TTFT_S, "slo_tpot_s": SLO_TPOT_S},
    }
    rows = []
    async with TieredCluster({"chat": "interactive", "job": "batch"}, **settings) as cluster:
        step("burst: capacity")
        outcomes = await closed_loop(
            cluster.clients("job"), *BATCH, CAPACITY_OUTSTANDING, CAPACITY_S
        )
        capacity = sum(o.is_ok for o in outcomes) / CAPACITY_S
        for name in PHASES:
            step(f"burst: {name}")
            rate = CALM_SHARE * capacity * (TIMES if name == "burst" else 1)
            row = await phase(cluster, rate, seconds)
            rows.append({"phase": name, "batch_rate_per_s": rate, **row})
    return {
        "slo_ttft_s": SLO_TTFT_S,
        "slo_tpot_s": SLO_TPOT_S,
        "interactive_rate_per_s": CHATS_PER_S,
        "batch_capacity_per_s": capacity,
        "phases": rows,
        "attainment": {name: attainment(rows, name) for name in ("calm", "burst")},
    }


async def phase(cluster, batch_rate, seconds):
    before = await cluster.metrics()
    chats, jobs = await asyncio.gather(
        open_loop(cluster.clients("chat"), *CHAT, CHATS_PER_S, seconds),
        open_loop(cluster.clients("job", 10), *BATCH, batch_rate, seconds),
    )
    grown = await cluster.metrics()
    grown.subtract(before)
    met = {
        result: grown["baton_slo_requests_total", "interactive", result]
        for result in ("met", "missed")
    }
    return {
        "interactive": {**counts(chats), **latencies(chats), "met": sum(map(is_met, chats))},
        "batch": {**counts(jobs), **latencies(jobs)},
        "routers_count": met,
    }


def is_met(outcome):
    """As the router counts, but seen by the client."""
    if not outcome.is_ok or outcome.ttft_s > SLO_TTFT_S:
        return False
    further = len(outcome.arrivals) - 1
    return sum(outcome.gaps_s) <= SLO_TPOT_S * further


def attainment(rows, name):
    mine = [row["interactive"] for row in rows if row["phase"] == name]
    return sum(row["met"] for row in mine) / sum(row["sent"] for row in mine)


def lines(found):
    """Rows of the table: what, figure, target, whether it is met."""
    calm, burst = (found["attainment"][name] for name in ("calm", "burst"))
    points = 100 * (calm - burst)
    shown = f"{calm:.1%}, {burst:.1%}"
    yield f"interactive attainment, batch at 1x, at {TIMES}x", shown, "2 points", points <= 2
    for name in ("calm", "burst"):
        rows = [row["interactive"]["ttft_s"] for row in found["phases"] if row["phase"] == name]
        worst = max(row["p99"] for row in rows if row)
        yield f"interactive TTFT p99, {name}, ms", f"{1e3 * worst:.0f}", "", None
    for name in ("calm", "burst"):
        rows = [row["batch"] for row in found["phases"] if row["phase"] == name]
        sent, ok = (sum(row[kind] for row in rows) for kind in ("sent", "ok"))
        yield f"batch answered, {name}", f"{ok} of {sent}", "", None
