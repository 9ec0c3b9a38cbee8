"""What workers report to routers of their own accord: their load, and the routes to their peers."""

import asyncio

from support.virtual import PROMPT, ask, run, unit

from core.session import Load, Role

LONG = {"max_tokens": 60, "ignore_eos": True}


def test_a_load_counts_what_runs_what_arrives_what_waits_and_what_is_free():
    async def scenario(cluster):
        decode, loads = unit(cluster, Role.DECODE), []

        def look():
            loads.append(decode.progress().load)

        look()
        first = asyncio.ensure_future(ask(cluster, "first", PROMPT[:20], **LONG))
        while not decode.scheduler.running:
            await asyncio.sleep(0.001)
        look()
        cluster.hub.extra_delay_s = lambda stream: 0.05 * (stream.kind == "fetch")
        others = [
            asyncio.ensure_future(ask(cluster, name, PROMPT[n : n + 20], **LONG))
            for n, name in enumerate(("second", "third"), 1)
        ]
        while len(decode.scheduler.arriving) < 2:
            await asyncio.sleep(0.001)
        look()
        await asyncio.gather(first, *others)
        look()
        return loads

    idle, one, three, after = run(scenario)
    assert idle == Load(num_waiting=0, num_running=0, waiting_tokens=0, free_blocks=64)
    assert (one.num_running, one.num_waiting) == (1, 0) and one.free_blocks == 64 - 6
    assert (three.num_running, three.num_waiting) == (3, 0)
    assert three.waiting_tokens in (0, 1), "one token of who decodes; those that arrive have none"
    assert (after.num_running, after.num_waiting, after.waiting_tokens) == (0, 0, 0)
    assert after.free_blocks + after.cached_blocks == 64


def test_each_decode_worker_reports_the_route_to_each_prefill_worker_before_any_request():
    async def scenario(cluster):
        await asyncio.sleep(2.0)
        found = {
            session.descriptor.worker_id: dict(session.routes.reports)
            for session in cluster.sessions.all()
        }
        addresses = {
            one.descriptor.transfer_address
            for one in cluster.units.values()
            if one.descriptor.role is Role.PREFILL
        }
        return found, addresses

    found, addresses = run(scenario, prefill=2, decode=2)
    receivers = {name: routes for name, routes in found.items() if routes}
    assert len(addresses) == 2 and set(receivers) == {"decode3", "decode4"}
    for routes in receivers.values():
        assert set(routes) == addresses
        assert {(route.error, bool(route.transport)) for route in routes.values()} == {("", True)}
