"""What is left in the books of a cluster after requests of every kind: what it began with.

Everything that a part of ours counts or keeps is compared, so a new table is watched from its first
day; what may differ is named here, with the reason.
"""

import asyncio
from collections import deque
from collections.abc import Mapping, Set

from support.virtual import PROMPT, ask, run

from core.config import EngineConfig, PlacementConfig
from core.errors import Cancelled, DeadlineExceeded

ROOMS = ("core", "decode_worker", "engine", "kv_transfer", "prefill_worker", "router", "transport",
         "worker")  # fmt: skip
CHANGES = {
    "_prompts": "prompts that are expected at a worker until it has published them",
    "_counts": "of expected prompts",
    "_ends": "of expected prompts",
    "by_receiver": "routes used in the last minute",
    "_used_at": "routes used in the last minute",
    "_tombstones": "cancelled attempts and ended transfers are known for a while",
    "_released": "what ranks forget with the next plan",
    "_output_tokens": "what tenants' last requests had, of so many tenants",
    "_work": "what prompts of each tier would wait for, as last read",
    "_roots": "of the cache",
    "_records": "of the cache",
    "_record_bytes": "of the cache",
    "_hash_bytes": "of the cache",
    "_next_serial": "of the cache",
    "_num_registered": "of the cache",
    "_num_free": "of the cache",
    "_num_cached": "of the cache",
    "free_blocks": "of the cache",
    "cached_blocks": "of the cache",
    "_step_id": "a serial number",
    "_next": "a serial number",
    "_num_sent": "a serial number",
    "stream_number": "a serial number",
    "num_steps": "a total",
    "num_attempts": "a total",
    "num_preemptions": "a total",
    "num_reconnects": "a total",
    "num_stale": "a total",
    "num_sent_bytes": "a total",
    "transitions": "totals",
}
BEGINS_ABOVE_0 = {
    "_num_sent",
    "_num_blocks",
    "_num_most",
    "num_permits",
    "_num_free",
    "num_blocks",
    "num_layers",
    "num_shards",
    "num_kv_heads",
    "num_tokens",
    # By which a router divides a key's limit while the store is away.
    "_num_routers",
    # One count for each tier.
    "num_refused",
    "num_overflowed",
}


def books(roots):
    """Numbers, and sizes of tables, in objects of ours and in all that they hold, by their path."""
    found, seen = {}, set()
    left = deque(roots.items())
    while left:
        path, one = left.popleft()
        if id(one) in seen or type(one).__module__.partition(".")[0] not in ROOMS:
            continue
        seen.add(id(one))
        for name in (*getattr(one, "__dict__", ()), *getattr(type(one), "__slots__", ())):
            value, here = getattr(one, name, None), f"{path}.{name}"
            if isinstance(value, int):
                found[here] = int(value)
            elif isinstance(value, bytearray):
                found[here] = len(value)
            elif isinstance(value, Mapping | Set | list | deque):
                found[here] = len(value)
                items = value.items() if isinstance(value, Mapping) else enumerate(value)
                left.extend((f"{here}[{key}]", item) for key, item in items)
            else:
                left.append((here, value))
    return found


def all_books(cluster):
    """Those of every worker and router."""
    routers = {
        f"{router.name}.{name}": part
        for router in cluster.routers
        for name, part in vars(router).items()
    }
    return books({**cluster.units, **routers})


def last_name(path):
    return path.rpartition(".")[2]


async def load(cluster):
    """Requests that end in every path there is."""
    loop = asyncio.get_running_loop()
    await asyncio.gather(
        ask(cluster, "plain"),
        ask(cluster, "two", n=2, temperature=1.0),
        ask(cluster, "short", PROMPT[:5]),
        ask(cluster, "one", max_tokens=1),
        ask(cluster, "scored", prompt_logprobs=5),
        ask(cluster, "stopped", stop_token_ids=tuple(range(30))),
    )
    long = {"max_tokens": 60, "ignore_eos": True}
    aborted = loop.create_task(ask(cluster, "aborted", **long))
    left = loop.create_task(ask(cluster, "left", **long))
    late = loop.create_task(ask(cluster, "late", timeout_s=0.2, **long))
    cut = loop.create_task(ask(cluster, "cut", **long))
    many = [loop.create_task(ask(cluster, f"m{i}", PROMPT[i:], **long)) for i in range(6)]
    await asyncio.sleep(0.15)
    cluster.orchestrator.abort(("", "aborted"), Cancelled("enough"))
    left.cancel()
    assert cluster.hub.reset("session") and cluster.hub.reset("fetch")
    ends = [(await one)[1] for one in (aborted, late, cut, *many)]
    return [type(ended.error) for ended in ends[:2]], [ended.error for ended in ends[2:]]


def test_nothing_is_left_of_requests_however_they_ended():
    async def scenario(cluster):
        await asyncio.sleep(2.0)
        before = all_books(cluster)
        ends = await load(cluster)
        await asyncio.sleep(3.0)
        return before, ends, all_books(cluster)

    before, (errors, others), after = run(
        scenario,
        placement=PlacementConfig(path="auto", local_below_tokens=12),
        engine=EngineConfig(block_size_tokens=4, num_blocks=80, max_step_tokens=32),
    )
    assert errors == [Cancelled, DeadlineExceeded] and set(others) == {None}
    assert len(before) > 200, "the walk over the books found few of them"
    changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
    assert {last_name(path) for path in changed} == set(CHANGES), changed


def test_nothing_is_counted_before_it_has_happened():
    async def scenario(cluster):
        await asyncio.sleep(2.0)
        return all_books(cluster)

    counts = {
        path: count
        for path, count in run(scenario).items()
        if last_name(path).lstrip("_").startswith("num_")
    }
    assert len({last_name(path) for path in counts}) > 20
    above_0 = {path for path, count in counts.items() if count}
    assert {last_name(path) for path in above_0} == BEGINS_ABOVE_0, above_0
