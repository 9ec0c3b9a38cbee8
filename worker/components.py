"""What a worker is made of, and the two loops that it runs on.

Owns the list of components that a composition root chooses. Does not know how they are put
together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from core.config import EngineConfig, TierConfig, TransferConfig, default_tiers
from core.ids import Incarnation, WorkerId
from core.kv_layout import KVLayout
from core.ports import BlockStore, Clock, KVBytes, Network
from core.prefix_changes import StorageTier
from core.session import Role, WorkerDescriptor
from core.trace import NoTracing, Tracing
from engine.scheduling.block_changes import BlockChanges
from engine.scheduling.scheduler import Scheduler
from kv_transfer.agent import OnFault
from kv_transfer.receive_agent import ReceiveAgent
from kv_transfer.send_agent import SendAgent
from kv_transfer.threadsafe_callbacks import Post, watched
from worker.ports import RestartableRunner, WorkerAttempts, WorkerRole
from worker.router_session import FRAME_BYTES


@dataclass(frozen=True, slots=True)
class Loops:
    """How a call crosses between a worker's loop and its agent's; what it raises ends it all."""

    to_agent: Post
    to_worker: Post
    agent_broke: OnFault
    """For a task of the agent: called on the agent's loop."""

    @classmethod
    def join(cls, agent_loop: asyncio.AbstractEventLoop, break_down: OnFault) -> Loops:
        """Join the running loop, the worker's, with the agent's, which may be the same."""
        loop = asyncio.get_running_loop()

        def agent_broke(error: BaseException) -> None:
            loop.call_soon_threadsafe(break_down, error)

        # Watched both ways: asyncio only logs what a call from another thread raises, and the
        # caller has gone on by then.
        return cls(
            watched(agent_loop.call_soon_threadsafe, agent_broke),
            watched(loop.call_soon_threadsafe, break_down),
            agent_broke,
        )


@dataclass(frozen=True, slots=True)
class TransferAgents:
    """The agents of one worker, one for each direction, and the way to their loop."""

    send: SendAgent
    receive: ReceiveAgent
    post: Post


class MakeRole(Protocol):
    """A role's class."""

    pool: Role
    """Where its workers belong."""

    def __call__(
        self,
        components: WorkerComponents,
        scheduler: Scheduler,
        attempts: WorkerAttempts,
        agents: TransferAgents,
        /,
    ) -> WorkerRole:
        """Make the role of one worker."""
        ...


@dataclass(frozen=True, slots=True)
class TierStore:
    """A storage tier below the pool, and what goes into it."""

    tier: StorageTier
    store: BlockStore
    num_slots: int
    bytes_per_s: float
    """How fast blocks are assumed to come back before it was measured."""
    min_uses: int = 1
    """Sequences that must have had a block."""
    pin_uses: int = 0
    """Blocks that so many sequences used stay, within the quota; 0: none."""
    max_pinned: int = 0
    changes: BlockChanges | None = None
    """Notes which blocks come and go; None: nobody wants to know."""


@dataclass(frozen=True, slots=True)
class WorkerComponents:
    """What a worker is made of, chosen by the composition root."""

    role: MakeRole
    """`PrefillRole` or `DecodeRole`."""
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
    worker_id: WorkerId
    incarnation: Incarnation
    model: str
    """Its name."""
    node: str = ""
    pid: int = 0
    tracing: Tracing = field(default_factory=NoTracing)
    frame_bytes: int = FRAME_BYTES
    """Longest frame of a session."""
    hash_key: bytes = b""
    """Of the cluster, as in `root_hash`: its workers share names of blocks, outsiders do not."""
    exports_kv: bool = True
    """Whether `kv` holds what is computed here; a device may keep it to itself."""
    block_changes: BlockChanges | None = None
    """Notes which cached blocks come and go; None: nobody wants to know."""

    stores: tuple[TierStore, ...] = ()
    """Storage tiers below the pool."""
    tiers: Mapping[str, TierConfig] = field(default_factory=default_tiers)
    """By name, as requests have it (`GenerateRequest.tier`)."""
    tier: str = ""
    """Whose own pool the worker is in; empty: all tiers share it."""

    def describe(self) -> WorkerDescriptor:
        """Describe the worker, which listens nowhere yet."""
        return WorkerDescriptor(
            worker_id=self.worker_id,
            role=self.role.pool,
            incarnation=self.incarnation,
            session_address="",
            transfer_address="",
            model=self.model,
            content_digest=self.layout.content_digest,
            block_size_tokens=self.engine.block_size_tokens,
            num_blocks=self.engine.num_blocks,
            max_model_len=self.max_model_len,
            tier=self.tier,
            node=self.node,
            pid=self.pid,
            rank_pids=self.runner.rank_pids(),
            exports_kv=self.exports_kv,
        )
