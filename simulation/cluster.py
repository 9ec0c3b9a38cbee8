"""A simulated cluster: routers and workers of both roles, each on a node of its own.

Owns the nodes, and what can be done to one: start, kill, pause, drain, replace. Does not know how a
node is composed (`router_node`, `worker_node`), nor a scenario or a fault schedule.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from core.errors import ServingError
from core.ids import RequestId, WorkerId, seed_of
from core.plan import StepPlan
from core.session import PoolId, Role, WorkerDescriptor
from core.types import GenerateRequest, RequestEvent, SamplingParams
from engine.scheduling.sequence import Sequence
from router.orchestrator import Orchestrator
from router.workers.sessions import WorkerSessions
from simulation import worker_node
from simulation.loop import VirtualLoop
from simulation.network import on_node
from simulation.ports import NodeClock
from simulation.router_node import SimRouter
from simulation.runner import SimRunner
from simulation.shape import ClusterShape
from simulation.world import World
from worker.attempt import Attempt
from worker.worker import Worker


class SimCluster(World):
    """Routers and workers on the running virtual loop."""

    def __init__(self, shape: ClusterShape, seed: int) -> None:
        """Prepare; `start` brings the nodes up."""
        super().__init__(shape, seed)
        self.units: dict[str, Worker] = {}
        """Workers whose node lives."""
        self.runners: dict[str, SimRunner] = {}
        self.clocks: dict[str, NodeClock] = {}
        """Of every worker there ever was, like `runners`."""
        self.router_clocks: dict[str, NodeClock] = {}
        """Of every router there ever was."""
        self.draining: dict[str, None] = {}
        self.paused: dict[str, None] = {}
        self.ill_at: dict[str, float] = {}
        """When something last happened to a node that may be taken for its death."""
        self.num_steps = 0
        self._everyone: dict[str, Worker] = {}
        self._publishing: dict[str, asyncio.Task[None]] = {}
        self._num_workers = 0
        self._num_routers = 0
        self.routers: list[SimRouter] = [self._new_router() for _ in range(shape.routers)]

    @property
    def loop(self) -> VirtualLoop:
        """The loop everything runs on."""
        loop = asyncio.get_running_loop()
        if not isinstance(loop, VirtualLoop):
            raise TypeError("a simulated cluster runs on a VirtualLoop only")
        return loop

    @property
    def orchestrator(self) -> Orchestrator:
        """Of the first router."""
        return self.routers[0].orchestrator

    @property
    def sessions(self) -> WorkerSessions:
        """Of the first router."""
        return self.routers[0].sessions

    @property
    def transitions(self) -> Counter[str]:
        """Transfer transitions of all workers there ever were, by name."""
        total: Counter[str] = Counter()
        for unit in self._everyone.values():
            for agent in unit.transfers.agents:
                total.update(agent.transitions)
        return total

    def descriptor_of(self, node: str) -> WorkerDescriptor:
        """Describe a worker, which may be gone."""
        return self._everyone[node].descriptor

    @property
    def num_preemptions(self) -> int:
        """Of all workers there ever were."""
        return sum(unit.scheduler.num_preemptions for unit in self._everyone.values())

    # --- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring every node up."""
        for _ in range(self.shape.prefill):
            await self.add(Role.PREFILL)
        for _ in range(self.shape.decode):
            await self.add(Role.DECODE)
        for tier, config in self.shape.tiers.items():
            for role, pool in (
                (Role.PREFILL, config.pools.prefill),
                (Role.DECODE, config.pools.decode),
            ):
                for _ in range(pool.replicas if pool is not None else 0):
                    await self.add(role, tier)
        for router in self.routers:
            router.start()

    async def add(self, role: Role, tier: str = "", *, is_incompatible: bool = False) -> str:
        """Start one worker.

        Args:
            role: Prefill or decode.
            tier: In whose own pool it is; empty: all tiers share it.
            is_incompatible: It holds another model than it announces.

        Returns:
            The node's name.
        """
        self._num_workers += 1
        node = f"{PoolId(role, tier)}{self._num_workers}"
        left = [n for n in self.disks if n not in self.units and n.startswith(role.value)]
        if left:
            self.disks[node] = self.disks.pop(left[0])
        is_slow = role is Role.DECODE and self._num_workers == self.shape.prefill + 1
        made = worker_node.compose(
            self,
            node,
            PoolId(role, tier),
            self.shape.slow if is_slow else 1.0,
            lambda plan: self._stepped(node, plan),
            is_incompatible=is_incompatible,
        )
        unit = made.worker
        self.units[node] = self._everyone[node] = unit
        self.runners[node] = made.runner
        self.clocks[node] = made.clock
        self._observe_endings(node, unit)
        self._observe_blocks(node, unit)
        starting = self.loop.create_task(unit.start(), context=on_node(node))
        descriptor = await starting
        if made.publisher is not None:
            publishing = made.publisher.run()
            self._publishing[node] = self.loop.create_task(publishing, context=on_node(node))
        self.membership.join(descriptor)
        return node

    def _new_router(self) -> SimRouter:
        self._num_routers += 1
        router = SimRouter(f"router{self._num_routers}", self)
        self.router_clocks[router.name] = router.clock
        return router

    def _stepped(self, node: str, plan: StepPlan) -> None:
        unit = self._everyone[node]
        self.num_steps += 1
        unit.pool.check()
        self.observers.step(node, plan)

    def _observe_endings(self, node: str, unit: Worker) -> None:
        end = unit.attempts.end

        def observed(attempt: Attempt, error: ServingError | None) -> None:
            is_first = attempt.ended is None
            end(attempt, error)
            if is_first:
                self.observers.attempt_ended(node, attempt)

        unit.attempts.end = observed  # type: ignore[method-assign]

    def _observe_blocks(self, node: str, unit: Worker) -> None:
        supply = unit.scheduler.blocks
        tables = unit.scheduler.tables
        take = supply.take
        register = tables.register

        def taken(sequence: Sequence) -> list[int] | None:
            hits = take(sequence)
            if hits is not None:
                self.observers.blocks_found(node, sequence, hits)
            return hits

        def registered(sequence: Sequence) -> None:
            first = len(sequence.parents) - 1
            register(sequence)
            for index in range(first, len(sequence.parents) - 1):
                name = sequence.full_block_hash(index)
                self.observers.block_stored(node, sequence.request.scope, name)

        supply.take = taken  # type: ignore[method-assign]
        tables.register = registered  # type: ignore[method-assign]

    async def rest(self, patience_s: float = 8.0) -> None:
        """Wait a while, then check that nothing is left anywhere (L3).

        A transfer whose peer is gone, or never came, is over with its lease: that takes 5 s.
        """
        await asyncio.sleep(patience_s)
        for unit in self.units.values():
            unit.check_at_rest()

    async def stop(self) -> None:
        """Bring everything down."""
        for router in self.routers:
            if router.is_alive:
                await router.stop()
        for node, unit in list(self.units.items()):
            await self._stop_publishing(node)
            await unit.stop()

    async def _stop_publishing(self, node: str) -> None:
        """As a worker's process does: after it has drained, before it stops."""
        publishing = self._publishing.pop(node, None)
        if publishing is not None:
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)

    # --- what can be done to a node ---------------------------------------------------------------

    async def kill(self, node: str, lag_s: float = 0.0) -> None:
        """End a worker's node as SIGKILL would, without a word; members drop it after `lag_s`."""
        del self.units[node]
        self._publishing.pop(node, None)
        self._end(node)
        await asyncio.sleep(lag_s)
        self.membership.leave(WorkerId(node))

    def kill_router(self, name: str) -> SimRouter:
        """End a router's node as SIGKILL would.

        Returns:
            A new one that takes its place, not started yet.
        """
        index, old = next((i, r) for i, r in enumerate(self.routers) if r.name == name)
        self._end(name)
        old.died()
        new = self.routers[index] = self._new_router()
        new.is_alive = False
        return new

    def _end(self, node: str) -> None:
        self.paused.pop(node, None)
        # Its streams first: afterwards nothing of the node runs, and peers would wait for ever.
        self.hub.crash(node)
        self.loop.kill(node)

    async def pause(self, node: str, for_s: float) -> None:
        """Stop a node as SIGSTOP would, and let it go on later."""
        self.paused[node] = None
        self.loop.pause(node)
        await asyncio.sleep(for_s)
        if node in self.paused:  # it may have been killed meanwhile
            del self.paused[node]
            self.loop.resume(node)

    async def drain(self, node: str, grace_s: float = 5.0) -> bool:
        """Take a worker out of service as a rolling restart does.

        Returns:
            True if it left nothing behind.
        """
        unit = self.units[node]
        self.draining[node] = None
        is_empty = await self.loop.create_task(unit.drain(grace_s), context=on_node(node))
        if node in self.units:  # it may have been killed meanwhile
            del self.units[node]
            await self._stop_publishing(node)
            await self.loop.create_task(unit.stop(), context=on_node(node))
            self.membership.leave(WorkerId(node))
        return is_empty

    # --- requests ---------------------------------------------------------------------------------

    def request(
        self,
        name: str,
        token_ids: tuple[int, ...],
        sampling: SamplingParams,
        timeout_s: float = 120.0,
        scope: str = "",
        tier: str = "standard",
    ) -> GenerateRequest:
        """Make a request as a router's servers would."""
        request_id = RequestId(name)
        return GenerateRequest(
            request_id=request_id,
            model="",
            token_ids=token_ids,
            sampling=sampling,
            seed=sampling.seed if sampling.seed is not None else seed_of(request_id, b"sim"),
            deadline_at=self.clock.now_s() + timeout_s,
            eos_token_ids=(0,),
            scope=scope,
            tier=tier,
        )

    async def generate(self, request: GenerateRequest) -> list[RequestEvent]:
        """Run one request and collect its events."""
        events: list[RequestEvent] = []
        await self.orchestrator.run(request, events.append)
        return events
