"""What one tenant can do to another's chat: its time to the first token, alone and beside.

Owns the attacker's loads and the neighbour's chats, which go to the same router. Settings are the
defaults, so that older code can be measured by the same loads.
"""

import asyncio
import contextlib
import json

from benchmarks.record import quantiles
from benchmarks.tiers.cluster import TieredCluster
from benchmarks.tiers.load import counts, cut

CHAT = (30, 8)
PAUSE_S = 0.2
"""Between two chats of the neighbour."""
LONG = (1_800, 4)
NUM_LONG = 100
NUM_LISTS = 10
PROMPTS_A_LIST = 128
NUM_UNREAD = 260
UNREAD_TOKENS = 1_500
STARTS_S = 1.0
"""From the attack to the first chat beside it."""
TIMEOUT_S = 20.0
TARGET_TIMES = 3
TIERS = {"chat": "interactive", "batch-attacker": "batch", "equal-attacker": "interactive"}


async def measure(step, seconds):
    attacks = {
        f"{NUM_LONG} long prompts": long_prompts,
        f"{NUM_LISTS} lists of {PROMPTS_A_LIST} prompts": lists_of_prompts,
        f"{NUM_UNREAD} streams that nobody reads": unread_streams,
    }
    rows = []
    for name, attack in attacks.items():
        for attacker in ("batch-attacker", "equal-attacker"):
            step(f"attacks: {name}, {TIERS[attacker]}")
            # A cluster for each: nothing is left of the attack before.
            async with TieredCluster(TIERS) as cluster:
                row = await beside(cluster, attack, attacker, seconds)
            rows.append({"attack": name, "attacker_tier": TIERS[attacker], **row})
    return {"chat_tier": TIERS["chat"], "rows": rows}


async def beside(cluster, attack, attacker, seconds):
    client = cluster.client("chat", timeout_s=TIMEOUT_S)
    await chats(client, 2.0)  # warms up
    alone = [o.ttft_s for o in await chats(client, seconds / 2) if o.is_ok]
    tasks = [asyncio.create_task(one) for one in attack(cluster.client(attacker))]
    await asyncio.sleep(STARTS_S)
    probes = await chats(client, seconds)
    ended = [task.result() for task in tasks if task.done()]
    await cut(tasks)
    good = [o.ttft_s for o in probes if o.is_ok]
    row = {
        "alone_ttft_s": quantiles(alone),
        "beside_ttft_s": quantiles(good) if good else None,
        "beside": counts(probes),
        "attacker_ended": counts(ended),
        "attacker_still_open": len(tasks) - len(ended),
    }
    row["times"] = row["beside_ttft_s"]["p50"] / row["alone_ttft_s"]["p50"] if good else None
    return row


async def chats(client, seconds):
    """One after another for that time; the last one may end later."""
    outcomes = []
    async with asyncio.timeout(seconds + 2 * TIMEOUT_S):
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + seconds
        while loop.time() < ends_at:
            outcomes.append(await client.ask(client.body(*CHAT)))
            await asyncio.sleep(PAUSE_S)
    return outcomes


def long_prompts(client):
    return [client.ask(client.body(*LONG)) for _ in range(NUM_LONG)]


def lists_of_prompts(client):
    return [client.ask(list_body(client)) for _ in range(NUM_LISTS)]


def list_body(client):
    body = json.loads(client.body(*CHAT))
    prompts = [json.loads(client.body(*CHAT))["prompt"] for _ in range(PROMPTS_A_LIST)]
    return json.dumps({**body, "prompt": prompts, "max_tokens": 256}).encode()


def unread_streams(client):
    body = client.body(CHAT[0], UNREAD_TOKENS)
    return [hold(client, body) for _ in range(NUM_UNREAD)]


async def hold(client, body):
    """Send a request and read nothing, until this task is cancelled."""
    # The least that is read ahead: beyond it the kernel's buffers fill.
    _, writer = await asyncio.open_connection("127.0.0.1", client.port, limit=1)
    try:
        writer.write(client.head(body) + body)
        await asyncio.Event().wait()
    finally:
        with contextlib.suppress(OSError):
            writer.transport.abort()


def lines(found):
    """Rows of the table: what, figure, target, whether it is met."""
    for row in found["rows"]:
        alone, near = row["alone_ttft_s"], row["beside_ttft_s"]
        shown = f"{1e3 * alone['p50']:.0f}, " + (f"{1e3 * near['p50']:.0f}" if near else "none")
        ok, sent = row["beside"]["ok"], row["beside"]["sent"]
        # One without an answer has no time to the first token, and is worse than any that has.
        is_met = ok == sent and row["times"] <= TARGET_TIMES
        shown += "" if ok == sent else f" ({ok} of {sent} answered)"
        name = f"chat's TTFT p50 alone, beside {row['attack']} of tier {row['attacker_tier']}, ms"
        yield name, shown, f"{TARGET_TIMES} times", is_met
