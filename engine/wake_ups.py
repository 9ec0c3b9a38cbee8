"""What every unfinished sequence waits for, by name.

Owns the one answer to "why does this not move?". A sequence that waits for nothing but the next step,
on a worker that takes no step, has lost its wake-up: the commonest way in which systems like this hang.
Does not change anything. Called by the simulation, which asks all the time, and by whoever debugs.
"""

from __future__ import annotations

import itertools
from enum import StrEnum

from engine.scheduler import Scheduler
from engine.sequence import Sequence, Status


class WakeUp(StrEnum):
    """The next thing that moves a sequence on."""

    STEP = "the next step"
    CREDIT = "credit from its router"
    PARTNER = "its partner's reservation or acknowledgement"
    FRAMES = "frames from its prefill worker"
    TURN = "an announced hand-over before it"
    BLOCKS = "blocks that others hold"
    PLACE = "a place in a step"
    ORDER = "a sequence before it in the queue, which waits for blocks or a place"


def wake_up_of(scheduler: Scheduler, sequence: Sequence) -> WakeUp:
    """Name what an unfinished sequence waits for."""
    handover = sequence.handover
    if sequence.status is Status.ARRIVING:
        return WakeUp.FRAMES
    if sequence.status is Status.HOLDING:
        return WakeUp.PARTNER
    if sequence.is_out_of_credit:
        return WakeUp.CREDIT
    active = [s for s in scheduler.running if not s.is_out_of_credit]
    if sequence.status is Status.RUNNING:
        return (
            WakeUp.PLACE if any(s.run_alone and s is not sequence for s in active) else WakeUp.STEP
        )
    if handover is not None and not handover.is_partnered:
        return WakeUp.PARTNER if handover.is_announced else WakeUp.TURN
    if len(active) >= scheduler.limits.max_sequences or (
        active and (sequence.run_alone or active[0].run_alone)
    ):
        return WakeUp.PLACE
    hits = scheduler.tables.find_prefix(sequence)
    needed = scheduler.tables.blocks_for(sequence.num_tokens) - sum(
        scheduler.pool.references(b) > 0 for b in hits
    )
    if needed > scheduler.pool.num_available:
        return WakeUp.BLOCKS
    before = itertools.takewhile(lambda s: s is not sequence, scheduler.waiting)
    is_held_up = any(wake_up_of(scheduler, s) in (WakeUp.BLOCKS, WakeUp.PLACE) for s in before)
    return WakeUp.ORDER if is_held_up else WakeUp.STEP
