"""Whether a key with 1,000 tokens a minute gets 1,000 of two routers, whatever happens meanwhile.

Owns the scenarios, each with a key of its own, and the count of what was granted. A request uses
all that it is charged. Counted is what was granted within any minute, however long it took.
"""

import asyncio
import os
import signal
import time
from collections import Counter

from redis import asyncio as redis_asyncio

from benchmarks.tiers.cluster import NUM_ROUTERS, TieredCluster
from cluster.redis import server as redis_server

LIMIT_TOKENS = 1_000
WINDOW_S = 60.0
USUAL = (10, 90)
"""Letters of the prompt, each a token, and output tokens."""
LONG = (10, 290)
SMALLEST = (1, 1)
NUM_BEFORE = 4
"""Requests before the fault."""
NUM_AFTER = 12
"""More than fit."""
RUNS_S = 0.3
"""A long request runs that long before its router is killed."""
SETTLED_S = 4.0
"""Longer than routers grant only their shares after Redis has come back."""
LOCAL_DECISIONS = ("baton_quota_local_decisions_total",)
WANTED_HEADERS = (
    "retry-after",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
)


def most_in_a_window(granted):
    """The most tokens that were certainly charged within any 60 seconds.

    Args:
        granted: (When it was sent, when its first token came, tokens); charged in between.
    """
    return max(
        (
            sum(cost for sent, came, cost in granted if sent >= began and came <= began + WINDOW_S)
            for began, _, _ in granted
        ),
        default=0,
    )


class Spending:
    """Requests of one key at both routers, and what they were granted."""

    def __init__(self, cluster, tenant):
        self.cluster = cluster
        self.granted = []
        """(When it was sent, when its first token came, tokens) of each."""
        self.refusals = []
        self.others = Counter()
        self._clients = cluster.clients(tenant)

    async def ask(self, router, shape=USUAL):
        """One request; one that is cut off counts as granted, for it was charged."""
        client = self._clients[router]
        outcome = await client.ask(client.body(*shape))
        if outcome.status == 200:
            came = outcome.arrivals[0] if outcome.arrivals else outcome.ended_at
            self.granted.append((outcome.sent_at, came, sum(shape)))
        elif outcome.status == 429:
            self.refusals.append(outcome)
        if not outcome.is_ok and outcome.status != 429:
            self.others[f"{outcome.status} {outcome.code}"] += 1
        return outcome

    async def ask_in_turn(self, num, shape=USUAL):
        for i in range(num):
            await self.ask(i % NUM_ROUTERS, shape)


async def kill_router(spending):
    """While it runs a request of this key."""
    running = asyncio.create_task(spending.ask(0, LONG))
    await asyncio.sleep(RUNS_S)
    router = spending.cluster.router_process(0)
    router.kill()
    outcome = await running
    await spending.ask(1)
    await spending.cluster.ready(0)
    is_new = spending.cluster.router_process(0).pid != router.pid
    return {"router_started_again": is_new, "cut_off": outcome.code}


async def empty_redis(spending):
    client = redis_asyncio.Redis.from_url(spending.cluster.local.config.redis.url)
    is_emptied = await client.flushall()
    await client.aclose()
    return {"emptied": is_emptied}


async def kill_redis(spending):
    """It starts again by itself, empty; until then each router grants its share."""
    server = spending.cluster.local._redis
    os.kill(server.pid, signal.SIGKILL)
    await spending.ask_in_turn(NUM_AFTER)
    await asyncio.sleep(SETTLED_S)
    return {"restarts": server.num_restarts}


SCENARIOS = {
    "no fault": None,
    "a router killed": kill_router,
    "Redis emptied": empty_redis,
    "Redis killed": kill_redis,
}
AT_ONCE = "no fault, all at once"


async def measure(step, seconds):  # noqa: ARG001 - scenarios last as long as they last
    redis_server.RIGHTS += " +flushall"
    tenants = [f"key-{i}" for i in range(len(SCENARIOS) + 1)]
    tier = {"tiers.limited": {"tokens_per_minute": LIMIT_TOKENS}}
    found = {}
    async with TieredCluster(dict.fromkeys(tenants, "limited"), **tier) as cluster:
        step(f"quota: {AT_ONCE}")
        spending = Spending(cluster, tenants.pop())
        asks = (spending.ask(i % NUM_ROUTERS) for i in range(NUM_BEFORE + NUM_AFTER))
        found[AT_ONCE] = await spent(spending, asyncio.gather(*asks))
        for name, fault in SCENARIOS.items():
            step(f"quota: {name}")
            spending = Spending(cluster, tenants.pop())
            found[name] = await spent(spending, sequence(spending, fault))
    return {"limit_tokens": LIMIT_TOKENS, "scenarios": found}


async def sequence(spending, fault):
    await spending.ask_in_turn(NUM_BEFORE)
    seen = await fault(spending) if fault is not None else {}
    await spending.ask_in_turn(NUM_AFTER)
    return seen


async def spent(spending, requests):
    """What was granted once all have been asked, and then as many of the smallest as fit."""
    began = time.monotonic()
    before = await spending.cluster.metrics()
    seen = await requests
    after = await spending.cluster.metrics()
    without_redis = max(0.0, after[LOCAL_DECISIONS] - before[LOCAL_DECISIONS])
    first = spending.refusals[0] if spending.refusals else None
    granted_before = sum(cost for *_, cost in spending.granted)
    num_refused = len(spending.refusals)
    await spending.ask_in_turn(2 * NUM_ROUTERS, SMALLEST)
    took_s = time.monotonic() - began
    row = {
        "granted_tokens": granted_before,
        "most_in_a_window_tokens": most_in_a_window(spending.granted),
        "refused": num_refused,
        "other": spending.others,
        "seconds": took_s,
        "decided_without_redis": without_redis,
        "fault": seen if isinstance(seen, dict) else {},
    }
    if first is not None:
        headers = {name: first.headers.get(name) for name in WANTED_HEADERS}
        row["first_refusal"] = {
            "status": first.status,
            "code": first.code,
            "message": first.message,
            "headers": headers,
        }
    return row


def lines(found):
    """Rows of the table: what, figure, target, whether it is met."""
    for name, row in found["scenarios"].items():
        first = row.get("first_refusal", {})
        is_said = first.get("status") == 429 and all(first["headers"].values())
        most = row["most_in_a_window_tokens"]
        shown = f"{most:,}, {first.get('status', 'no refusal')}"
        is_met = most <= LIMIT_TOKENS and is_said
        what = f"{name}: tokens granted within a minute, first refusal"
        yield what, shown, f"at most {LIMIT_TOKENS:,}, 429", is_met
