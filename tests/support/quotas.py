"""Routers' quotas over one store in memory, on virtual time."""

import asyncio
import contextlib

from core.clocks import LoopClock
from core.errors import RateLimited
from router.quotas import quotas as quotas_module
from router.quotas.ledger import Amount
from router.quotas.quotas import Quotas
from router.quotas.values import ValueCodec
from simulation.loop import run_virtual
from simulation.quota_store import MemoryQuotaStore

CODEC = ValueCodec("a secret of sufficient length")
KEY = "0123abcd"
LIMITS = Amount(0, 1000)


class Shifted:
    """A router's clock that began elsewhere; it can be stopped."""

    def __init__(self, ahead_s=0.0):
        self.ahead_s = ahead_s

    def now_s(self):
        return LoopClock().now_s() + self.ahead_s


class Routers:
    """So many routers' quotas; as a context manager, with their tasks."""

    def __init__(self, count=2, store=None, clocks=None):
        self.store = MemoryQuotaStore() if store is None else store
        self.count = count
        self.local_decisions = []
        self.made = [self.new(f"r{i}", clocks[i] if clocks else LoopClock()) for i in range(count)]
        self._tasks = {}

    def new(self, name, clock=None):
        return Quotas(
            name,
            self.count,
            self.store,
            CODEC,
            clock or LoopClock(),
            lambda: self.local_decisions.append(name),
        )

    def __getitem__(self, index):
        return self.made[index]

    async def __aenter__(self):
        for quotas in self.made:
            self.start(quotas)
        await asyncio.sleep(0.2)
        return self

    def start(self, quotas):
        self._tasks[quotas] = asyncio.create_task(quotas.run())

    async def kill(self, quotas):
        """Without a word from it."""
        task = self._tasks.pop(quotas)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def __aexit__(self, *_):
        for quotas in list(self._tasks):
            await self.kill(quotas)


async def take(quotas, tokens, request_id="", limits=LIMITS, key=KEY):
    """The charge, or None if the key is over its limit."""
    with contextlib.suppress(RateLimited):
        return await quotas.charge(key, limits, Amount(1, tokens), request_id)
    return None


async def refused(quotas, tokens, request_id="", limits=LIMITS, key=KEY):
    """The error."""
    try:
        await quotas.charge(key, limits, Amount(1, tokens), request_id)
    except RateLimited as error:
        return error
    raise AssertionError("it was granted")


def left(quotas, limits=LIMITS, key=KEY):
    return quotas.standing(key, limits).left.tokens


PERIOD_S = quotas_module.PERIOD_S
GRACE_S = quotas_module.GRACE_MS / 1000


def virtual(test):
    """Run an async test on virtual time."""

    def run():
        run_virtual(test())

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run
