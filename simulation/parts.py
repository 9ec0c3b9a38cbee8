"""Simulated sides of the ports: text, members, store, clocks and ranks, each with its faults.

Owns what stands in for a tokenizer, Serve's metadata, Redis, a machine's clock and rank processes.
Does not know schedules or scenarios.
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
from simulation.hash_runner import HashModel, MemoryKV


class InlineDecoder:
    """Token ids as letters, instead of the text decoder; each tenth waits for its successor."""

    def __init__(self) -> None:
        """Nothing is held back."""
        self._held = ""

    def push(self, token_id: int) -> str:
        """One letter a token, some of them late, as with tokens that end inside a character."""
        letter = chr(32 + token_id)
        held = self._held
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
        self.members = members
        self.written_at = asyncio.get_running_loop().time()

    def empty(self) -> None:
        """Forget everything, as after a restart without a disk."""
        self.members = ""
        self.written_at = -1.0

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
    """The hash model as a restartable runner, with the faults a rank group can have.

    A restart goes in the order of `RankGroup.restart`: the old group is stopped, processes are
    spawned (`spawn_s`), their fresh memory takes the old one's place, the model loads (`load_s`).
    """

    def __init__(
        self,
        model: HashModel,
        kv: MemoryKV,
        rng: random.Random,
        on_step: Callable[[StepPlan], None],
        spawn_s: float = 0.05,
        load_s: float = 0.45,
    ) -> None:
        """Wrap a model over its pool; `on_step` checks the books at every step boundary."""
        self._model = model
        self._kv = kv
        self._rng = rng
        self._on_step = on_step
        self._spawn_s = spawn_s
        self._load_s = load_s
        self.on_lost: Callable[[], None] = lambda: None
        self.dies_next = False
        self.fails_next = 0
        self.stuck_for_s = 0.0
        self.slow_for_s = 0.0
        self.poison: Callable[[StepPlan], bool] = lambda plan: False
        self.num_bitten = 0
        self.is_executing = False
        self.layers_done = 0

    async def execute(self, plan: StepPlan, on_layer: OnLayer) -> StepResult:
        """See `Runner`."""
        self._on_step(plan)
        self.is_executing = True
        try:
            return await self._execute(plan, on_layer)
        finally:
            self.is_executing = False

    async def _execute(self, plan: StepPlan, on_layer: OnLayer) -> StepResult:
        if self.stuck_for_s:
            stuck_for_s, self.stuck_for_s = self.stuck_for_s, 0.0
            self.num_bitten += 1
            await asyncio.sleep(stuck_for_s)
        if self.dies_next or self.poison(plan):
            self.dies_next = False
            self.num_bitten += 1
            raise WorkerDied("the rank process died; its KV cache is lost")

        def layer_done(step_id: int, layer: int) -> None:
            self.layers_done += 1
            if plan.report_layers:  # as ranks do: they count every layer, and speak of some
                on_layer(step_id, layer)

        result = await self._model.execute(plan, layer_done)
        if self.fails_next:
            self.fails_next -= 1
            self.num_bitten += 1
            key = self._rng.choice(plan.items).sequence_key
            tokens = {k: v for k, v in result.tokens.items() if k[0] != key}
            result = StepResult(
                result.step_id, tokens, {key: "injected: non-finite logits"}, result.scored
            )
        return result

    def take_slowness_s(self) -> float:
        """How much longer the next step takes, spread over its layers; once."""
        slow_for_s, self.slow_for_s = self.slow_for_s, 0.0
        self.num_bitten += slow_for_s > 0
        return slow_for_s

    def die_between_steps(self) -> None:
        """The group's watch finds it dead while no step runs."""
        self.num_bitten += 1
        self.on_lost()

    async def restart(self) -> None:
        """Start a fresh rank group over fresh memory."""
        await asyncio.sleep(self._spawn_s)
        self._kv.replace()
        await asyncio.sleep(self._load_s)

    def rank_pids(self) -> tuple[int, ...]:
        """No processes."""
        return ()
