"""Quotas of all keys at one router.

Owns the accounts, when the store is written, and when it counts as away. Does not know tiers, what
requests are, or Redis.

A request waits for the store for at most 50 ms, and not at all while it is known to be away: then
this router decides by what it knows of all, and grants no more than its share.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable

from core import events
from core.errors import RateLimited
from core.ports import Clock, QuotaStore, StoreFailed
from router.quotas.account import Account, Charge
from router.quotas.ledger import Amount, Ledger
from router.quotas.ledger_store import LedgerStore
from router.quotas.rules import Sharing, Standing, check_ever_fits, standing
from router.quotas.shared_clock import NEVER_MS, SharedClock
from router.quotas.values import ValueCodec

CALL_TIMEOUT_S = 0.05
PERIOD_S = 1.0
"""How often a router looks at the store without being asked."""
PUSH_PAUSE_S = 0.05
"""Endings come in bunches: one call writes all that came meanwhile."""
GRACE_MS = 2_500
"""How long after a loss routers grant only their shares; each writes what it knows in a period."""
FAILURES_TO_BREAK = 3


class Quotas:
    """The accounts of one router."""

    def __init__(
        self,
        router: str,
        num_routers: int,
        store: QuotaStore | None,
        codec: ValueCodec,
        clock: Clock,
        on_local_decision: Callable[[], None] = lambda: None,
    ) -> None:
        """Start without accounts.

        Args:
            router: Unlike any other's, and unlike that of an earlier life.
            num_routers: Of the cluster.
            store: Shared by all routers; None: each decides locally.
            codec: Of the values in it.
            clock: This router's own.
            on_local_decision: Called for each decision without the store.
        """
        self._router = router
        self._num_routers = num_routers
        self._numbers = itertools.count()
        self._clock = SharedClock(clock, codec, self._unique, self._shift)
        self._store = (
            None if store is None else LedgerStore(store, codec, self._clock, self._note_loss)
        )
        self._on_local_decision = on_local_decision
        self._accounts: dict[str, Account] = {}
        self._num_failures = 0
        """In a row."""
        self._wake = asyncio.Event()
        self._renewal_due_ms = 0
        self._returned_ms = NEVER_MS
        """When the store was last found to be back."""
        self.is_local = store is None
        """True while no request asks the store."""

    # --- requests ---------------------------------------------------------------------------------

    async def charge(self, key: str, limits: Amount, amount: Amount, name: str = "") -> Charge:
        """Charge a request before it runs; `settle` it when it has ended.

        Args:
            key: Whom.
            limits: In a minute.
            amount: One request, and the most tokens that it can use.
            name: Of a request whose runs are charged once; empty: of one that runs once.

        Raises:
            InvalidRequest: It would not fit into an empty minute.
            RateLimited: It does not fit now.
        """
        check_ever_fits(amount, limits)
        account = self._account(key)
        claim = account.claim(limits, amount, _digest(name) if name else "")
        is_asking = False  # one that has only waited for others' call says nothing of the store
        try:
            if self._store is not None and not self.is_local:
                async with asyncio.timeout(CALL_TIMEOUT_S), account.lock:
                    if claim.outcome is None:
                        is_asking = True
                        await self._decide(account, self._store)
        except (StoreFailed, TimeoutError) as error:
            if is_asking:
                self._note_failure(error)
        except BaseException:
            account.leave(claim)
            raise
        finally:
            if account.is_dirty:  # something was given back
                self._wake.set()
        outcome = claim.outcome
        if outcome is None:
            self._on_local_decision()
            outcome = account.decide_locally(claim, self._sharing_alone())
            self._wake.set()
        if isinstance(outcome, RateLimited):
            raise outcome
        return outcome

    def settle(self, key: str, charge: Charge, used: Amount) -> None:
        """Refund what a request was charged and has not used; only the first call counts."""
        # Perhaps anew: a request may outlast the window, and its account is forgotten by then.
        self._account(key).settle(charge, used)
        self._wake.set()

    def standing(self, key: str, limits: Amount) -> Standing:
        """Return how a key stands, as far as this router knows."""
        account = self._accounts.get(key)
        ledger = account.ledger if account is not None else Ledger(self._router)
        return standing(ledger, limits, self._sharing(), self._clock.now_ms())

    async def _decide(self, account: Account, store: LedgerStore) -> None:
        if not self._clock.is_shared:
            await store.renew_clock()
        await account.decide(store)
        self._num_failures = 0

    def _account(self, key: str) -> Account:
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = Account(
                key, self._router, self._clock, self._sharing, self._unique
            )
        return account

    def _sharing(self) -> Sharing:
        if self._num_routers == 1:
            return Sharing(1, is_share_only=False)
        if self.is_local:
            return Sharing(self._num_routers, is_share_only=True)
        # Other routers may not have written yet what they have granted by themselves.
        since_ms = max(self._clock.lost_ms, self._returned_ms)
        left_ms = since_ms + GRACE_MS - self._clock.now_ms()
        is_young = since_ms != NEVER_MS and left_ms > 0
        return Sharing(self._num_routers, is_young, left_ms / 1000 if is_young else None)

    def _sharing_alone(self) -> Sharing:
        """Without the store, be it for a single call: others may be granting as much."""
        sharing = self._sharing()
        if sharing.is_share_only or self._num_routers == 1:
            return sharing
        return Sharing(self._num_routers, is_share_only=True, ends_s=PERIOD_S)

    # --- the store --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Write what the store does not have, until cancelled."""
        if self._store is None:
            events.QUOTAS_LOCAL.log(reason="there is no store")
            return
        try:
            while True:
                await self._sync(self._store)
                await self._wait_for_changes()
        finally:
            await self._store.close()

    async def _sync(self, store: LedgerStore) -> None:
        """Renew the clock if that is due, and write every account that has changed."""
        try:
            if self.is_local or self._clock.now_ms() >= self._renewal_due_ms:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await store.renew_clock()
                self._num_failures = 0
                self._renewal_due_ms = self._clock.now_ms() + int(PERIOD_S * 1000)
            for account in list(self._accounts.values()):
                if account.is_dirty:
                    async with asyncio.timeout(CALL_TIMEOUT_S), account.lock:
                        await account.push(store)
        except (StoreFailed, TimeoutError) as error:
            self._note_failure(error)
            return
        if self.is_local:
            self._num_failures = 0
            self.is_local = False
            self._returned_ms = self._clock.now_ms()
            events.QUOTAS_SHARED.log()
        self._forget()

    async def _wait_for_changes(self) -> None:
        """Pause until there is something to write, for a period at most."""
        if self.is_local:
            await asyncio.sleep(PERIOD_S)
            return
        try:
            async with asyncio.timeout(PERIOD_S):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()
        await asyncio.sleep(PUSH_PAUSE_S)

    def _forget(self) -> None:
        """Drop the accounts of keys without a request in the window."""
        now_s = self._clock.now_ms() // 1000
        for key, account in list(self._accounts.items()):
            account.ledger.prune(now_s)
            if account.is_idle:
                del self._accounts[key]

    def _note_loss(self) -> None:
        """Write all that this router knows, of every router."""
        for account in self._accounts.values():
            account.is_dirty = True
        self._renewal_due_ms = 0
        self._wake.set()

    def _shift(self, seconds: int) -> None:
        """Move what was charged by another clock."""
        for account in self._accounts.values():
            account.ledger.shift(seconds)

    def _note_failure(self, error: Exception) -> None:
        self._num_failures += 1
        if self._num_failures >= FAILURES_TO_BREAK and not self.is_local:
            self.is_local = True
            events.QUOTAS_LOCAL.log(reason=str(error) or "no answer in time")

    def _unique(self) -> str:
        return f"{self._router}:{next(self._numbers)}"


def _digest(name: str) -> str:
    """Return a short idempotency key for a name of any length."""
    return hashlib.blake2b(name.encode(), digest_size=12).hexdigest()
