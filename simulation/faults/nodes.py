"""Faults of a whole node: a worker, or a router.

Owns deaths and their replacements, pauses, rolling restarts, clocks and busy machines. Does not
know what runs on a node.
"""

from __future__ import annotations

import asyncio

from core.session import Role
from simulation.faults.injection import Inflict, Injection
from simulation.faults.kinds import Fault, Kind

MEMBERS_LAG_S = 0.3
"""How long the member list goes on naming a dead worker."""
BUSY_TURN_S = 0.02
"""The longest turn of a busy loop."""


async def _kill(injection: Injection, fault: Fault) -> None:
    """Kill a worker; another takes its place after a while."""
    node = injection.pick(fault, injection.workers())
    if node is None:
        return
    cluster = injection.cluster
    pool = cluster.units[node].descriptor.pool
    injection.bite(fault)
    injection.mark_ill(node)
    # Before the death: a router that finds no worker may wait only while one is starting.
    cluster.membership.starting += 1
    await cluster.kill(node, MEMBERS_LAG_S)
    await asyncio.sleep(fault.for_s)
    await cluster.add(*pool)
    cluster.membership.starting -= 1
    cluster.membership.notify()


async def _pause(injection: Injection, fault: Fault) -> None:
    node = injection.pick(fault, injection.workers())
    if node is not None:
        injection.bite(fault)
        injection.mark_ill(node)
        await injection.cluster.pause(node, fault.for_s)
        injection.mark_ill(node)


async def _drain(injection: Injection, fault: Fault) -> None:
    """Restart one worker as an upgrade does: the new one comes first, then the old one drains."""
    cluster = injection.cluster
    node = injection.pick(fault, injection.workers())
    if node is None:
        return
    cluster.draining[node] = None  # before the await: no other fault may take it now
    await cluster.add(*cluster.units[node].descriptor.pool)
    if node in cluster.units and node not in cluster.paused:
        injection.bite(fault)
        await cluster.drain(node)


async def _router_death(injection: Injection, fault: Fault) -> None:
    name = injection.pick(fault, injection.routers())
    if name is not None:
        injection.bite(fault)
        new = injection.cluster.kill_router(name)
        await asyncio.sleep(fault.for_s)
        new.start()
        new.is_alive = True


async def _router_pause(injection: Injection, fault: Fault) -> None:
    name = injection.pick(fault, injection.routers())
    if name is not None:
        injection.bite(fault)
        await injection.cluster.pause(name, fault.for_s)


async def _clock(injection: Injection, fault: Fault) -> None:
    """Let a worker's clock leap: forward, as a monotonic clock after a machine's sleep."""
    node = injection.pick(fault, sorted(injection.cluster.units))
    if node is not None:
        injection.cluster.clocks[node].leap(abs(fault.for_s))
        injection.bite(fault)


async def _busy(injection: Injection, fault: Fault) -> None:
    """Every turn of the loop takes its time: what comes due in one turn is done in one turn."""
    loop = injection.cluster.loop
    turn_s = BUSY_TURN_S * (0.1 + 0.9 * fault.pick)
    loop.turn_s += turn_s
    await asyncio.sleep(fault.for_s)
    loop.turn_s = max(0.0, loop.turn_s - turn_s)  # not below zero by a rounding error
    injection.bite(fault)


async def _incompatible(injection: Injection, fault: Fault) -> None:
    """A worker of another model joins by mistake, and leaves again."""
    cluster = injection.cluster
    node = await cluster.add(Role.DECODE, is_incompatible=True)
    cluster.draining[node] = None
    await asyncio.sleep(fault.for_s)
    injection.bite(fault, has_bitten=cluster.units[node].attempts.num_attempts > 0)
    await cluster.drain(node)


FAULTS: dict[Kind, Inflict] = {
    Kind.KILL: _kill,
    Kind.PAUSE: _pause,
    Kind.DRAIN: _drain,
    Kind.ROUTER_DEATH: _router_death,
    Kind.ROUTER_PAUSE: _router_pause,
    Kind.CLOCK_SKEW: _clock,
    Kind.CLOCK_JUMP: _clock,
    Kind.BUSY: _busy,
    Kind.INCOMPATIBLE: _incompatible,
}
