"""A worker put together and its life; the same in production and simulation.

Owns the wiring, the order of start and stop, draining, and the replacement of lost ranks. Does not
know which role, which network or which runner it gets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from core import events
from core.config import TierConfig
from core.errors import Draining, InvariantViolation, WorkerLost
from core.plan import StepPlan
from core.session import Load, Progress, Task, WorkerDescriptor
from core.types import CANARY_TIER
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_tables import Limits
from engine.scheduling.events import SchedulerEvent
from engine.scheduling.order import ArrivalOrder
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.storage_tiers import StorageTiers
from kv_transfer.agent_thread import AgentThread
from worker.attempts import AttemptTable
from worker.availability import Availability
from worker.components import Loops, WorkerComponents
from worker.session_server import SessionServer
from worker.step_loop import StepLoop
from worker.stored_prefixes import StoredPrefixes, make_origins, make_tiers

CANARY_LEAD_S = 3_600.0
"""Canaries go before all that came within so long before them, and take a place if none is free."""
LEAVE_S = 0.25
"""How long a draining worker waits for what was placed on it before routers knew of that."""


def compose(components: WorkerComponents, agent_thread: AgentThread | None = None) -> Worker:
    """Put a worker together, on the running loop; nothing listens yet.

    Args:
        components: What it is made of.
        agent_thread: Where its transfer agent runs; None: on the running loop, too.
    """
    engine = components.engine
    limits = Limits(
        block_size_tokens=engine.block_size_tokens,
        max_step_tokens=engine.max_step_tokens,
        # A running sequence takes a token of every step; one more is for a prompt to go on.
        max_sequences=max(1, min(engine.max_sequences, engine.max_step_tokens - 1)),
        max_model_len=components.max_model_len,
        is_prefix_cache_on=engine.cache_prefixes,
    )
    origins = make_origins(components) if components.stores else None
    scheduler = Scheduler(
        BlockPool(engine.num_blocks, components.block_changes),
        limits,
        components.layout.content_digest,
        components.hash_key,
        order=order_of(components.tiers),
        origins=origins,
    )
    tiers = None if origins is None else make_tiers(components, scheduler, origins)
    return Worker(components, scheduler, agent_thread, tiers)


def order_of(tiers: Mapping[str, TierConfig]) -> ArrivalOrder:
    """Make the order of a cluster with these tiers."""
    # Canaries show that requests get through, not how long the line is.
    delays_s = {name: tier.delay_s for name, tier in tiers.items()} | {CANARY_TIER: -CANARY_LEAD_S}
    return ArrivalOrder(
        delays_s,
        {name: tier.tenant_weights for name, tier in tiers.items()},
    )


class Worker:
    """One worker, whole; `compose` makes it."""

    def __init__(
        self,
        components: WorkerComponents,
        scheduler: Scheduler,
        agent_thread: AgentThread | None,
        tiers: StorageTiers | None,
    ) -> None:
        """Wire everything; nothing listens yet."""
        self.components = components
        self.scheduler = scheduler
        self.pool = scheduler.pool
        self._runner = components.runner
        self._thread = agent_thread
        self.availability = Availability()
        self.step_loop = StepLoop(scheduler, components.runner, components.clock)
        self.stored = None
        """Its storage tiers below the pool, if it has any."""
        if tiers is not None:
            self.stored = StoredPrefixes(tiers, components, scheduler, self.step_loop.wake)
        self.attempts = AttemptTable(
            scheduler,
            components,
            self.availability,
            self.step_loop,
            self.stored,
            Loops.join(
                agent_thread.loop if agent_thread else asyncio.get_running_loop(), self.break_down
            ),
        )
        self.role = self.attempts.role
        self.agent = self.role.agent
        """Of the role's hand-overs."""
        self.transfers = self.attempts.transfers
        self.descriptor: WorkerDescriptor = components.describe()
        """Who it is and, once it has started, where it listens."""
        self._session_server = SessionServer(
            components.session_network,
            self.attempts.sessions,
            self.attempts,
            self,
            components.clock,
            lambda: self.step_loop.num_steps,
        )
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def fatal(self) -> asyncio.Future[None]:
        """Set to what ended the worker."""
        return self.availability.fatal

    @property
    def is_ready(self) -> bool:
        """True while it takes attempts."""
        return self.availability.is_ready

    @property
    def is_idle(self) -> bool:
        """True while no step runs and nothing has asked for one."""
        return self.is_ready and self.step_loop.is_idle

    # --- start and end ----------------------------------------------------------------------------

    async def start(self) -> WorkerDescriptor:
        """Listen on both ports; returns the descriptor to publish."""
        if self.stored is not None:
            await self.stored.start()
        # The agent first: a router that has opened a session may send a Submit at once.
        if self._thread is None:
            transfer_address = await self.transfers.listen()
        else:
            transfer_address = await self._thread.call(self.transfers.listen())
        self.descriptor = replace(
            self.descriptor,
            session_address=await self._session_server.listen(),
            transfer_address=transfer_address,
        )
        steps = self.step_loop.run(self._deliver, self.role.layer_done, self._ranks_lost)
        for coroutine in (steps, self.step_loop.watch_runner(), self._session_server.watch()):
            task = asyncio.get_running_loop().create_task(coroutine)
            task.add_done_callback(self._task_done)
            self._tasks.append(task)
        return self.descriptor

    def _deliver(self, happened: list[SchedulerEvent]) -> None:
        """Between two steps: attempts get their tokens, and blocks about to go are kept."""
        self.attempts.deliver(happened)
        if self.stored is not None:
            self.stored.write_back()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.break_down(
                task.exception() or InvariantViolation("a task that never ends has ended")
            )

    def break_down(self, error: BaseException) -> None:
        """End the worker: something it cannot go on without has broken. The first error is kept."""
        self.availability.break_down(error)

    async def stop(self) -> None:
        """Stop at once, then the agent; open attempts are lost unless `drain` has moved them."""
        await self._session_server.close()
        for run_id, attempt in list(self.attempts.by_run.items()):
            self.attempts.cancel(run_id, attempt.epoch)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.stored is not None:
            await self.stored.stop()
        # Last: the attempts' ends above still ask the agent to close their transfers.
        if self._thread is None:
            await self.transfers.stop()
        else:
            await self._thread.call(self.transfers.stop())
            self._thread.stop()

    async def drain(self, grace_s: float) -> bool:
        """Leave service: nothing new, hand-overs end, everything else moves to another worker.

        Args:
            grace_s: Longest wait for routers to take their attempts back.

        Returns:
            True if nothing was left.
        """
        by_run = self.attempts.by_run
        self.availability.drain()
        events.DRAIN_BEGUN.log(running=len(by_run), grace_s=grace_s)
        self._session_server.progress_changed()
        moving = Draining("the worker is shutting down; the request moves to another one")
        for attempt in list(by_run.values()):
            if attempt.submit.task is not Task.PREFILL:
                self.attempts.end(attempt, moving)
        # Without this an idle worker would be gone before a Submit on its way arrives, and the
        # router would count a fault.
        leave_s = min(LEAVE_S, grace_s)
        await asyncio.sleep(leave_s)
        grace_s -= leave_s
        # A prompt under way is worth more finished than moved, and its blocks may be unread: half
        # the time is its own.
        for error in (moving, None):
            try:
                async with asyncio.timeout(grace_s / 2):
                    # An ended attempt stays until its router's Cancel: then the router knows.
                    while by_run:
                        self.attempts.emptied.clear()
                        await self.attempts.emptied.wait()
            except TimeoutError:
                for attempt in list(by_run.values()) if error else ():
                    self.attempts.end(attempt, error)
        events.DRAIN_ENDED.log(left=len(by_run))
        return not by_run

    async def _ranks_lost(self, error: WorkerLost, plan: StepPlan) -> None:
        """Every request in the engine ends with the rank group; a fresh group takes over.

        Only requests in the fatal step are under suspicion of having caused it.
        """
        self.availability.pause()
        events.RANKS_LOST.log(
            worker_id=self.descriptor.worker_id,
            reason=error.message,
            rank_pids=self._runner.rank_pids(),
            attempts=len(self.attempts.by_run),
        )
        in_step = {item.sequence_key for item in plan.items}
        for attempt in list(self.attempts.by_run.values()):
            was_in_step = any(s.key in in_step for s in attempt.sequences)
            self.attempts.end(attempt, error if was_in_step else WorkerLost(error.message))
        # Whatever is left in the engine has no KV any more, attempt or not.
        self.scheduler.fail_all()
        self._session_server.progress_changed()
        await self._runner.restart()
        self.availability.resume()
        self._session_server.progress_changed()

    # --- what can be asked of it ------------------------------------------------------------------

    def progress(self) -> Progress:
        """Read the current counters."""
        pool = self.pool
        scheduler = self.scheduler
        return Progress(
            steps=self.step_loop.num_steps,
            layers_done=self._runner.layers_done,
            work_in_hand=self.step_loop.plan is not None,
            load=Load(
                num_waiting=len(scheduler.waiting),
                num_running=len(scheduler.running) + len(scheduler.arriving),
                waiting_tokens=scheduler.num_waiting_tokens,
                free_blocks=pool.num_free,
                cached_blocks=pool.num_cached,
                num_preemptions=scheduler.num_preemptions,
            ),
            rank_pids=self._runner.rank_pids(),
            is_ready=self.is_ready,
            is_leaving=self.availability.is_leaving,
            storage=self.stored.loads() if self.stored is not None else (),
        )

    def check_at_rest(self) -> None:
        """Look for anything a past request left behind.

        Raises:
            InvariantViolation: Names what is left.
        """
        self.pool.check()
        left = {
            "held blocks": self.pool.num_held,
            "attempts": len(self.attempts.by_run),
            "sequences": len(self.scheduler.running) + len(self.scheduler.waiting),
            "holding": len(self.scheduler.holding),
            "arriving": len(self.scheduler.arriving),
            **self.transfers.left(),
            "blocks being loaded": self.stored.num_live if self.stored else 0,
        }
        found = {name: count for name, count in left.items() if count}
        if found:
            raise InvariantViolation(f"worker {self.descriptor.worker_id} is not at rest: {found}")
