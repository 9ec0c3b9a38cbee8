"""A random fault every ten seconds for twenty minutes: nothing lost, nothing inexact, memory level.

Some seconds of it in `make test`.
"""

import asyncio
import contextlib
import os
import random
import signal
import statistics
import time
from pathlib import Path

import pytest
from support.process_cluster import is_gone, is_long, note
from support.samples import SEED

SECONDS, PERIOD_S = (1200, 10) if is_long() else (12, 5)
WARM_UP_S = SECONDS * 0.2


def rss_mib(pids):
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return total / 2**20


def slope(points):
    """Least squares: (slope, half of its 95 % interval), per minute."""
    xs, ys = [t / 60 for t, _ in points], [y for _, y in points]
    if len(xs) < 3:
        return 0.0, 0.0
    fit = statistics.linear_regression(xs, ys)
    rest = [y - fit.slope * x - fit.intercept for x, y in zip(xs, ys, strict=True)]
    spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
    error = (sum(r * r for r in rest) / (len(xs) - 2) / spread) ** 0.5 if spread else 0.0
    return fit.slope, 1.96 * error


async def rank_death(cluster):
    replicas = await cluster.replicas()
    pids = [pid for r in replicas for pid in r["rank_pids"] if not is_gone(pid)]
    pid = cluster.rng.choice(pids)
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        while not is_gone(pid):
            await asyncio.sleep(0.01)


async def leavers(cluster):
    """Twenty clients that leave at once."""
    tasks = [
        asyncio.create_task(
            cluster.ask(
                cluster.rng.randrange(len(cluster.requests)), f"leave-{time.monotonic_ns()}-{i}"
            )
        )
        for i in range(20)
    ]
    await asyncio.sleep(cluster.rng.uniform(0.05, 0.8))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def terminate(cluster, role):
    pids = cluster.pids(role)
    assert await cluster.terminate(role, cluster.rng.choice(pids)) == 0


@pytest.mark.timeout(2400)
@pytest.mark.asyncio(loop_scope="session")
async def test_soak_with_a_random_fault_every_ten_seconds(learned):
    cluster = learned
    faults = {f"{what.__name__} {role}": (lambda w=what, r=role: w(r)) for what in (cluster.kill,)
              for role in ("decode", "prefill", "router")}  # fmt: skip
    faults |= {
        f"hang {role}": (lambda r=role: cluster.hang(r, 5))
        for role in ("decode", "prefill", "router")
    }
    faults |= {
        f"terminate {role}": (lambda r=role: terminate(cluster, r))
        for role in ("decode", "prefill", "router")
    }
    faults |= {
        "rank death": lambda: rank_death(cluster),
        "20 clients leave": lambda: leavers(cluster),
    }
    rng = random.Random(SEED)
    started, log, memory = time.monotonic(), [], []
    load = asyncio.create_task(cluster.load(SECONDS, 8))
    while time.monotonic() - started < SECONDS - PERIOD_S:
        at = time.monotonic()
        name = rng.choice(sorted(faults))
        await faults[name]()
        await cluster.wait_whole()
        await asyncio.sleep(max(0.0, PERIOD_S - (time.monotonic() - at)))
        now_s = time.monotonic() - started
        verdict = cluster.verdict()
        routers = rss_mib(cluster.pids("router"))
        workers = rss_mib([*cluster.pids("decode"), *cluster.pids("prefill")])
        memory.append((now_s, routers + workers))
        log.append(
            {
                "at_s": round(now_s, 1),
                "fault": name,
                "requests": verdict["requests"],
                "affected": verdict["affected"],
                "wrong": verdict["wrong"],
                "routers_mib": round(routers, 1),
                "workers_mib": round(workers, 1),
            }
        )
        assert verdict["wrong"] == [], log[-1]
    await load
    verdict = cluster.verdict()
    assert verdict["wrong"] == []
    assert await cluster.leaked() == {}
    grows, margin = slope([p for p in memory if p[0] > WARM_UP_S])
    print(len(log), "faults", verdict, f"memory {grows:+.2f} +- {margin:.2f} MiB a minute")
    note(
        "soak",
        {
            "seconds": SECONDS,
            "faults": len(log),
            **verdict,
            "memory_slope_mib_per_min": round(grows, 3),
            "memory_slope_95": round(margin, 3),
            "log": log,
        },
    )
    if is_long():
        assert grows - margin <= 0.5, "memory grows"
