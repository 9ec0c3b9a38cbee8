"""Simulated ranks: the hash model as a restartable runner.

Owns the faults that a rank group can have: dead, stuck, slow, failing. Does not know schedules.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from core.errors import WorkerDied
from core.kv_layout import KVLayout
from core.plan import StepPlan, StepResult
from core.ports import OnLayer
from simulation.hash_runner import HashModel, MemoryKV


class SimRunner:
    """The hash model as a restartable runner, with the faults a rank group can have.

    A restart goes in the order of `RankGroup.restart`: the old group is stopped, processes are
    spawned (`spawn_s`), their fresh memory takes the old one's place, the model loads (`load_s`).
    """

    def __init__(
        self,
        kv: MemoryKV,
        layout: KVLayout,
        vocabulary_size: int,
        rng: random.Random,
        cost_s: Callable[[StepPlan], float],
        on_step: Callable[[StepPlan], None],
        spawn_s: float = 0.05,
        load_s: float = 0.45,
    ) -> None:
        """Make a model over a pool.

        Args:
            kv: The pool.
            layout: What a block of it looks like.
            vocabulary_size: Of the model.
            rng: Chooses whose step fails.
            cost_s: Virtual duration of a step.
            on_step: Checks the books at every step boundary.
            spawn_s: To start processes.
            load_s: To load the model.
        """
        self._kv = kv
        self._model = HashModel(
            layout,
            kv,
            vocabulary_size,
            asyncio.sleep,
            lambda plan: cost_s(plan) + self._take_slowness_s(),
        )
        self._rng = rng
        self._on_step = on_step
        self._spawn_s = spawn_s
        self._load_s = load_s
        self._lost = asyncio.Event()
        self.dies_next = False
        self.fails_next = 0
        self.stuck_for_s = 0.0
        self.slow_for_s = 0.0
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
        if self.dies_next:
            self.dies_next = False
            self.num_bitten += 1
            raise WorkerDied("the rank process died; its KV cache is lost")

        def layer_done(step_id: int, layer: int) -> None:
            self.layers_done += 1
            if plan.report_layers:  # as ranks do: they count every layer, and report some
                on_layer(step_id, layer)

        result = await self._model.execute(plan, layer_done)
        if self.fails_next:
            self.fails_next -= 1
            self.num_bitten += 1
            # One sequence of the step fails; the others must not notice.
            key = self._rng.choice(plan.items).sequence_key
            tokens = {k: v for k, v in result.tokens.items() if k[0] != key}
            result = StepResult(
                result.step_id, tokens, {key: "injected: non-finite logits"}, result.scored
            )
        return result

    def _take_slowness_s(self) -> float:
        """Return how much longer the next step takes, spread over its layers; once."""
        slow_for_s, self.slow_for_s = self.slow_for_s, 0.0
        self.num_bitten += slow_for_s > 0
        return slow_for_s

    def die_between_steps(self) -> None:
        """Die while no step runs: the group's watch finds it."""
        self.num_bitten += 1
        self._lost.set()

    async def lost(self) -> None:
        """Wait for the next death between two steps."""
        await self._lost.wait()
        self._lost.clear()

    async def restart(self) -> None:
        """Start a fresh rank group over fresh memory."""
        await asyncio.sleep(self._spawn_s)
        # Before the model loads, as in a rank group: transfers under way meet a pool that is fresh
        # and not in use yet.
        self._kv.replace()
        await asyncio.sleep(self._load_s)

    def rank_pids(self) -> tuple[int, ...]:
        """Return none: there are no processes."""
        return ()
