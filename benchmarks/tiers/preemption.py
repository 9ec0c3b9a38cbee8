"""What a decode worker full of batch work makes an interactive request wait, and what that costs.

Owns both loads and the three phases: each alone, then together. The only decode worker has fewer
places than the batch load has answers, so that it is full whenever batch work is there.
"""

import asyncio
import time

from benchmarks.tiers.cluster import TieredCluster
from benchmarks.tiers.load import closed_loop, counts, latencies, open_loop, tokens_between

PLACES = 8
"""Sequences that the decode worker runs at once."""
BLOCKS = 224
"""Of its pool: about what eight batch answers have at their ends."""
BATCH = (60, 360)
"""Letters of the prompt, output tokens."""
BATCH_OUTSTANDING = 16
CHAT = (40, 24)
CHATS_PER_S = 3.0
RAMP_SHARE = 0.25


async def measure(step, seconds):
    settings = {
        "placement.path": "pd",
        "pools.decode.engine.max_sequences": PLACES,
        "pools.decode.engine.num_blocks": BLOCKS,
    }
    phases = {}
    tiers = {"chat": "interactive", "job": "batch"}
    async with TieredCluster(tiers, **settings) as cluster:
        await open_loop(cluster.clients("chat"), *CHAT, CHATS_PER_S, 2.0)  # warms up
        for name, kinds in {
            "interactive alone": ("chat",),
            "batch alone": ("job",),
            "both": ("chat", "job"),
        }.items():
            step(f"preemption: {name}")
            phases[name] = await phase(cluster, kinds, seconds)
    alone, both = phases["batch alone"], phases["both"]
    kept = both["batch_tokens_per_s"] / max(alone["batch_tokens_per_s"], 1e-9)
    return {"places": PLACES, "blocks": BLOCKS, "phases": phases, "batch_kept": kept}


async def phase(cluster, kinds, seconds):
    """Batch work comes first, so that the worker is full when chats begin."""
    before = await cluster.metrics()
    ramp_s = RAMP_SHARE * seconds
    batch = chats = None
    jobs = []  # those that are cut at the end among them
    if "job" in kinds:
        clients = cluster.clients("job")
        length_s = ramp_s + seconds
        loop = closed_loop(clients, *BATCH, BATCH_OUTSTANDING, length_s, on_sent=jobs.append)
        batch = asyncio.create_task(loop)
        await asyncio.sleep(ramp_s)
    began = time.monotonic()
    if "chat" in kinds:
        chats = await open_loop(cluster.clients("chat"), *CHAT, CHATS_PER_S, seconds)
    row = {}
    if batch is not None:
        outcomes = await batch
        rate = tokens_between(jobs, began, began + seconds) / seconds
        row |= {"batch": counts(outcomes), "batch_tokens_per_s": rate}
    if chats is not None:
        row["interactive"] = {**counts(chats), **latencies(chats)}
        row["interactive_tokens_per_s"] = tokens_between(chats, began, began + seconds) / seconds
    grown = await cluster.metrics()
    grown.subtract(before)
    row["preemptions"] = sum(
        value for key, value in grown.items() if key[0] == "baton_worker_preemptions"
    )
    return row


def lines(found):
    """Rows of the table: what, figure, target, whether it is met."""
    phases = found["phases"]
    alone, beside = (phases[name]["interactive"] for name in ("interactive alone", "both"))
    for figure in ("ttft_s", "itl_s"):
        for at in ("p50", "p99"):
            values = [1e3 * row[figure][at] for row in (alone, beside)]
            name = f"interactive {figure[:-2].upper()} {at} alone, beside batch, ms"
            yield name, "{:.1f}, {:.1f}".format(*values), "", None
    rates = [phases[name]["batch_tokens_per_s"] for name in ("batch alone", "both")]
    yield "batch tokens/s alone, beside", "{:.0f}, {:.0f}".format(*rates), "", None
    chats = [phases[name]["interactive_tokens_per_s"] for name in ("interactive alone", "both")]
    total = (rates[1] + chats[1]) / max(rates[0], 1e-9)
    yield "all tokens/s together, of batch alone", f"{total:.0%}", "90%", total >= 0.9
    num = phases["both"]["preemptions"]
    yield "preemptions in that time", f"{num:.0f}", "some", num > 0
