"""The faults a trial may meet: their kinds, how long each lasts, and the drawing of a schedule.

Owns the kinds and their odds. Does not know how a fault is carried out, nor loads or invariants.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What can go wrong."""

    DROP = "drop"
    DELAY = "delay"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    FLIP = "flip"
    CUT = "cut"
    PARTITION = "partition"
    ONE_WAY = "one_way"
    KILL = "kill"
    PAUSE = "pause"
    DRAIN = "drain"
    ROUTER_DEATH = "router_death"
    ROUTER_PAUSE = "router_pause"
    CLOCK_SKEW = "clock_skew"
    CLOCK_JUMP = "clock_jump"
    STORE_DOWN = "store_down"
    STORE_EMPTY = "store_empty"
    STORE_SLOW = "store_slow"
    NO_BLOCKS = "no_blocks"
    STUCK_STEP = "stuck_step"
    SLOW_STEP = "slow_step"
    BUSY = "busy"
    STEP_FAILED = "step_failed"
    RANK_DEATH = "rank_death"
    MISFIT = "misfit"
    PREEMPT = "preempt"
    EVICT = "evict"
    CANCEL = "cancel"
    SLOW_READER = "slow_reader"
    DECODER_RAISES = "decoder_raises"
    EMIT_RAISES = "emit_raises"
    READ_RAISES = "read_raises"
    SUBMIT_RAISES = "submit_raises"
    CALLBACK_RAISES = "callback_raises"


OF_CLIENTS = (Kind.CANCEL, Kind.SLOW_READER, Kind.DECODER_RAISES, Kind.EMIT_RAISES)
"""Part of a client's order: nothing is to be done at their time."""
ON_THE_WIRE = (
    Kind.DROP,
    Kind.DELAY,
    Kind.DUPLICATE,
    Kind.REORDER,
    Kind.FLIP,
    Kind.READ_RAISES,
)
LASTS_S: dict[Kind, tuple[float, float]] = {
    Kind.DELAY: (0.01, 4.0),
    Kind.PARTITION: (0.1, 7.0),
    Kind.ONE_WAY: (0.1, 7.0),
    Kind.KILL: (0.3, 3.0),
    Kind.PAUSE: (0.2, 9.0),
    Kind.ROUTER_DEATH: (0.1, 2.0),
    Kind.ROUTER_PAUSE: (0.2, 6.0),
    Kind.CLOCK_JUMP: (0.1, 3600.0),
    Kind.CLOCK_SKEW: (-30.0, 30.0),
    Kind.STORE_DOWN: (1.0, 8.0),
    Kind.STORE_SLOW: (1.0, 8.0),
    Kind.STUCK_STEP: (0.05, 4.5),
    Kind.SLOW_STEP: (0.5, 4.5),
    Kind.BUSY: (0.3, 2.0),
    Kind.MISFIT: (0.5, 3.0),
    Kind.PREEMPT: (0.2, 2.0),
    Kind.EVICT: (0.2, 2.0),
    Kind.SLOW_READER: (0.1, 8.0),
}
SELDOM = (
    Kind.KILL,
    Kind.RANK_DEATH,
    Kind.STEP_FAILED,
    Kind.PAUSE,
    Kind.PARTITION,
    Kind.ROUTER_DEATH,
    Kind.STUCK_STEP,
    Kind.DECODER_RAISES,
    Kind.EMIT_RAISES,
)
"""Drawn less often, so that few requests meet more faults than they have attempts."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a schedule. `pick` in [0, 1) chooses its victim among those there are."""

    kind: Kind
    at_s: float
    pick: float
    for_s: float = 0.0


def draw(
    rng: random.Random,
    num_faults: int,
    within_s: float,
    without: Collection[Kind] = (),
    often: Sequence[Kind] = (),
) -> tuple[Fault, ...]:
    """Draw a schedule, sorted by time, without some kinds and with more of others."""
    kinds = [k for k in Kind if k not in without for _ in range(1 if k in SELDOM else 2)]
    kinds += often
    faults = []
    for _ in range(num_faults):
        kind = rng.choice(kinds)
        low, high = LASTS_S.get(kind, (0.0, 0.0))
        faults.append(Fault(kind, rng.uniform(0.0, within_s), rng.random(), rng.uniform(low, high)))
    return tuple(sorted(faults, key=lambda f: f.at_s))
