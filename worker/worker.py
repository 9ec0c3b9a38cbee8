"""A worker put together: books, scheduler, role, agent; the same in production and simulation.

Owns the wiring and the order of start and stop. Does not know which role, which network or which
runner it gets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from core.config import EngineConfig, TransferConfig
from core.errors import InvariantViolation
from core.ids import Incarnation, WorkerId
from core.kv_layout import KVLayout
from core.ports import Clock, KVBytes, Network
from core.session import Role, WorkerDescriptor
from core.trace import NoTracing, Tracing
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_tables import Limits
from engine.scheduling.scheduler import Scheduler
from kv_transfer.agent import AgentThread, TransferAgent
from kv_transfer.receiver import ReceiverCallbacks
from kv_transfer.sender import SenderCallbacks
from kv_transfer.threadsafe_callbacks import Post, watched
from worker.attempts import AttemptTable
from worker.ports import RestartableRunner, WorkerRole
from worker.sessions import FRAME_BYTES


@dataclass(frozen=True, slots=True)
class RoleWiring:
    """A role's part and the host its agent reports to."""

    role: WorkerRole
    host: SenderCallbacks | ReceiverCallbacks
    use_agent: Callable[[TransferAgent, tuple[WorkerId, Incarnation]], None]
    num_live: Callable[[], int]


MakeRole = Callable[[AttemptTable, KVBytes, KVLayout, Clock, Post, Post], RoleWiring]
"""(worker, pool, layout, clock, post to the agent's loop, post to the worker's loop) -> role."""


@dataclass(frozen=True, slots=True)
class WorkerComponents:
    """What a worker is made of, chosen by the composition root."""

    role: Role
    make_role: MakeRole
    runner: RestartableRunner
    kv: KVBytes
    layout: KVLayout
    engine: EngineConfig
    transfer: TransferConfig
    max_model_len: int
    vocabulary_size: int
    session_network: Network
    transfer_network: Network
    clock: Clock
    descriptor: WorkerDescriptor
    """Addresses are filled in by `start`."""
    tracing: Tracing = field(default_factory=NoTracing)
    frame_bytes: int = FRAME_BYTES
    """Longest frame of a session."""
    hash_key: bytes = b""
    """Of the cluster, as in `root_hash`: its workers share names of blocks, outsiders do not."""


class Worker:
    """One worker, whole."""

    def __init__(self, parts: WorkerComponents, agent_thread: AgentThread | None) -> None:
        """Wire everything; nothing listens yet. Without a thread the agent shares the loop."""
        self._parts, self._thread = parts, agent_thread
        self.descriptor = parts.descriptor
        engine = parts.engine
        limits = Limits(
            block_size_tokens=engine.block_size_tokens,
            max_step_tokens=engine.max_step_tokens,
            # A running sequence takes a token of every step; one more is for a prompt to go on.
            max_sequences=max(1, min(engine.max_sequences, engine.max_step_tokens - 1)),
            max_model_len=parts.max_model_len,
            is_prefix_cache_on=engine.is_prefix_cache_on,
        )
        self.pool = BlockPool(engine.num_blocks)
        self.scheduler = Scheduler(self.pool, limits, parts.layout.content_digest, parts.hash_key)
        self.worker = AttemptTable(
            self.scheduler,
            parts.runner,
            parts.clock,
            parts.session_network,
            lambda: self.descriptor,
            parts.vocabulary_size,
            parts.frame_bytes,
        )
        self.worker.tracing = parts.tracing
        loop = asyncio.get_running_loop()
        agent_loop = agent_thread.loop if agent_thread else loop

        def agent_broke(error: BaseException) -> None:
            loop.call_soon_threadsafe(self.worker.break_down, error)

        role = parts.make_role(
            self.worker,
            parts.kv,
            parts.layout,
            parts.clock,
            watched(agent_loop.call_soon_threadsafe, agent_broke),
            watched(loop.call_soon_threadsafe, self.worker.break_down),
        )
        self.agent = TransferAgent(
            parts.transfer_network,
            role.host,
            parts.kv,
            parts.layout,
            parts.transfer,
            self.pool.generation,
            parts.clock.now_s,
        )
        self.agent.on_fault = agent_broke
        role.use_agent(self.agent, (self.descriptor.worker_id, self.descriptor.incarnation))
        self.worker.use_role(role.role)
        self._num_live = role.num_live

    async def start(self) -> WorkerDescriptor:
        """Listen on both ports; returns the descriptor to publish."""
        if self._thread is None:
            transfer_address = await self.agent.listen()
        else:
            transfer_address = await self._thread.call(self.agent.listen())
        session_address = await self.worker.start()
        self.descriptor = replace(
            self.descriptor, session_address=session_address, transfer_address=transfer_address
        )
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
            "transfers of the role": self._num_live(),
            "transfers of the agent": self.agent.num_live,
        }
        found = {name: count for name, count in left.items() if count}
        if found:
            raise InvariantViolation(f"worker {self.descriptor.worker_id} is not at rest: {found}")
