"""Simulated sides of the ports: text, members, store and clocks, each with its faults.

Owns what stands in for a tokenizer, Serve's metadata, Redis and a machine's clock. Does not know
schedules or scenarios.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import Literal

from core.ids import WorkerId
from core.ports import StoreFailed
from core.session import WorkerDescriptor


class InlineDecoder:
    """Token ids as letters, instead of the text decoder; each tenth waits for its successor."""

    def __init__(self) -> None:
        """Hold nothing back yet."""
        self._held = ""

    def push(self, token_id: int) -> str:
        """Return one letter a token, some late, as with tokens that end inside a character."""
        letter = chr(32 + token_id)
        held = self._held
        # Decided by the token alone, so that the oracle and a resumed stream cut alike.
        if token_id % 10 == 0:
            self._held = held + letter
            return ""
        self._held = ""
        return held + letter

    def flush(self) -> str:
        """Return what is still held back."""
        held, self._held = self._held, ""
        return held


class StaticMembership:
    """A list that the simulation edits."""

    def __init__(self) -> None:
        """Start empty."""
        self._members: dict[WorkerId, WorkerDescriptor] = {}
        self._watchers: list[tuple[contextvars.Context, Callable[[], None]]] = []
        self.starting = 0

    def join(self, descriptor: WorkerDescriptor) -> None:
        """Add or replace a member."""
        self._members[descriptor.worker_id] = descriptor
        self.notify()

    def leave(self, worker_id: WorkerId) -> None:
        """Remove a member."""
        self._members.pop(worker_id, None)
        self.notify()

    def notify(self) -> None:
        """Call everyone who watches, each on its own node."""
        for context, on_change in self._watchers:
            context.copy().run(on_change)  # a copy: a context cannot be entered twice

    def members(self) -> tuple[WorkerDescriptor, ...]:
        """See `Membership`."""
        return tuple(self._members.values())

    def watch(self, on_change: Callable[[], None]) -> None:
        """See `Membership`."""
        self._watchers.append((contextvars.copy_context(), on_change))

    def is_starting(self) -> bool:
        """See `Membership`."""
        return self.starting > 0


class MemoryStore:
    """The store, one for all routers; `mode` is its health."""

    def __init__(self) -> None:
        """Start empty and healthy."""
        self.mode: Literal["ok", "down", "slow"] = "ok"
        self.members = ""
        self.written_at = -1.0
        self.num_refused = 0

    async def put(self, members: str, ttl_s: float) -> None:
        """See `MemberStore`."""
        # Slow is slower than the 50 ms that a caller waits.
        await asyncio.sleep(0.1 if self.mode == "slow" else 0.001)
        if self.mode != "ok":
            self.num_refused += 1
            raise StoreFailed(f"the store is {self.mode}")
        self.members = members
        self.written_at = asyncio.get_running_loop().time()

    def empty(self) -> None:
        """Forget everything, as after a restart without a disk."""
        self.members = ""
        self.written_at = -1.0

    async def close(self) -> None:
        """See `MemberStore`."""


class NodeClock:
    """A node's monotonic clock: it began somewhere else than the others, leaps, drifts or stands.

    What reads it is all that sees it: timers of the node go on with the loop.
    """

    def __init__(self, offset_s: float = 0.0) -> None:
        """Be ahead of the world by so much."""
        self._offset_s = offset_s
        self._gained_s = 0.0
        self._missed_s = 0.0
        self._rate = 1.0
        self._rated_at_s = 0.0

    def now_s(self) -> float:
        """See `Clock`."""
        return asyncio.get_running_loop().time() + self._offset_s + self._drift_s()

    @property
    def gained_s(self) -> float:
        """By which it has run faster than the world, in all."""
        return self._gained_s + max(0.0, self._drift_s())

    @property
    def missed_s(self) -> float:
        """By which it has run slower."""
        return self._missed_s + max(0.0, -self._drift_s())

    def leap(self, by_s: float) -> None:
        """Go forward at once, as after a machine's sleep."""
        self._offset_s += by_s
        self._gained_s += by_s

    def run_at(self, rate: float) -> None:
        """Count so many seconds in each of the world's from now on; 0: stand still."""
        self._gained_s = self.gained_s
        self._missed_s = self.missed_s
        self._offset_s += self._drift_s()
        self._rate = rate
        self._rated_at_s = asyncio.get_running_loop().time()

    def _drift_s(self) -> float:
        if self._rate == 1.0:
            return 0.0
        return (self._rate - 1) * (asyncio.get_running_loop().time() - self._rated_at_s)
