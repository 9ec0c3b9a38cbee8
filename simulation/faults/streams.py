"""Faults between two nodes.

Owns cut streams and blocked routes. Does not know messages.
"""

from __future__ import annotations

import asyncio

from core.session import Role
from simulation.faults.injection import Inflict, Injection
from simulation.faults.kinds import Fault, Kind


async def _cut(injection: Injection, fault: Fault) -> None:
    kind = "session" if fault.pick < 0.5 else "fetch"
    victims = [stream for stream in injection.cluster.hub.streams if stream.kind == kind]
    if victims:
        victims[int(injection.rng.random() * len(victims))].reset()
        injection.bite(fault)


async def _partition(injection: Injection, fault: Fault) -> None:
    pair = _pair(injection, fault)
    if pair is not None:
        await _block(injection, fault, [pair, (pair[1], pair[0])])


async def _one_way(injection: Injection, fault: Fault) -> None:
    pair = _pair(injection, fault)
    if pair is not None:
        route = pair if injection.rng.random() < 0.5 else (pair[1], pair[0])
        await _block(injection, fault, [route])


def _pair(injection: Injection, fault: Fault) -> tuple[str, str] | None:
    """Pick two nodes with a stream: a router and a worker, or a prefill and a decode worker."""
    units = sorted(injection.cluster.units.items())
    prefill = [n for n, u in units if u.descriptor.role is Role.PREFILL]
    decode = [n for n, u in units if u.descriptor.role is Role.DECODE]
    routers = [r.name for r in injection.cluster.routers if r.is_alive]
    pairs = [(p, d) for p in prefill for d in decode]
    pairs += [(r, n) for r in routers for n, _ in units]
    return injection.pick(fault, pairs)


async def _block(injection: Injection, fault: Fault, routes: list[tuple[str, str]]) -> None:
    hub = injection.cluster.hub
    for route in routes:
        hub.block(*route)
        injection.mark_ill(*route)
    await asyncio.sleep(fault.for_s)
    for route in routes:
        injection.mark_ill(*route)
    # All of them, before any is counted: `any` would leave the second one blocked.
    num_stalled = [hub.unblock(*route) for route in routes]
    injection.bite(fault, has_bitten=any(num_stalled))


FAULTS: dict[Kind, Inflict] = {
    Kind.CUT: _cut,
    Kind.PARTITION: _partition,
    Kind.ONE_WAY: _one_way,
}
