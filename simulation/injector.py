"""Carrying out a schedule of faults on a simulated cluster.

Owns what each fault does and the count of those that bit: a fault that was drawn but touched
nothing does not count. Does not know loads or invariants.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from core.session import Role
from simulation.cluster import SimCluster
from simulation.faults import OF_CLIENTS, ON_THE_WIRE, Fault, Kind
from simulation.network import SimStream
from simulation.traps import Injected, Place

MEMBERS_LAG_S = 0.3
"""How long the member list goes on naming a dead worker."""
TRAP_S = 1.5
"""How long a trap waits for somebody to step into it."""
BUSY_TURN_S = 0.02
"""The longest turn of a busy loop."""


class Injector:
    """Carries a schedule out on one cluster."""

    def __init__(self, cluster: SimCluster, faults: Sequence[Fault], rng: random.Random) -> None:
        """Hook into the wire; `run` does the rest."""
        self._cluster = cluster
        self._faults = faults
        self._rng = rng
        self._armed: list[Fault] = []
        self._swapped: dict[SimStream, Any] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.bitten: Counter[str] = Counter()
        self.store_back_at: float | None = None
        cluster.hub.mangle = self._mangle

    async def run(self) -> None:
        """Inflict every fault at its time and undo those that last; returns when all is over."""
        loop = asyncio.get_running_loop()
        act: dict[Kind, Callable[[Fault], Any]] = {
            Kind.CUT: self._cut,
            Kind.PARTITION: self._partition,
            Kind.ONE_WAY: self._one_way,
            Kind.KILL: self._kill,
            Kind.PAUSE: self._pause,
            Kind.DRAIN: self._drain,
            Kind.ROUTER_DEATH: self._router_death,
            Kind.ROUTER_PAUSE: self._router_pause,
            Kind.CLOCK_SKEW: self._clock,
            Kind.CLOCK_JUMP: self._clock,
            Kind.STORE_DOWN: self._store,
            Kind.STORE_SLOW: self._store,
            Kind.STORE_EMPTY: self._store_empty,
            Kind.NO_BLOCKS: self._no_blocks,
            Kind.STUCK_STEP: self._step,
            Kind.SLOW_STEP: self._step,
            Kind.STEP_FAILED: self._step,
            Kind.RANK_DEATH: self._step,
            Kind.BUSY: self._busy,
            Kind.MISFIT: self._incompatible,
            Kind.PREEMPT: self._contrary,
            Kind.EVICT: self._contrary,
            Kind.SUBMIT_RAISES: self._trap,
            Kind.CALLBACK_RAISES: self._trap,
        }
        for fault in self._faults:
            await asyncio.sleep(max(0.0, fault.at_s - loop.time()))
            if fault.kind in ON_THE_WIRE:
                self._armed.append(fault)
            elif fault.kind not in OF_CLIENTS:
                self._tasks.append(loop.create_task(act[fault.kind](fault)))
        for task in self._tasks:
            await task
        self._armed.clear()

    def _pick(self, fault: Fault, things: Sequence[Any]) -> Any:  # noqa: ANN401
        return things[int(fault.pick * len(things))] if things else None

    def _ill(self, *nodes: str) -> None:
        """Somebody may well take these nodes for dead now."""
        now_s = asyncio.get_running_loop().time()
        self._cluster.ill_at.update(dict.fromkeys(nodes, now_s))

    # --- on the wire ------------------------------------------------------------------------------

    def _mangle(self, stream: SimStream, message: Any) -> list[Any]:  # noqa: ANN401
        if stream in self._swapped:
            self.bitten[Kind.REORDER] += 1
            return [message, self._swapped.pop(stream)]
        for fault in self._armed:
            if fault.kind is Kind.FLIP and not (isinstance(message, bytes) and len(message) > 64):
                continue
            if fault.pick < 0.5 and stream.kind != "fetch":
                continue  # half of them wait for the hand-over, which has fewer messages
            self._armed.remove(fault)
            return self._mangled(fault, stream, message)
        return [message]

    def _mangled(self, fault: Fault, stream: SimStream, message: Any) -> list[Any]:  # noqa: ANN401
        match fault.kind:
            case Kind.REORDER:
                self._swapped[stream] = message
                return []
            case Kind.DUPLICATE:
                out = [message, message]
            case Kind.DELAY:
                stream.last_arrival = asyncio.get_running_loop().time() + fault.for_s
                self._delayed(stream, fault.for_s)
                out = [message]
            case Kind.READ_RAISES:
                out = [Injected("injected: reading")]
            case Kind.FLIP:
                damaged = bytearray(message)
                # Anywhere, or in the payload alone: one in the head is seen before the payload is.
                first = self._rng.choice([0, len(damaged) * 3 // 4])
                for _ in range(self._rng.randint(1, 64)):
                    damaged[self._rng.randrange(first, len(damaged))] ^= 1 << self._rng.randrange(8)
                out = [bytes(damaged)]
                if out[0] == message:
                    return out
            case _:
                out = []
        self.bitten[fault.kind] += 1
        return out

    def _delayed(self, stream: SimStream, for_s: float) -> None:
        self._ill(stream.node, stream.peer.node)
        nodes = stream.node, stream.peer.node
        asyncio.get_running_loop().call_later(for_s, self._ill, *nodes)

    async def _cut(self, fault: Fault) -> None:
        kind = "session" if fault.pick < 0.5 else "fetch"
        victims = [s for s in self._cluster.hub.streams if s.kind == kind]
        if victims:
            victims[int(self._rng.random() * len(victims))].reset()
            self.bitten[fault.kind] += 1

    def _pair(self, fault: Fault) -> tuple[str, str] | None:
        """Two nodes that talk: a router and a worker, or a prefill and a decode worker."""
        units = sorted(self._cluster.units.items())
        prefill = [n for n, u in units if u.descriptor.role is Role.PREFILL]
        decode = [n for n, u in units if u.descriptor.role is Role.DECODE]
        routers = [r.name for r in self._cluster.routers if r.is_alive]
        pairs = [(p, d) for p in prefill for d in decode] + [
            (r, n) for r in routers for n, _ in units
        ]
        pair: tuple[str, str] | None = self._pick(fault, pairs)
        return pair

    async def _partition(self, fault: Fault) -> None:
        pair = self._pair(fault)
        if pair is not None:
            await self._block(fault, [pair, (pair[1], pair[0])])

    async def _one_way(self, fault: Fault) -> None:
        pair = self._pair(fault)
        if pair is not None:
            await self._block(fault, [pair if self._rng.random() < 0.5 else (pair[1], pair[0])])

    async def _block(self, fault: Fault, routes: list[tuple[str, str]]) -> None:
        hub = self._cluster.hub
        for route in routes:
            hub.block(*route)
            self._ill(*route)
        await asyncio.sleep(fault.for_s)
        for route in routes:
            self._ill(*route)
        num_stalled = [hub.unblock(*route) for route in routes]
        self.bitten[fault.kind] += any(num_stalled)

    # --- nodes ------------------------------------------------------------------------------------

    def _workers(self) -> list[str]:
        cluster = self._cluster
        return [
            n
            for n in sorted(cluster.units)
            if n not in cluster.draining and n not in cluster.paused
        ]

    async def _kill(self, fault: Fault) -> None:
        """Kill a worker; another takes its place after a while."""
        node = self._pick(fault, self._workers())
        if node is None:
            return
        cluster = self._cluster
        role = cluster.units[node].descriptor.role
        self.bitten[fault.kind] += 1
        self._ill(node)
        cluster.membership.starting += 1
        await cluster.kill(node, MEMBERS_LAG_S)
        await asyncio.sleep(fault.for_s)
        await cluster.add(role)
        cluster.membership.starting -= 1
        cluster.membership.notify()

    async def _pause(self, fault: Fault) -> None:
        node = self._pick(fault, self._workers())
        if node is not None:
            self.bitten[fault.kind] += 1
            self._ill(node)
            await self._cluster.pause(node, fault.for_s)
            self._ill(node)

    async def _drain(self, fault: Fault) -> None:
        """A rolling restart of one worker: the new one first, then the old one drains."""
        cluster = self._cluster
        node = self._pick(fault, self._workers())
        if node is None:
            return
        cluster.draining[node] = None
        await cluster.add(cluster.units[node].descriptor.role)
        if node in cluster.units and node not in cluster.paused:
            self.bitten[fault.kind] += 1
            await cluster.drain(node)

    async def _router_death(self, fault: Fault) -> None:
        cluster = self._cluster
        alive = [r.name for r in cluster.routers if r.is_alive and r.name not in cluster.paused]
        if len(alive) > 1:
            self.bitten[fault.kind] += 1
            new = cluster.kill_router(self._pick(fault, alive))
            await asyncio.sleep(fault.for_s)
            new.start()
            new.is_alive = True

    async def _router_pause(self, fault: Fault) -> None:
        cluster = self._cluster
        alive = [r.name for r in cluster.routers if r.is_alive and r.name not in cluster.paused]
        if len(alive) > 1:
            self.bitten[fault.kind] += 1
            await cluster.pause(self._pick(fault, alive), fault.for_s)

    async def _clock(self, fault: Fault) -> None:
        node = self._pick(fault, sorted(self._cluster.units))
        if node is not None:
            self._cluster.clocks[node].offset_s += abs(fault.for_s)
            self.bitten[fault.kind] += 1

    # --- inside a worker --------------------------------------------------------------------------

    async def _no_blocks(self, fault: Fault) -> None:
        node = self._pick(fault, sorted(self._cluster.units))
        contrary = self._cluster.contrary
        if node is not None:
            before = contrary.num_forced["no_blocks"]
            contrary.failing_allocations[node] = 4
            await asyncio.sleep(2.0)
            contrary.failing_allocations[node] = 0
            self.bitten[fault.kind] += contrary.num_forced["no_blocks"] > before

    async def _step(self, fault: Fault) -> None:
        node = self._pick(fault, self._workers())
        if node is None:
            return
        runner = self._cluster.runners[node]
        before = runner.num_bitten
        match fault.kind:
            case Kind.STUCK_STEP:
                runner.stuck_for_s = fault.for_s
            case Kind.SLOW_STEP:
                runner.slow_for_s = fault.for_s
            case Kind.RANK_DEATH if not runner.is_executing:
                runner.die_between_steps()
            case Kind.RANK_DEATH:
                runner.dies_next = True
            case _:
                runner.fails_next = 1
        if fault.kind is not Kind.SLOW_STEP:
            self._ill(node)
        await asyncio.sleep(max(1.0, fault.for_s))
        self.bitten[fault.kind] += runner.num_bitten > before
        runner.stuck_for_s = runner.slow_for_s = 0.0
        runner.dies_next = False
        runner.fails_next = 0
        if fault.kind is not Kind.SLOW_STEP:
            self._ill(node)

    async def _busy(self, fault: Fault) -> None:
        """Every turn of the loop takes its time: what comes due in one turn is done in one turn."""
        loop = self._cluster.loop
        turn_s = BUSY_TURN_S * (0.1 + 0.9 * fault.pick)
        loop.turn_s += turn_s
        await asyncio.sleep(fault.for_s)
        loop.turn_s = max(0.0, loop.turn_s - turn_s)
        self.bitten[fault.kind] += 1

    async def _trap(self, fault: Fault) -> None:
        node = self._pick(fault, self._workers())
        traps = self._cluster.traps
        place = Place.SUBMIT if fault.kind is Kind.SUBMIT_RAISES else Place.CALLBACK
        if node is not None:
            traps.arm(place, node)
            await asyncio.sleep(TRAP_S)
            self.bitten[fault.kind] += not traps.disarm(place, node)

    async def _incompatible(self, fault: Fault) -> None:
        """A worker of another model joins by mistake, and leaves again."""
        cluster = self._cluster
        node = await cluster.add(Role.DECODE, is_incompatible=True)
        cluster.draining[node] = None
        await asyncio.sleep(fault.for_s)
        self.bitten[fault.kind] += cluster.units[node].attempts.num_attempts > 0
        await cluster.drain(node)

    async def _contrary(self, fault: Fault) -> None:
        contrary = self._cluster.contrary
        is_preempt = fault.kind is Kind.PREEMPT
        before = contrary.num_forced[fault.kind.value]
        contrary.preempt_odds += 0.2 * is_preempt
        contrary.evict_odds += 0.2 * (not is_preempt)
        await asyncio.sleep(fault.for_s)
        contrary.preempt_odds -= 0.2 * is_preempt
        contrary.evict_odds -= 0.2 * (not is_preempt)
        self.bitten[fault.kind] += contrary.num_forced[fault.kind.value] > before

    # --- the store --------------------------------------------------------------------------------

    async def _store(self, fault: Fault) -> None:
        store = self._cluster.store
        before = store.num_refused
        store.mode = "down" if fault.kind is Kind.STORE_DOWN else "slow"
        await asyncio.sleep(fault.for_s)
        store.mode = "ok"
        self.store_back_at = asyncio.get_running_loop().time()
        self.bitten[fault.kind] += store.num_refused > before

    async def _store_empty(self, fault: Fault) -> None:
        store = self._cluster.store
        self.bitten[fault.kind] += bool(store.members)
        store.empty()
        self.store_back_at = asyncio.get_running_loop().time()
