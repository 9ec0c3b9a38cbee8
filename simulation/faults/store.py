"""Faults of the store of members.

Owns its outages and the loss of what it held. Does not know who uses it.
"""

from __future__ import annotations

import asyncio

from simulation.faults.injection import Inflict, Injection
from simulation.faults.kinds import Fault, Kind


async def _outage(injection: Injection, fault: Fault) -> None:
    store = injection.cluster.store
    before = store.num_refused
    store.mode = "down" if fault.kind is Kind.STORE_DOWN else "slow"
    await asyncio.sleep(fault.for_s)
    store.mode = "ok"
    injection.store_back_at = asyncio.get_running_loop().time()
    injection.bite(fault, has_bitten=store.num_refused > before)


async def _empty(injection: Injection, fault: Fault) -> None:
    store = injection.cluster.store
    injection.bite(fault, has_bitten=bool(store.members))
    store.empty()
    injection.store_back_at = asyncio.get_running_loop().time()


FAULTS: dict[Kind, Inflict] = {
    Kind.STORE_DOWN: _outage,
    Kind.STORE_SLOW: _outage,
    Kind.STORE_EMPTY: _empty,
}
