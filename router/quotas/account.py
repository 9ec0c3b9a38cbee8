"""One key's ledger at one router, kept equal to the one in the store.

Owns the claims that wait for a decision, and the turns in which the ledger is replaced. Does not
know why the store may be away.

Who holds the lock decides all claims that wait, with one call: the ledger with their charges in it
replaces the one in the store. If another router was faster, its ledger is merged and everything is
decided again. After a call that failed, nobody knows whether it was carried out: the charges of the
draft are kept and given back, which is right in either case.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from core.errors import RateLimited
from core.ports import NO_ENTRY
from router.quotas.ledger import NOTHING, Amount, Ledger, less
from router.quotas.ledger_store import LedgerStore, StoreAnswer
from router.quotas.rules import Sharing, refusal
from router.quotas.shared_clock import SharedClock


@dataclass(eq=False, slots=True)
class Charge:
    """What one request was charged; settled once, when the request ends."""

    second: int
    """Of the clock as it ran before it first moved: a request may outlast several moves."""
    amount: Amount
    """Without what earlier runs of the request have paid."""
    paid: Amount = NOTHING
    idempotency_key: str = ""
    """Of a request that may run again for the same charge; empty: of one that may not."""
    owner: str = ""
    is_settled: bool = False


@dataclass(eq=False, slots=True)
class Claim:
    """A request that waits to be charged."""

    limits: Amount
    amount: Amount
    idempotency_key: str
    outcome: Charge | RateLimited | None = None
    doubtful: list[Charge] = field(default_factory=list)
    """Of calls that failed: perhaps they were carried out, and another run leans on them."""


class Account:
    """The ledger of one key."""

    def __init__(
        self,
        key: str,
        router: str,
        clock: SharedClock,
        read_sharing: Callable[[], Sharing],
        new_owner: Callable[[], str],
    ) -> None:
        """Start with an empty ledger of this router's."""
        self.key = key
        self.ledger = Ledger(router)
        self.lock = asyncio.Lock()
        self.is_dirty = False
        """The store does not have all of it."""
        self._known = NO_ENTRY
        self._waiting: dict[Claim, None] = {}
        self._endings: list[tuple[Charge, Amount]] = []
        """Charges of requests that may run again, and what was used, until it is known who leans on
        them."""
        self._clock = clock
        self._read_sharing = read_sharing
        self._new_owner = new_owner

    @property
    def is_idle(self) -> bool:
        """True if nothing of it counts or waits."""
        return not (self.ledger.slots or self._waiting or self.lock.locked())

    # --- claims -----------------------------------------------------------------------------------

    def claim(self, limits: Amount, amount: Amount, idempotency_key: str) -> Claim:
        """Let a request wait for a decision."""
        claim = Claim(limits, amount, idempotency_key)
        self._waiting[claim] = None
        return claim

    def leave(self, claim: Claim) -> None:
        """Stop waiting; what is charged already is given back."""
        self._waiting.pop(claim, None)
        if isinstance(claim.outcome, Charge):
            claim.doubtful.append(claim.outcome)
        for charge in claim.doubtful:
            self.settle(charge, NOTHING)

    async def decide(self, store: LedgerStore) -> None:
        """Decide every claim that waits; the lock is held, and the caller limits the time.

        Raises:
            StoreFailed: Nothing is decided.
        """
        is_fresh = False
        while not await self._try_to_decide(store, is_fresh=is_fresh):
            is_fresh = True  # a try that fails takes over what the store has

    async def _try_to_decide(self, store: LedgerStore, *, is_fresh: bool) -> bool:
        """Decide by the ledger as it is known, if the store still has the same.

        Args:
            store: Gets the charges.
            is_fresh: The ledger is the store's of just now: claims may be refused by it.

        Returns:
            False if nothing is decided; then more is known than before.
        """
        self._take_back()
        draft = self._draft()
        sharing = self._read_sharing()
        outcomes = {claim: self._outcome(claim, draft, sharing) for claim in self._waiting}
        charges = {claim: o for claim, o in outcomes.items() if isinstance(o, Charge)}
        if charges:
            answer = await self._replace(store, draft, charges)
            if not answer.is_written:
                return False
            is_share_new = self._read_sharing().is_share_only and not sharing.is_share_only
            if is_share_new or not answer.is_expected:
                # The store has lost something: decide again, by what it has and by the share.
                for charge in charges.values():
                    self._give_back(charge)
                return False
        elif not is_fresh:  # others may have refunded since
            self._merge(await store.read(self.key))
            return False
        for claim, outcome in outcomes.items():
            if claim in self._waiting:
                del self._waiting[claim]
                claim.outcome = outcome
            elif isinstance(outcome, Charge):  # it waits no longer
                self.settle(outcome, NOTHING)
        return True

    def decide_locally(self, claim: Claim, sharing: Sharing) -> Charge | RateLimited:
        """Decide a claim by what is known here."""
        self._take_back()
        self._waiting.pop(claim, None)
        self.ledger.prune(self._clock.now_ms() // 1000)
        claim.idempotency_key = ""  # who leans on the charge cannot be seen
        self.is_dirty = True
        return self._outcome(claim, self.ledger, sharing)

    def _outcome(self, claim: Claim, draft: Ledger, sharing: Sharing) -> Charge | RateLimited:
        now_ms = self._clock.now_ms()
        paid = draft.paid(claim.idempotency_key) if claim.idempotency_key else NOTHING
        second = now_ms // 1000
        charge = Charge(
            second - self._clock.moved_s, less(claim.amount, paid), paid, claim.idempotency_key
        )
        error = refusal(draft, charge.amount, claim.limits, sharing, now_ms)
        if error is not None:
            return error
        draft.charge(second, charge.amount)
        if claim.idempotency_key:
            charge.owner = self._new_owner()
            draft.begin(claim.idempotency_key, charge.owner, claim.amount, now_ms)
        return charge

    # --- endings ----------------------------------------------------------------------------------

    def settle(self, charge: Charge, used: Amount) -> None:
        """Refund what was charged and not used; only the first call counts.

        What was used beyond an estimate is charged now.
        """
        if charge.is_settled:
            return
        charge.is_settled = True
        self.is_dirty = True
        paid = Amount(*map(sum, zip(charge.paid, charge.amount, strict=True)))
        self.ledger.charge(self._clock.now_ms() // 1000, less(used, paid))
        if charge.idempotency_key:  # by now, a later run at another router may lean on it
            self._endings.append((charge, used))
        else:
            self._refund(self.ledger, charge, less(charge.amount, used))

    def _take_back(self) -> None:
        """Undo what calls that failed may have charged, as all of it is decided again."""
        for claim in self._waiting:
            for charge in claim.doubtful:
                self._give_back(charge)
            claim.doubtful.clear()

    def _give_back(self, charge: Charge) -> None:
        """Undo a charge that was written, or may have been."""
        charge.is_settled = True
        self.is_dirty = True
        self._refund(self.ledger, charge, charge.amount)
        if charge.idempotency_key:
            self.ledger.settle(charge.idempotency_key, charge.owner, charge.paid)

    def _refund(self, ledger: Ledger, charge: Charge, amount: Amount) -> None:
        ledger.refund(charge.second + self._clock.moved_s, amount)

    async def push(self, store: LedgerStore) -> None:
        """Write what the store does not have; the lock is held.

        Raises:
            StoreFailed: It may have been written.
        """
        while True:
            draft = self._draft()
            endings, self._endings = self._endings, []
            for charge, used in endings:
                counted = Amount(*map(max, charge.paid, used))
                if draft.settle(charge.idempotency_key, charge.owner, counted):
                    self._refund(draft, charge, less(charge.amount, less(counted, charge.paid)))
            answer = await self._replace(store, draft, {})
            if answer.is_written:
                return
            self._endings = endings + self._endings

    # --- the store --------------------------------------------------------------------------------

    def _draft(self) -> Ledger:
        draft = self.ledger.copy()
        draft.prune(self._clock.now_ms() // 1000)
        return draft

    async def _replace(
        self, store: LedgerStore, draft: Ledger, charges: Mapping[Claim, Charge]
    ) -> StoreAnswer:
        """Replace the ledger in the store by a draft that goes on from this one.

        Returns:
            What became of it. If another router was faster, this ledger has what that one wrote,
            and not the draft. If the store had something else than was known, it has both.
        """
        self.is_dirty = False  # what changes from here on is not in the draft
        moved_s = self._clock.moved_s
        try:
            answer = await store.replace(self.key, self._known, draft)
        except BaseException:
            self._adopt(draft, moved_s)
            self.is_dirty = True
            for claim, charge in charges.items():
                claim.doubtful.append(charge)
                if claim not in self._waiting:
                    self.leave(claim)
            raise
        if answer.is_written:
            self._adopt(draft, moved_s, has_runs=answer.is_expected or not charges)
        if not answer.is_expected:
            self.is_dirty = True  # what was found and what is here are not together in the store
        self._merge(answer)
        return answer

    def _adopt(self, draft: Ledger, moved_s: int, *, has_runs: bool = True) -> None:
        """Go on from a draft; without its runs, if they begin again by what others have begun."""
        # The answer may have moved the clock, and this ledger with it.
        draft.shift(self._clock.moved_s - moved_s)
        # Merged, not assigned: refunds may have come to the ledger since.
        self.ledger.merge(draft.slots, draft.runs if has_runs else {})

    def _merge(self, answer: StoreAnswer) -> None:
        self._known = answer.known
        if answer.other is not None:
            slots = {(router, second): slot for router, second, slot in answer.other.slots}
            self.ledger.merge(slots, answer.other.runs)
