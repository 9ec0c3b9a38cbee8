"""Loads of many clients, closed and open, and what is said of their outcomes.

Owns when requests are sent. Does not know tiers or quotas.
"""

import asyncio
import contextlib
import time
from collections import Counter

from benchmarks.record import quantiles

RETRY_S = 0.2
"""A refused client waits this long before it asks again."""


async def closed_loop(
    clients, num_prompt, num_output, outstanding, seconds, ends=None, on_sent=None
):
    """Keep so many requests outstanding, in turn at each router; those open at the end are cut.

    Args:
        ends: Called with each outcome; returns whether the loop has enough before its time is up.
        on_sent: Called with every outcome as it begins, those that are cut among them.

    Returns:
        The outcomes of those that ended in time.
    """
    outcomes = []
    has_enough = asyncio.Event()

    async def one(client):
        while True:
            outcomes.append(await client.ask(client.body(num_prompt, num_output), on_sent=on_sent))
            if ends is not None and ends(outcomes[-1]):
                has_enough.set()
            if not outcomes[-1].is_ok:
                await asyncio.sleep(RETRY_S)

    tasks = [asyncio.create_task(one(clients[i % len(clients)])) for i in range(outstanding)]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await has_enough.wait()
    await cut(tasks)
    return outcomes


async def open_loop(clients, num_prompt, num_output, rate, seconds):
    """Poisson arrivals, in turn at each router; returns all outcomes, once the last has ended."""
    tasks = []
    ends_at = time.monotonic() + seconds
    due_at = time.monotonic()
    while (due_at := due_at + clients[0].rng.expovariate(rate)) < ends_at:
        await asyncio.sleep(max(0.0, due_at - time.monotonic()))
        client = clients[len(tasks) % len(clients)]
        tasks.append(asyncio.create_task(client.ask(client.body(num_prompt, num_output), due_at)))
    return await asyncio.gather(*tasks)


async def cut(tasks):
    """Hang up."""
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)


def counts(outcomes):
    """How many were answered, refused and lost, the latter two by code."""
    return {
        "sent": len(outcomes),
        "ok": sum(o.is_ok for o in outcomes),
        "refused": Counter(f"{o.status} {o.code}" for o in outcomes if o.is_refusal),
        "other": Counter(
            f"{o.status} {o.code}" for o in outcomes if not o.is_ok and not o.is_refusal
        ),
    }


def latencies(outcomes):
    """TTFT, gaps and time per output token of what was answered, in seconds."""
    good = [o for o in outcomes if o.is_ok]
    gaps = [gap for o in good for gap in o.gaps_s]
    return {
        "ttft_s": quantiles([o.ttft_s for o in good]) if good else None,
        "itl_s": quantiles(gaps) if gaps else None,
    }


def tokens_between(outcomes, began, ended):
    """Output tokens that came in that time, also of answers that ended later."""
    return sum(num for o in outcomes if o.events for at, num in o.tokens if began <= at <= ended)
