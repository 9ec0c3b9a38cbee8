"""Faults of the store of quotas, and of the clocks by which routers count.

Owns its outages, what it loses, a router that is cut off from it, and clocks that leap, drift or
stand. Does not know what is charged.
"""

from __future__ import annotations

import asyncio

from simulation.faults.injection import Inflict, Injection
from simulation.faults.kinds import Fault, Kind

ANSWER_S = 2.0
"""How long a loss of an answer waits for a call."""
DRIFT = 0.05
"""A clock runs so much faster or slower: far more than a real one, so that a trial sees it."""


async def _outage(injection: Injection, fault: Fault) -> None:
    store = injection.cluster.quota_store
    before = store.num_failed
    store.mode = "down" if fault.kind is Kind.QUOTAS_DOWN else "frozen"
    await asyncio.sleep(fault.for_s)
    store.thaw()
    injection.bite(fault, has_bitten=store.num_failed > before)


async def _cut(injection: Injection, fault: Fault) -> None:
    """One router does not reach the store; the others do."""
    name = _router(injection, fault)
    if name is None:
        return
    store = injection.cluster.quota_store
    before = store.num_failed
    store.cut[name] = None
    await asyncio.sleep(fault.for_s)
    store.cut.pop(name, None)
    injection.bite(fault, has_bitten=store.num_failed > before)


async def _empty(injection: Injection, fault: Fault) -> None:
    injection.bite(fault, has_bitten=injection.cluster.quota_store.empty() > 0)


async def _older(injection: Injection, fault: Fault) -> None:
    """A failover: what was written last is gone."""
    store = injection.cluster.quota_store
    copied = store.snapshot()
    await asyncio.sleep(fault.for_s)
    injection.bite(fault, has_bitten=store.become(copied) > 0)


async def _answer_lost(injection: Injection, fault: Fault) -> None:
    store = injection.cluster.quota_store
    store.num_answers_to_lose += 1
    before = store.num_answers_lost
    await asyncio.sleep(ANSWER_S)
    store.num_answers_to_lose -= store.num_answers_to_lose > 0
    injection.bite(fault, has_bitten=store.num_answers_lost > before)


async def _leap(injection: Injection, fault: Fault) -> None:
    name = _router(injection, fault)
    if name is not None:
        injection.cluster.router_clocks[name].leap(fault.for_s)
        injection.bite(fault)


async def _rate(injection: Injection, fault: Fault) -> None:
    name = _router(injection, fault)
    if name is None:
        return
    rate = 1 + DRIFT if fault.pick < 0.5 else 1 - DRIFT
    clock = injection.cluster.router_clocks[name]
    clock.run_at(0.0 if fault.kind is Kind.ROUTER_CLOCK_STOP else rate)
    await asyncio.sleep(fault.for_s)
    clock.run_at(1.0)
    injection.bite(fault)


def _router(injection: Injection, fault: Fault) -> str | None:
    """Pick one that lives, also the only one."""
    return injection.pick(fault, [r.name for r in injection.cluster.routers if r.is_alive])


FAULTS: dict[Kind, Inflict] = {
    Kind.QUOTAS_DOWN: _outage,
    Kind.QUOTAS_FROZEN: _outage,
    Kind.QUOTAS_CUT: _cut,
    Kind.QUOTAS_EMPTY: _empty,
    Kind.QUOTAS_OLDER: _older,
    Kind.QUOTAS_ANSWER_LOST: _answer_lost,
    Kind.ROUTER_CLOCK_LEAP: _leap,
    Kind.ROUTER_CLOCK_DRIFT: _rate,
    Kind.ROUTER_CLOCK_STOP: _rate,
}
