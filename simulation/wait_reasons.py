"""What every unfinished sequence waits for, by name.

Owns the one answer to "why does this not move?". A sequence that waits for nothing but the next
step, on a worker that takes no step, has lost its wake-up: the commonest way in which systems like
this hang. Does not change anything.
"""

from __future__ import annotations

from enum import StrEnum

from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence, Status


class WaitReason(StrEnum):
    """The next thing that moves a sequence on."""

    STEP = "the next step"
    CREDIT = "credit from its router"
    PARTNER = "its partner's reservation or acknowledgement"
    FRAMES = "frames from its prefill worker"
    TURN = "answers to hand-overs announced before it, or the start of those that are ready"
    BLOCKS = "blocks that others hold"
    PLACE = "a place in a step"
    ORDER = "a sequence before it in the line, for which blocks or a place are kept"


def wait_reason_of(scheduler: Scheduler, sequence: Sequence) -> WaitReason:
    """Name what an unfinished sequence waits for."""
    match sequence.status:
        case Status.NEW | Status.ARRIVING:
            return WaitReason.FRAMES
        case Status.HOLDING:
            return WaitReason.PARTNER
        case Status.RUNNING if sequence.is_out_of_credit:
            return WaitReason.CREDIT
        case Status.RUNNING:
            is_alone = any(s.run_alone and s is not sequence for s in scheduler.active)
            return WaitReason.PLACE if is_alone else WaitReason.STEP
        case Status.WAITING if sequence.is_out_of_credit:
            return WaitReason.CREDIT
    handover = sequence.handover
    if handover is not None and not handover.is_announced:
        is_next = scheduler.waiting.next_to_announce() is sequence
        return WaitReason.STEP if is_next else WaitReason.TURN
    if sequence.is_ahead:
        return WaitReason.PARTNER
    return _in_line(scheduler, sequence)


def _in_line(scheduler: Scheduler, sequence: Sequence) -> WaitReason:
    if sequence in scheduler.blocks.fitting(sequence.status, takes_back=False):
        return WaitReason.STEP
    if not scheduler.blocks.has_place(sequence):
        return WaitReason.PLACE
    is_short = scheduler.blocks.num_needed(sequence, 0) > scheduler.pool.num_available
    return WaitReason.BLOCKS if is_short else WaitReason.ORDER
