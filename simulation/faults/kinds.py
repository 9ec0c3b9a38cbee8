"""The faults a trial may meet: their kinds, how long each lasts, and the drawing of a schedule.

Owns the kinds and their odds. Does not know how a fault is carried out, nor loads or invariants.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum, auto


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
    INCOMPATIBLE = "incompatible"
    PREEMPT = "preempt"
    EVICT = "evict"
    CANCEL = "cancel"
    SLOW_READER = "slow_reader"
    DECODER_RAISES = "decoder_raises"
    EMIT_RAISES = "emit_raises"
    READ_RAISES = "read_raises"
    SUBMIT_RAISES = "submit_raises"
    CALLBACK_RAISES = "callback_raises"
    INDEX_DOWN = "index_down"
    INDEX_FROZEN = "index_frozen"
    INDEX_EMPTY = "index_empty"
    INDEX_LOST = "index_lost"
    INDEX_REPEATED = "index_repeated"
    INDEX_SWAPPED = "index_swapped"
    INDEX_ANSWER_LOST = "index_answer_lost"
    INDEX_FORGED = "index_forged"
    INDEX_DEAD = "index_dead"
    INDEX_BEHIND = "index_behind"
    QUOTAS_DOWN = "quotas_down"
    QUOTAS_FROZEN = "quotas_frozen"
    QUOTAS_CUT = "quotas_cut"
    QUOTAS_EMPTY = "quotas_empty"
    QUOTAS_OLDER = "quotas_older"
    QUOTAS_ANSWER_LOST = "quotas_answer_lost"
    ROUTER_CLOCK_LEAP = "router_clock_leap"
    ROUTER_CLOCK_DRIFT = "router_clock_drift"
    ROUTER_CLOCK_STOP = "router_clock_stop"


class Where(Enum):
    """Where a fault happens, which decides how it is carried out."""

    CLUSTER = auto()
    """At its time, by a function of this package."""
    WIRE = auto()
    """With the next message that suits it."""
    CLIENT = auto()
    """With a client's request, drawn with it: nothing is to be done at its time."""


class Part(Enum):
    """Which part of the cluster a fault is meant for: each part has its share of a schedule."""

    SERVING = auto()
    PREFIX_INDEX = auto()
    QUOTAS = auto()


@dataclass(frozen=True, slots=True)
class Odds:
    """How long a kind lasts, and whether it is drawn less often than others.

    The seldom ones cost a request an attempt. Often, they would leave requests that meet more
    faults than they have attempts, and every error would be justified.
    """

    lasts_s: tuple[float, float] = (0.0, 0.0)
    is_seldom: bool = False
    where: Where = Where.CLUSTER
    part: Part = Part.SERVING


ODDS: dict[Kind, Odds] = {
    Kind.DROP: Odds(where=Where.WIRE),
    Kind.DELAY: Odds((0.01, 4.0), where=Where.WIRE),
    Kind.DUPLICATE: Odds(where=Where.WIRE),
    Kind.REORDER: Odds(where=Where.WIRE),
    Kind.FLIP: Odds(where=Where.WIRE),
    Kind.READ_RAISES: Odds(where=Where.WIRE),
    Kind.CUT: Odds(),
    # Longer than the 5 s after which a session or a lease ends, and shorter.
    Kind.PARTITION: Odds((0.1, 7.0), is_seldom=True),
    Kind.ONE_WAY: Odds((0.1, 7.0)),
    Kind.KILL: Odds((0.3, 3.0), is_seldom=True),
    # Longer than the 3 s without progress after which a worker counts as hung, and shorter.
    Kind.PAUSE: Odds((0.2, 9.0), is_seldom=True),
    Kind.DRAIN: Odds(),
    Kind.ROUTER_DEATH: Odds((0.1, 2.0), is_seldom=True),
    Kind.ROUTER_PAUSE: Odds((0.2, 6.0)),
    Kind.CLOCK_SKEW: Odds((-30.0, 30.0)),
    Kind.CLOCK_JUMP: Odds((0.1, 3600.0)),
    Kind.STORE_DOWN: Odds((1.0, 8.0)),
    Kind.STORE_EMPTY: Odds(),
    Kind.STORE_SLOW: Odds((1.0, 8.0)),
    Kind.NO_BLOCKS: Odds(),
    Kind.STUCK_STEP: Odds((0.05, 4.5), is_seldom=True),
    Kind.SLOW_STEP: Odds((0.5, 4.5)),
    Kind.BUSY: Odds((0.3, 2.0)),
    Kind.STEP_FAILED: Odds(is_seldom=True),
    Kind.RANK_DEATH: Odds(is_seldom=True),
    Kind.INCOMPATIBLE: Odds((0.5, 3.0)),
    Kind.PREEMPT: Odds((0.2, 2.0)),
    Kind.EVICT: Odds((0.2, 2.0)),
    Kind.CANCEL: Odds(where=Where.CLIENT),
    Kind.SLOW_READER: Odds((0.1, 8.0), where=Where.CLIENT),
    Kind.DECODER_RAISES: Odds(is_seldom=True, where=Where.CLIENT),
    Kind.EMIT_RAISES: Odds(is_seldom=True, where=Where.CLIENT),
    Kind.SUBMIT_RAISES: Odds(),
    Kind.CALLBACK_RAISES: Odds(),
    # Longer than the 10 s after which what a worker published expires, and shorter.
    Kind.INDEX_DOWN: Odds((0.5, 12.0), part=Part.PREFIX_INDEX),
    Kind.INDEX_FROZEN: Odds((0.5, 6.0), part=Part.PREFIX_INDEX),
    Kind.INDEX_EMPTY: Odds(part=Part.PREFIX_INDEX),
    Kind.INDEX_LOST: Odds(part=Part.PREFIX_INDEX),
    Kind.INDEX_REPEATED: Odds(part=Part.PREFIX_INDEX),
    Kind.INDEX_SWAPPED: Odds(part=Part.PREFIX_INDEX),
    Kind.INDEX_ANSWER_LOST: Odds(part=Part.PREFIX_INDEX),
    Kind.INDEX_FORGED: Odds(part=Part.PREFIX_INDEX),
    Kind.INDEX_DEAD: Odds(part=Part.PREFIX_INDEX),
    Kind.INDEX_BEHIND: Odds((0.5, 6.0), part=Part.PREFIX_INDEX),
    Kind.QUOTAS_DOWN: Odds((0.02, 6.0), part=Part.QUOTAS),
    Kind.QUOTAS_FROZEN: Odds((0.02, 6.0), part=Part.QUOTAS),
    Kind.QUOTAS_CUT: Odds((0.5, 6.0), part=Part.QUOTAS),
    Kind.QUOTAS_EMPTY: Odds(part=Part.QUOTAS),
    Kind.QUOTAS_OLDER: Odds((0.05, 2.0), part=Part.QUOTAS),
    Kind.QUOTAS_ANSWER_LOST: Odds(part=Part.QUOTAS),
    Kind.ROUTER_CLOCK_LEAP: Odds((0.1, 30.0), part=Part.QUOTAS),
    Kind.ROUTER_CLOCK_DRIFT: Odds((0.5, 6.0), part=Part.QUOTAS),
    Kind.ROUTER_CLOCK_STOP: Odds((0.2, 6.0), part=Part.QUOTAS),
}


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
    part: Part = Part.SERVING,
) -> tuple[Fault, ...]:
    """Draw a part's schedule, sorted by time, without some kinds and with more of others."""
    # In the order of the enumeration, which is therefore part of what a seed means.
    those = [kind for kind in Kind if ODDS[kind].part is part and kind not in without]
    kinds = [kind for kind in those for _ in range(1 if ODDS[kind].is_seldom else 2)]
    kinds += often
    faults = []
    for _ in range(num_faults):
        kind = rng.choice(kinds)
        low, high = ODDS[kind].lasts_s
        faults.append(Fault(kind, rng.uniform(0.0, within_s), rng.random(), rng.uniform(low, high)))
    return tuple(sorted(faults, key=lambda f: f.at_s))
