"""Simulated sides of the ports: text, members, store, clocks and ranks, each with its faults.

Owns what stands in for a tokenizer, Serve's metadata, Redis, a machine's clock and rank processes.
Does not know schedules or scenarios. Called by `simulation.cluster`.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable
from typing import Literal

from core.errors import WorkerDied
from core.ids import WorkerId
from core.plan import StepPlan, StepResult
from core.ports import OnLayer, StoreFailed
from core.session import WorkerDescriptor
from engine.hash_model import HashModel, MemoryKV

RESTART_S = 0.5
"""How long a rank group takes to start again."""
SPAWN_S = 0.05
"""The part of it before the new processes are there, with new memory; then they load the model."""


class InlineDecoder:
    """Token ids as letters; the simulated side of the text decoder. Every tenth letter waits for its successor."""

    def __init__(self) -> None:
        """Nothing is held back."""
        self._held = ""

    def push(self, token_id: int) -> str:
        """One letter a token, some of them late, as with tokens that end inside a character."""
        letter, held = chr(32 + token_id), self._held
        if token_id % 10 == 0:
            self._held = held + letter
            return ""
        self._held = ""
        return held + letter

    def flush(self) -> str:
        """What is still held back."""
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
        """Tell everyone who watches, each on its own node."""
        for context, on_change in self._watchers:
            context.copy().run(on_change)

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
        await asyncio.sleep(0.1 if self.mode == "slow" else 0.001)
        if self.mode != "ok":
            self.num_refused += 1
            raise StoreFailed(f"the store is {self.mode}")
        self.members, self.written_at = members, asyncio.get_running_loop().time()

    def empty(self) -> None:
        """Forget everything, as after a restart without a disk."""
        self.members, self.written_at = "", -1.0

    async def close(self) -> None:
        """See `MemberStore`."""


class NodeClock:
    """A node's monotonic clock: it began somewhere else than the others, and may leap forward."""

    def __init__(self) -> None:
        """Agree with the world at first."""
        self.offset_s = 0.0

    def now_s(self) -> float:
        """See `Clock`."""
        return asyncio.get_running_loop().time() + self.offset_s


class SimRunner:
    """The hash model as a restartable runner, with the faults a rank group can have."""

    def __init__(
        self,
        model: HashModel,
        kv: MemoryKV,
        rng: random.Random,
        on_step: Callable[[StepPlan], None],
    ) -> None:
        """Wrap a model and its memory; `on_step` checks the books at every step boundary."""
        self._model, self._kv, self._rng, self._on_step = model, kv, rng, on_step
        self.on_lost: Callable[[], None] = lambda: None
        self.dies_next = False
        self.fails_next = 0
        self.stuck_for_s = 0.0
        self.poison: Callable[[StepPlan], bool] = lambda plan: False
        self.num_bitten = 0

    async def execute(self, plan: StepPlan, on_layer: OnLayer) -> StepResult:
        """See `Runner`."""
        self._on_step(plan)
        if self.stuck_for_s:
            stuck_for_s, self.stuck_for_s = self.stuck_for_s, 0.0
            self.num_bitten += 1
            await asyncio.sleep(stuck_for_s)
        if self.dies_next or self.poison(plan):
            self.dies_next = False
            self.num_bitten += 1
            raise WorkerDied("the rank process died; its KV cache is lost")
        result = await self._model.execute(plan, on_layer)
        if self.fails_next:
            self.fails_next -= 1
            self.num_bitten += 1
            key = self._rng.choice(plan.items).sequence_key
            tokens = {k: v for k, v in result.tokens.items() if k[0] != key}
            result = StepResult(result.step_id, tokens, {key: "injected: non-finite logits"})
        return result

    async def restart(self) -> None:
        """A fresh rank group takes a while to start; its memory is new (`RankGroup.restart`)."""
        await asyncio.sleep(SPAWN_S)
        self._kv.replace()
        await asyncio.sleep(RESTART_S - SPAWN_S)

    def rank_pids(self) -> tuple[int, ...]:
        """No processes."""
        return ()
