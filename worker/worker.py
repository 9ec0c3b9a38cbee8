"""A worker put together: books, scheduler, role, agent; the same in production and simulation.

Owns the wiring and the order of start and stop. Does not know which role, which network or which
runner it gets.
"""

from __future__ import annotations

import asyncio

from core.errors import InvariantViolation
from core.session import WorkerDescriptor
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_tables import Limits
from engine.scheduling.scheduler import Scheduler
from kv_transfer.agent_thread import AgentThread
from worker.attempts import AttemptTable
from worker.components import Loops, WorkerComponents
from worker.ports import Attempts, WorkerRole


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
        is_prefix_cache_on=engine.is_prefix_cache_on,
    )
    scheduler = Scheduler(
        BlockPool(engine.num_blocks, components.block_changes),
        limits,
        components.layout.content_digest,
        components.hash_key,
    )
    agent_loop = agent_thread.loop if agent_thread else asyncio.get_running_loop()

    def make_role(attempts: Attempts) -> WorkerRole:
        return components.role(components, attempts, Loops.join(agent_loop, attempts.break_down))

    attempts = AttemptTable(scheduler, components, make_role)
    return Worker(components, attempts, agent_thread)


class Worker:
    """One worker, whole; `compose` makes it."""

    def __init__(
        self,
        components: WorkerComponents,
        attempts: AttemptTable,
        agent_thread: AgentThread | None,
    ) -> None:
        """Keep what was put together; nothing listens yet."""
        self.components = components
        self.worker = attempts
        self.role = attempts.role
        self.agent = attempts.role.agent
        self.scheduler = attempts.scheduler
        self.pool = attempts.scheduler.pool
        self._thread = agent_thread

    @property
    def descriptor(self) -> WorkerDescriptor:
        """Who it is and, once it has started, where it listens."""
        return self.worker.descriptor()

    async def start(self) -> WorkerDescriptor:
        """Listen on both ports; returns the descriptor to publish."""
        if self._thread is None:
            transfer_address = await self.agent.listen()
        else:
            transfer_address = await self._thread.call(self.agent.listen())
        await self.worker.start(transfer_address)
        return self.descriptor

    async def stop(self) -> None:
        """Stop the worker, then its agent."""
        await self.worker.stop()
        if self._thread is None:
            await self.agent.stop()
        else:
            await self._thread.call(self.agent.stop())
            self._thread.stop()

    def check_at_rest(self) -> None:
        """Look for anything a past request left behind.

        Raises:
            InvariantViolation: Names what is left.
        """
        self.pool.check()
        left = {
            "held blocks": self.pool.num_held,
            "attempts": len(self.worker.attempts),
            "sequences": len(self.scheduler.running) + len(self.scheduler.waiting),
            "holding": len(self.scheduler.holding),
            "arriving": len(self.scheduler.arriving),
            "transfers of the role": self.role.num_live,
            "transfers of the agent": self.agent.num_live,
        }
        found = {name: count for name, count in left.items() if count}
        if found:
            raise InvariantViolation(f"worker {self.descriptor.worker_id} is not at rest: {found}")
