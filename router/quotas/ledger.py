"""What one API key has used in the last minute, as one router knows it.

Owns slots of one second, their merge, and what fits. Pure: seconds are an argument, counted by the
clock that all routers share. Does not know the store.

    (router, second) ─▶ charged, refunded      each with requests and tokens

Only its own router writes a slot, and each number only grows. So two copies merge by the larger of
each number, in any order and any number of times (a PN-counter), and a copy that comes late or
twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

WINDOW_S = 60
MAX_RUNS = 256
"""Requests with an idempotency key that the ledger of an API key remembers; the oldest are
forgotten."""

RUNS_PER_CHARGE = 8
"""Runs of such a request that one charge pays for: clients that try again need no more, and nobody
computes without end what was paid for once."""


class Amount(NamedTuple):
    """Requests and tokens; as a limit, 0 is none."""

    requests: int = 0
    tokens: int = 0


NOTHING = Amount()
SlotKey = tuple[str, int]
"""Router and second."""


class Slot(NamedTuple):
    """What one router has charged and refunded in one second."""

    requests: int = 0
    tokens: int = 0
    refunded_requests: int = 0
    refunded_tokens: int = 0

    def merged(self, other: Slot) -> Slot:
        """Return the newer of two copies, number by number."""
        return Slot(*map(max, self, other))


class Run(NamedTuple):
    """The last run of a request with an idempotency key. Of two copies the greater counts."""

    number: int
    owner: str
    is_settled: bool
    requests: int
    tokens: int
    """Charged so far, over all runs for one charge."""
    charged_ms: int
    """When the first of these was; once that has left the window, a further run pays anew."""


class Ledger:
    """The slots of one key."""

    def __init__(
        self,
        router: str,
        slots: Mapping[SlotKey, Slot] | None = None,
        runs: Mapping[str, Run] | None = None,
    ) -> None:
        """Keep copies of what is known; `router` is who writes here."""
        self.router = router
        self.slots = dict(slots or {})
        self.runs = dict(runs or {})

    def copy(self) -> Ledger:
        """Return a ledger that can be written without changing this one."""
        return Ledger(self.router, self.slots, self.runs)

    # --- what is written --------------------------------------------------------------------------

    def charge(self, second: int, amount: Amount) -> None:
        """Add to what this router has charged in a second."""
        if amount == NOTHING:
            return
        old = self.slots.get((self.router, second), Slot())
        self.slots[self.router, second] = old._replace(
            requests=old.requests + amount.requests, tokens=old.tokens + amount.tokens
        )

    def refund(self, second: int, amount: Amount) -> None:
        """Give back what was charged in a second, and no more; nothing if it left the window."""
        old = self.slots.get((self.router, second))
        if old is not None:
            self.slots[self.router, second] = old._replace(
                refunded_requests=min(old.requests, old.refunded_requests + amount.requests),
                refunded_tokens=min(old.tokens, old.refunded_tokens + amount.tokens),
            )

    def paid(self, idempotency_key: str) -> Amount:
        """Return what earlier runs of a request have paid, which is not charged again."""
        last = self.runs.get(idempotency_key)
        if last is None or last.number % RUNS_PER_CHARGE == 0:
            return NOTHING
        return Amount(last.requests, last.tokens)

    def begin(self, idempotency_key: str, owner: str, amount: Amount, now_ms: int) -> None:
        """Note a run of a request that has paid up to `amount`."""
        last = self.runs.get(idempotency_key) or Run(0, "", True, 0, 0, now_ms)
        requests, tokens = map(max, self.paid(idempotency_key), amount)
        charged_ms = last.charged_ms if last.number % RUNS_PER_CHARGE else now_ms
        self.runs[idempotency_key] = Run(
            last.number + 1, owner, False, requests, tokens, charged_ms
        )

    def settle(self, idempotency_key: str, owner: str, used: Amount) -> bool:
        """Note what a request has used, over all its runs.

        Returns:
            False if a later run leans on this one's charge, which then stands.
        """
        last = self.runs.get(idempotency_key)
        if last is None:  # forgotten, so that a later run has paid for itself
            return True
        if last.owner != owner:
            return False
        self.runs[idempotency_key] = last._replace(
            is_settled=True, requests=used.requests, tokens=used.tokens
        )
        return True

    def merge(self, slots: Mapping[SlotKey, Slot], runs: Mapping[str, Run]) -> None:
        """Take over what another copy knows."""
        for key, slot in slots.items():
            self.slots[key] = self.slots.get(key, slot).merged(slot)
        for idempotency_key, run in runs.items():
            self.runs[idempotency_key] = max(self.runs.get(idempotency_key, run), run)

    def shift(self, seconds: int) -> None:
        """Move everything by some seconds, onto another clock."""
        self.slots = {
            (router, second + seconds): slot for (router, second), slot in self.slots.items()
        }
        self.runs = {
            idempotency_key: run._replace(charged_ms=run.charged_ms + 1000 * seconds)
            for idempotency_key, run in self.runs.items()
        }

    def prune(self, now_s: int) -> None:
        """Forget what has left the window."""
        self.slots = {key: slot for key, slot in self.slots.items() if key[1] >= now_s - WINDOW_S}
        first_ms = (now_s - WINDOW_S) * 1000
        runs = [item for item in self.runs.items() if item[1].charged_ms >= first_ms]
        runs.sort(key=lambda item: item[1].charged_ms)
        self.runs = dict(runs[-MAX_RUNS:])

    # --- what is read -----------------------------------------------------------------------------

    def used(self, now_s: int) -> Amount:
        """Return what all routers have charged in the window and not refunded."""
        return total(self.by_second(now_s).values())

    def own_used(self, now_s: int) -> Amount:
        """Return what this router has."""
        return total(self.by_second(now_s, self.router).values())

    def by_second(self, now_s: int, router: str | None = None) -> dict[int, Amount]:
        """Return what counts of each second, oldest first.

        A second counts until 60 full seconds after its end: a slot does not say when in its second
        it was charged, and no 60 seconds may hold more than the limit.
        """
        found: dict[int, Amount] = {}
        for (writer, second), slot in self.slots.items():
            if second >= now_s - WINDOW_S and router in (None, writer):
                requests, tokens = found.get(second, NOTHING)
                found[second] = Amount(
                    requests + slot.requests - slot.refunded_requests,
                    tokens + slot.tokens - slot.refunded_tokens,
                )
        return dict(sorted(found.items()))


def total(amounts: Iterable[Amount]) -> Amount:
    """Add up."""
    requests = tokens = 0
    for amount in amounts:
        requests += amount.requests
        tokens += amount.tokens
    return Amount(requests, tokens)


def fits(used: Amount, amount: Amount, limits: Amount) -> bool:
    """True if `amount` may be charged beside what is used; nothing always may."""
    return all(
        not limit or not more or have + more <= limit
        for have, more, limit in zip(used, amount, limits, strict=True)
    )


def share_of(limits: Amount, num_routers: int) -> Amount:
    """Return what one router may grant by itself; a limit never becomes none."""
    return Amount(*(max(1, limit // num_routers) if limit else 0 for limit in limits))


def wait_s(by_second: Mapping[int, Amount], amount: Amount, limits: Amount, now_s: float) -> float:
    """Return how long until `amount` fits, if nothing else is charged or refunded (seconds).

    Args:
        by_second: What counts, oldest first.
        amount: It fits into an empty window.
        limits: Of the key.
        now_s: By the clock of `by_second`.
    """
    used = total(by_second.values())
    fits_in_s = 0.0
    for second, gone in by_second.items():
        if fits(used, amount, limits):
            break
        used = Amount(used.requests - gone.requests, used.tokens - gone.tokens)
        fits_in_s = max(0.0, second + WINDOW_S + 1 - now_s)
    return fits_in_s


def reset_s(by_second: Mapping[int, Amount], now_s: float) -> tuple[float, float]:
    """Return when all requests, and all tokens, will have left the window (seconds)."""
    ends = [0.0, 0.0]
    for second, amount in by_second.items():
        for index, count in enumerate(amount):
            if count:
                ends[index] = max(ends[index], second + WINDOW_S + 1 - now_s)
    return ends[0], ends[1]


def less(amount: Amount, other: Amount) -> Amount:
    """Return what is left of `amount`, never less than nothing."""
    return Amount(*(max(0, a - b) for a, b in zip(amount, other, strict=True)))
