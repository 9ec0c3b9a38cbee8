"""What a trial has seen of quotas: who asked for how much, what came of it, what went wrong.

Owns asks, troubles, and the bounds that follow of what may count of a key: the least, which every
router must know, and the most, which none may exceed. Does not know ledgers, slots or how routers
compare.

    an ask ──▶ granted: its estimate counts ──▶ ended: what it used counts
        └────▶ refused, or its client left: nothing counts, once that has been told

Between the two bounds lies what a fault left open: a call whose answer was lost, a router that died
before it told of an ending, a store that has lost what was told.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

LEAST_WINDOW_S = 58.5
"""A charge counts so long at least: a router's first second may count up to a second less."""
MOST_WINDOW_S = 66.0
"""And not longer: 60 s after its second, somewhat more where clocks were joined."""
CHAIN_S = 70.0
"""Later asks of one name may pay anew: the first has left the window."""
LEAST_RUNS = 4
"""One charge pays for so many runs of a name; it is for eight, and lost calls may begin some."""
TOLD_S = 0.5
"""After it a router that is well has told all."""
WELL_S = 4.5
"""After the last trouble: a second until routers look, 2.5 s of grace, and some time for calls."""
CALL_S = 0.2
"""Longer than any call that a router waits for."""


class QuotaCost(NamedTuple):
    """Requests and tokens; as a limit, 0 is none."""

    requests: int = 0
    tokens: int = 0

    def plus(self, other: QuotaCost) -> QuotaCost:
        """Add up."""
        return QuotaCost(self.requests + other.requests, self.tokens + other.tokens)

    def less(self, other: QuotaCost) -> QuotaCost:
        """Take away, down to nothing."""
        return QuotaCost(max(0, self.requests - other.requests), max(0, self.tokens - other.tokens))

    def low(self, other: QuotaCost) -> QuotaCost:
        """Return the smaller of each."""
        return QuotaCost(*map(min, self, other))

    def high(self, other: QuotaCost) -> QuotaCost:
        """Return the larger of each."""
        return QuotaCost(*map(max, self, other))

    def is_over(self, limit: QuotaCost) -> bool:
        """True if it is more than a limit that there is."""
        return any(most and count > most for count, most in zip(self, limit, strict=True))


FREE = QuotaCost()


@dataclass(eq=False, slots=True)
class QuotaAsk:
    """One run of a request, from the moment in which its router is asked to charge it."""

    router: str
    key: str
    request_id: str
    estimate: QuotaCost
    asked_s: float
    answered_s: float | None = None
    """None: not yet, or never, as its router died or its client left."""
    is_granted: bool = False
    is_local: bool = False
    """Decided without the store."""
    charged: QuotaCost = FREE
    """As its router says."""
    left_s: float | None = None
    """When its client left while it waited."""
    ended_s: float | None = None
    used: QuotaCost = FREE
    """By its end."""

    @property
    def settled(self) -> QuotaCost:
        """What counts from its charge on once it has ended; what is beyond counts from its end."""
        return self.used.low(self.estimate)

    @property
    def surplus(self) -> QuotaCost:
        """What it used beyond its estimate."""
        return self.used.less(self.estimate) if self.ended_s is not None else FREE


@dataclass(slots=True)
class Troubles:
    """What went wrong so far, with routers or their store."""

    at_s: list[float] = field(default_factory=list)
    """In order."""
    lost_at_s: float = -math.inf
    """When the store last lost something."""
    died: dict[str, float] = field(default_factory=dict)
    """When each router did."""
    gained_s: float = 0.0
    """By which routers' clocks have run fast, all together."""
    missed_s: float = 0.0
    """By which they have run slow."""
    has_store: bool = True

    def note(self, now_s: float) -> None:
        """Something is wrong now."""
        self.at_s.append(now_s)

    def is_quiet(self, start_s: float, end_s: float = math.inf) -> bool:
        """True if nothing went wrong within a time."""
        index = bisect_left(self.at_s, start_s)
        return index == len(self.at_s) or self.at_s[index] > end_s

    def is_well(self, now_s: float) -> bool:
        """True if all routers that live know everything of one another."""
        return self.has_store and self.is_quiet(now_s - WELL_S)

    def is_told(self, router: str, since_s: float, now_s: float) -> bool:
        """True if what happened at a router is known to all for sure, and stays so."""
        if now_s < since_s + TOLD_S:
            return False
        died_s = self.died.get(router)
        was_quiet = self.is_quiet(since_s - CALL_S, since_s + TOLD_S) and self.has_store
        if died_s is not None:
            is_kept = self.lost_at_s < since_s
            return was_quiet and is_kept and died_s > since_s + TOLD_S
        is_kept = self.lost_at_s < since_s - CALL_S
        return (was_quiet and is_kept) or (now_s > since_s + WELL_S and self.is_well(now_s))


# --- the least that counts ------------------------------------------------------------------------


def least(
    asks: Sequence[QuotaAsk], reader: str, before_s: float, now_s: float, troubles: Troubles
) -> QuotaCost:
    """Return what a router must know to count now of all that was granted before an instant.

    Args:
        asks: Of one key, in order.
        reader: The router; of its own grants it knows in any case.
        before_s: What was granted from here on may have come after its decision.
        now_s: The instant of its decision, at the latest.
        troubles: Until now.
    """
    found = FREE
    # Also those that were decided locally: another run may lean on what they tried before.
    for chain in _chains((ask for ask in asks if ask.is_granted), has_local=True):
        first = chain[0]
        if _age_s(first, now_s) + troubles.gained_s > LEAST_WINDOW_S:
            continue
        counted = FREE
        for ask in chain:
            if _answered_s(ask) < before_s and _is_known(ask, reader, now_s, troubles):
                counted = counted.high(ask.estimate if ask.ended_s is None else ask.settled)
        found = found.plus(counted)
    return found


def _is_known(ask: QuotaAsk, reader: str, now_s: float, troubles: Troubles) -> bool:
    if ask.router == reader:
        return True
    if not troubles.has_store:
        return False
    is_in_store = not ask.is_local and troubles.lost_at_s < ask.asked_s
    return is_in_store or (
        ask.router not in troubles.died
        and now_s > _answered_s(ask) + WELL_S
        and troubles.is_well(now_s)
    )


# --- the most that may count ----------------------------------------------------------------------


def most(asks: Sequence[QuotaAsk], now_s: float, troubles: Troubles) -> QuotaCost:
    """Return what may count now at any router of all that was asked, granted or not.

    Args:
        asks: Of one key, in order; without the one that is to be decided.
        now_s: The instant.
        troubles: Until now.
    """
    window_s = MOST_WINDOW_S + troubles.missed_s
    found = FREE
    traced = [ask for ask in asks if not _left_no_trace(ask, troubles)]
    for chain in _chains(traced):
        counted = FREE
        recent = [ask for ask in chain if _age_s(ask, now_s) < window_s]
        costs = [_most_of(ask, now_s, troubles) for ask in recent]
        # Each pays for itself if the one before it may have been forgotten meanwhile, or used up.
        is_lost = len(chain) > 1 and troubles.lost_at_s > chain[0].asked_s
        is_forgotten = is_lost or len(chain) > LEAST_RUNS
        for cost in costs:
            counted = counted.plus(cost) if is_forgotten else counted.high(cost)
        if _is_leaned_on(chain, traced, troubles):
            for ask in recent:
                counted = counted.high(ask.estimate)
        found = found.plus(counted)
        for ask in chain:
            if _is_in_doubt(ask, now_s, troubles) and _age_s(ask, now_s) < window_s:
                found = found.plus(ask.estimate)
            if ask.ended_s is not None and now_s - ask.ended_s < window_s:
                found = found.plus(ask.surplus)
    return found


def _most_of(ask: QuotaAsk, now_s: float, troubles: Troubles) -> QuotaCost:
    if not ask.is_granted:
        is_pending = ask.answered_s is None and ask.left_s is None
        return ask.estimate if is_pending else FREE
    if ask.ended_s is None:
        return ask.estimate
    # Without the store, an ending is noted where the charge was: nobody else counts it.
    is_told = not troubles.has_store or troubles.is_told(ask.router, ask.ended_s, now_s)
    return ask.settled if is_told else ask.estimate


def _left_no_trace(ask: QuotaAsk, troubles: Troubles) -> bool:
    """True for a refusal while nothing was wrong."""
    is_refused = ask.answered_s is not None and not ask.is_granted
    return is_refused and _is_calm(ask, _answered_s(ask), troubles)


def _is_calm(ask: QuotaAsk, answered_s: float, troubles: Troubles) -> bool:
    return not troubles.has_store or troubles.is_quiet(ask.asked_s - CALL_S, answered_s)


def _is_in_doubt(ask: QuotaAsk, now_s: float, troubles: Troubles) -> bool:
    """True if a call may have charged it, beside what became of it, and nobody has heard since."""
    answered_s = ask.left_s if ask.answered_s is None else ask.answered_s
    if answered_s is None:
        return False  # pending: counted as such
    is_calm = _is_calm(ask, answered_s, troubles) and ask.left_s is None
    return not is_calm and not troubles.is_told(ask.router, answered_s, now_s)


def _is_leaned_on(chain: Sequence[QuotaAsk], asks: Sequence[QuotaAsk], troubles: Troubles) -> bool:
    """True if a run may have begun while an earlier one of its name was not settled.

    Also one that was decided locally in the end, and pays for itself: the call that failed before
    may have begun it in the store, and then the earlier one refunds nothing.
    """
    name = chain[0].request_id
    runs = [ask for ask in asks if ask in chain or (ask.is_local and name == ask.request_id != "")]
    return any(
        before.asked_s < ask.asked_s and _may_be_open(before, ask.asked_s, troubles)
        for before in chain
        if not before.is_local
        for ask in runs
    )


def _may_be_open(ask: QuotaAsk, at_s: float, troubles: Troubles) -> bool:
    """True if somebody may have found a run charged and not settled."""
    if not ask.is_granted:
        return _is_in_doubt(ask, at_s, troubles) or (ask.answered_s is None and ask.left_s is None)
    return ask.ended_s is None or not troubles.is_told(ask.router, ask.ended_s, at_s)


# --- runs of one name -----------------------------------------------------------------------------


def _chains(asks: Iterable[QuotaAsk], *, has_local: bool = False) -> Iterator[list[QuotaAsk]]:
    """Group the runs of one name, which are charged once; those decided locally for sure apart."""
    named: dict[str, list[QuotaAsk]] = {}
    for ask in asks:
        chain = named.get(ask.request_id)
        if (ask.is_local and not has_local) or not ask.request_id:
            yield [ask]
        elif chain is not None and ask.asked_s - chain[0].asked_s < CHAIN_S:
            chain.append(ask)
        else:
            if chain is not None:
                yield chain
            named[ask.request_id] = [ask]
    yield from named.values()


def _answered_s(ask: QuotaAsk) -> float:
    return math.inf if ask.answered_s is None else ask.answered_s


def _age_s(ask: QuotaAsk, now_s: float) -> float:
    return now_s - (ask.asked_s if ask.answered_s is None else ask.answered_s)
