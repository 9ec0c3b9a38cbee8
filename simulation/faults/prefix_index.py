"""Faults of the store of the prefix index, and of what stands in it.

Owns its outages, what befalls single batches, entries that no living worker wrote, and a router
that reads late. Does not know publishers or feeds.
"""

from __future__ import annotations

import asyncio

from core.block_hash import DIGEST_BYTES, BlockHash
from core.ids import Incarnation, WorkerLife
from core.prefix_changes import PrefixChange
from prefix_index.entries import Batch, EntryCodec
from simulation.faults.injection import Inflict, Injection
from simulation.faults.kinds import Fault, Kind
from simulation.prefix_store import Mishap

MISHAP_S = 2.0
"""How long a mishap waits for a batch: workers may be idle."""
READ_S = 1.0
"""By then routers have read what was forged, if they can."""
NUM_FORGED = 5
MISHAPS = {
    Kind.INDEX_LOST: Mishap.LOST,
    Kind.INDEX_REPEATED: Mishap.REPEATED,
    Kind.INDEX_SWAPPED: Mishap.SWAPPED,
    Kind.INDEX_ANSWER_LOST: Mishap.ANSWER_LOST,
}


async def _outage(injection: Injection, fault: Fault) -> None:
    store = injection.cluster.prefix_store
    before = store.num_refused
    store.mode = "down" if fault.kind is Kind.INDEX_DOWN else "slow"
    await asyncio.sleep(fault.for_s)
    store.mode = "ok"
    injection.bite(fault, has_bitten=store.num_refused > before)


async def _empty(injection: Injection, fault: Fault) -> None:
    injection.bite(fault, has_bitten=injection.cluster.prefix_store.empty() > 0)


async def _mishap(injection: Injection, fault: Fault) -> None:
    store = injection.cluster.prefix_store
    mishap = MISHAPS[fault.kind]
    before = store.happened[mishap]
    store.mishaps[mishap] += 1
    await asyncio.sleep(MISHAP_S)
    store.mishaps[mishap] -= store.mishaps[mishap] > 0
    injection.bite(fault, has_bitten=store.happened[mishap] > before)


async def _forged(injection: Injection, fault: Fault) -> None:
    """Somebody who can write to the store, but has no key of the cluster, does."""
    life = _pick_life(injection, fault)
    if life is None:
        return
    store = injection.cluster.prefix_store
    rng = injection.rng
    guessed = EntryCodec(rng.randbytes(32))
    entries = [rng.randbytes(rng.randrange(80)) for _ in range(NUM_FORGED)]
    entries += [guessed.batch(life, batch) for batch in _batches(injection, life)]
    # What is genuine, but damaged or another's.
    others = [entry for other in _lives(injection) for _, entry in store.log_of(other)[-2:]]
    entries += [entry[:-1] for entry in others if entry]
    entries += [entry for entry in others if entry not in dict(store.log_of(life)).values()]
    await _write(injection, fault, life, entries)


async def _dead(injection: Injection, fault: Fault) -> None:
    """Entries of a worker's earlier life, rightly sealed, come into the log of this one."""
    life = _pick_life(injection, fault)
    if life is None:
        return
    worker, incarnation = life
    earlier = (worker, Incarnation(incarnation - 1))
    codec = injection.cluster.codec
    entries = [codec.batch(earlier, batch) for batch in _batches(injection, life)]
    for entry in entries:
        injection.cluster.prefix_store.forge(earlier, entry)
    await _write(injection, fault, life, entries)


async def _behind(injection: Injection, fault: Fault) -> None:
    """A router reads nothing new for a while, as from a replica that lags, and does not know."""
    cluster = injection.cluster
    alive = [r.name for r in cluster.routers if r.is_alive and r.name not in cluster.paused]
    name = injection.pick(fault, alive)
    if name is None:
        return
    store = cluster.prefix_store
    before = store.num_withheld
    store.behind[name] = None
    await asyncio.sleep(fault.for_s)
    store.behind.pop(name, None)
    injection.bite(fault, has_bitten=store.num_withheld > before)


async def _write(
    injection: Injection, fault: Fault, life: WorkerLife, entries: list[bytes]
) -> None:
    before = _num_refused(injection)
    for entry in entries:
        injection.cluster.prefix_store.forge(life, entry)
    await asyncio.sleep(READ_S)
    injection.bite(fault, has_bitten=_num_refused(injection) > before)


def _num_refused(injection: Injection) -> int:
    """Entries that any router has refused; a router that took the place of another has none."""
    return sum(router.feed.refused.total() for router in injection.cluster.routers)


def _batches(injection: Injection, life: WorkerLife) -> list[Batch]:
    """Batches that would be wrong: blocks that nobody has, and the loss of those that are there."""
    rng = injection.rng
    unit = injection.cluster.units[life[0]]
    made_up = [BlockHash(rng.randbytes(DIGEST_BYTES)) for _ in range(3)]
    change = PrefixChange(made_up, unit.pool.registered(range(4)))
    # The next number is what a reader would take; which that is, nobody outside can tell.
    return [Batch(number, change) for number in sorted(rng.sample(range(2, 60), NUM_FORGED))]


def _lives(injection: Injection) -> list[WorkerLife]:
    units = injection.cluster.units
    described = [units[node].descriptor for node in injection.workers()]
    return [(descriptor.worker_id, descriptor.incarnation) for descriptor in described]


def _pick_life(injection: Injection, fault: Fault) -> WorkerLife | None:
    return injection.pick(fault, _lives(injection))


FAULTS: dict[Kind, Inflict] = {
    Kind.INDEX_DOWN: _outage,
    Kind.INDEX_FROZEN: _outage,
    Kind.INDEX_EMPTY: _empty,
    **dict.fromkeys(MISHAPS, _mishap),
    Kind.INDEX_FORGED: _forged,
    Kind.INDEX_DEAD: _dead,
    Kind.INDEX_BEHIND: _behind,
}
