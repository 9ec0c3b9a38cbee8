"""The loop: plan, execute, commit.

Owns the order of the three and what happens when a step or the rank group fails. Does not know
roles, transfers or sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from core.errors import WorkerLost
from core.plan import StepPlan
from core.ports import Clock
from engine.scheduling.events import SchedulerEvent
from engine.scheduling.scheduler import Scheduler
from worker.ports import RestartableRunner

IDLE = StepPlan(0, ())

Deliver = Callable[[list[SchedulerEvent]], None]
LayerDone = Callable[[StepPlan, int], None]
RanksLost = Callable[[WorkerLost, StepPlan], Awaitable[None]]


class StepLoop:
    """Runs steps while there is work, and waits for `wake` while there is none."""

    def __init__(self, scheduler: Scheduler, runner: RestartableRunner, clock: Clock) -> None:
        """Keep the collaborators; `run` is the loop."""
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._wake = asyncio.Event()
        self._is_runner_lost = False
        self.plan: StepPlan | None = None
        """The step that runs."""
        self.num_steps = 0

    @property
    def is_idle(self) -> bool:
        """True while the loop waits for `wake`."""
        return self.plan is None and not self._wake.is_set()

    def wake(self) -> None:
        """Plan again: something changed that may allow a step."""
        self._wake.set()

    async def watch_runner(self) -> None:
        """Wake the loop whenever the rank group dies between two steps, for ever."""
        while True:
            await self._runner.lost()
            self._is_runner_lost = True
            self._wake.set()

    async def run(self, deliver: Deliver, layer_done: LayerDone, ranks_lost: RanksLost) -> None:
        """Plan, execute, commit, for ever.

        Args:
            deliver: Takes the scheduler's events, before and after each step.
            layer_done: Called in the middle of a step as each layer is complete.
            ranks_lost: Replaces the rank group that died in the step given, or between two.
        """

        def on_layer(step_id: int, layer: int) -> None:
            # A dying rank group may still report layers of the step that it died in.
            plan = self.plan
            if plan is not None and plan.step_id == step_id:
                layer_done(plan, layer)

        while True:
            # Cleared before the plan is made: what happens after that wakes the loop again.
            self._wake.clear()
            if self._is_runner_lost:
                lost = WorkerLost("the rank group died; its KV cache is lost")
                await ranks_lost(lost, IDLE)
                # Cleared late: the dead group is reported until the fresh one has replaced it.
                self._is_runner_lost = False
            self.plan = plan = self._scheduler.plan(self._clock.now_s())
            deliver(self._scheduler.take_events())
            if not plan.items:
                self.plan = None  # an empty plan is no work in hand: progress would report a hang
                await self._wake.wait()
                continue
            started_at = self._clock.now_s()
            try:
                result = await self._runner.execute(plan, on_layer)
            except WorkerLost as error:
                self.plan = None
                await ranks_lost(error, plan)
                self._is_runner_lost = False  # late, as above
                continue
            self.plan = None
            self.num_steps += 1
            # The budget learns how long a token takes, so that a step stays under its time.
            self._scheduler.budget.fit(plan.num_tokens, self._clock.now_s() - started_at)
            deliver(self._scheduler.commit(plan, result, self._clock.now_s()))
