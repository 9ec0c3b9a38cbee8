"""Faults inside a worker.

Owns steps that stick, crawl or fail, dead ranks, refused blocks, rare choices of a scheduler, and
exceptions in the worker's own code. Does not know nodes.
"""

from __future__ import annotations

import asyncio

from simulation.faults.injection import Inflict, Injection
from simulation.faults.kinds import Fault, Kind
from simulation.traps import Place

TRAP_S = 1.5
"""How long a trap waits for somebody to step into it."""
REFUSED_ALLOCATIONS = 4
REFUSING_S = 2.0
MIN_STEP_FAULT_S = 1.0
"""A fault of a step waits so long for one: the worker may be idle."""


async def _no_blocks(injection: Injection, fault: Fault) -> None:
    node = injection.pick(fault, sorted(injection.cluster.units))
    if node is None:
        return
    choices = injection.cluster.rare_choices
    before = choices.num_forced["no_blocks"]
    choices.failing_allocations[node] = REFUSED_ALLOCATIONS
    await asyncio.sleep(REFUSING_S)
    choices.failing_allocations[node] = 0
    injection.bite(fault, has_bitten=choices.num_forced["no_blocks"] > before)


async def _step(injection: Injection, fault: Fault) -> None:
    node = injection.pick(fault, injection.workers())
    if node is None:
        return
    runner = injection.cluster.runners[node]
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
    # A slow step makes progress, layer by layer: to take its worker for dead is a mistake.
    may_look_dead = fault.kind is not Kind.SLOW_STEP
    if may_look_dead:
        injection.mark_ill(node)
    await asyncio.sleep(max(MIN_STEP_FAULT_S, fault.for_s))
    injection.bite(fault, has_bitten=runner.num_bitten > before)
    runner.stuck_for_s = 0.0
    runner.slow_for_s = 0.0
    runner.dies_next = False
    runner.fails_next = 0
    if may_look_dead:
        injection.mark_ill(node)


async def _rare_choice(injection: Injection, fault: Fault) -> None:
    choices = injection.cluster.rare_choices
    is_preempt = fault.kind is Kind.PREEMPT
    before = choices.num_forced[fault.kind.value]
    # Added and taken off again, since two faults of a kind may overlap.
    choices.preempt_odds += 0.2 * is_preempt
    choices.evict_odds += 0.2 * (not is_preempt)
    await asyncio.sleep(fault.for_s)
    choices.preempt_odds -= 0.2 * is_preempt
    choices.evict_odds -= 0.2 * (not is_preempt)
    injection.bite(fault, has_bitten=choices.num_forced[fault.kind.value] > before)


async def _trap(injection: Injection, fault: Fault) -> None:
    node = injection.pick(fault, injection.workers())
    if node is None:
        return
    traps = injection.cluster.traps
    place = Place.SUBMIT if fault.kind is Kind.SUBMIT_RAISES else Place.CALLBACK
    traps.arm(place, node)
    await asyncio.sleep(TRAP_S)
    injection.bite(fault, has_bitten=not traps.disarm(place, node))


FAULTS: dict[Kind, Inflict] = {
    Kind.NO_BLOCKS: _no_blocks,
    Kind.STUCK_STEP: _step,
    Kind.SLOW_STEP: _step,
    Kind.STEP_FAILED: _step,
    Kind.RANK_DEATH: _step,
    Kind.PREEMPT: _rare_choice,
    Kind.EVICT: _rare_choice,
    Kind.SUBMIT_RAISES: _trap,
    Kind.CALLBACK_RAISES: _trap,
}
