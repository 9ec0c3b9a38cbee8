"""Who gives up its blocks and its place, and to whom.

Owns the rule. Does not know blocks, or who needs how many.

A lower tier yields to a higher one, but not to who is due later: what has waited its delay keeps
what it has. Within a tier a tenant that runs more than twice what another would run yields to it,
by their weights, but for the oldest that it runs: however little a tenant weighs, it gets on. So a
newcomer waits for nobody's long answers, each tenant has a third of what two compete for, and what
was given up is not taken back: the other has less.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

from engine.scheduling.queues import SequenceQueue
from engine.scheduling.sequence import Sequence

TOO_MANY_TIMES = 2
"""As many as a newcomer's tenant would run: who runs more yields."""


def may_yield(running: SequenceQueue, line: Iterable[Sequence]) -> bool:
    """False if nobody who runs yields to anybody in the line, which is the common case."""
    lowest_s = max((s.delay_s for s in running), default=0.0)
    tenants = {s.tenant for s in running} - {""}
    kinds = {(s.tenant, s.delay_s) for s in line}
    return any(delay_s < lowest_s or (tenant and tenants - {tenant}) for tenant, delay_s in kinds)


def victims(
    running: SequenceQueue, starting: Iterable[Sequence], sequence: Sequence
) -> list[Sequence]:
    """List who yields to a waiting sequence, the youngest first.

    Args:
        running: Those who may yield.
        starting: Those who are about to run beside them.
        sequence: Has a place and blocks after these.
    """
    level = (s for s in itertools.chain(running, starting) if s.delay_s == sequence.delay_s)
    num_running = Counter(s.tenant for s in level)
    num_left = Counter(s.tenant for s in running if s.delay_s == sequence.delay_s)
    num_fair = TOO_MANY_TIMES * (num_running[sequence.tenant] + 1) / sequence.weight
    found: list[Sequence] = []
    for one in reversed(running):
        if one.run_alone:
            continue
        if one.yields_to(sequence):
            found.append(one)
        elif (
            one.shares_tier_with(sequence)
            and num_left[one.tenant] > 1
            and num_running[one.tenant] / one.weight > num_fair
        ):
            # Counted, so that it yields no more than it has too many.
            num_running[one.tenant] -= 1
            num_left[one.tenant] -= 1
            found.append(one)
    return found
