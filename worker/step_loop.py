"""The loop: plan, execute, commit.

Owns the order of the three and what happens when a step or the rank group fails. Does not know
roles, transfers or sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from core.errors import WorkerLost
from core.plan import StepPlan
from core.ports import Clock, Runner
from engine.scheduling.events import SchedulerEvent
from engine.scheduling.scheduler import Scheduler

IDLE = StepPlan(0, ())


class StepLoop:
    """Runs steps while there is work, and waits for `wake` while there is none."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        clock: Clock,
        deliver: Callable[[list[SchedulerEvent]], None],
        layer_done: Callable[[StepPlan, int], None],
        rank_lost: Callable[[WorkerLost, StepPlan], Awaitable[None]],
    ) -> None:
        """Keep the collaborators; `run` is the loop."""
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._deliver = deliver
        self._layer_done = layer_done
        self._rank_lost = rank_lost
        self._wake = asyncio.Event()
        self._is_runner_lost = False
        self.plan: StepPlan | None = None
        self.num_steps = 0

    @property
    def is_idle(self) -> bool:
        """True while the loop waits for `wake`."""
        return self.plan is None and not self._wake.is_set()

    def wake(self) -> None:
        """Something changed that may allow a step, or an arrival its blocks: a step may be long."""
        self._wake.set()
        if self.plan is not None:
            self._scheduler.reserve_in_turn(self._clock.now_s())
            self._deliver(self._scheduler.take_events())

    def runner_lost(self) -> None:
        """The rank group died between two steps."""
        self._is_runner_lost = True
        self._wake.set()

    async def run(self) -> None:
        """Plan, execute, commit, for ever."""
        while True:
            self._wake.clear()
            if self._is_runner_lost:
                await self._runner_gone(
                    WorkerLost("the rank group died; its KV cache is lost"), IDLE
                )
            self.plan = plan = self._scheduler.plan(self._clock.now_s())
            self._deliver(self._scheduler.take_events())
            if not plan.items:
                self.plan = None
                await self._wake.wait()
                continue
            started_at = self._clock.now_s()
            try:
                result = await self._runner.execute(plan, self._on_layer)
            except WorkerLost as error:
                self.plan = None
                await self._runner_gone(error, plan)
                continue
            self.plan = None
            self.num_steps += 1
            self._scheduler.budget.fit(plan.num_tokens, self._clock.now_s() - started_at)
            self._deliver(self._scheduler.commit(plan, result, self._clock.now_s()))

    async def _runner_gone(self, error: WorkerLost, plan: StepPlan) -> None:
        await self._rank_lost(error, plan)
        self._is_runner_lost = False

    def _on_layer(self, step_id: int, layer: int) -> None:
        if self.plan is not None and self.plan.step_id == step_id:
            self._layer_done(self.plan, layer)
