"""A simulated cluster: one router, workers of both roles, and the faults to throw at it.

Owns the nodes and their composition from the product's own parts. Does not know a scenario: that
is a test's. Called by tests.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from core.config import EngineConfig, PlacementConfig, RouterConfig, TransferConfig
from core.ids import Ids, RequestId, WorkerId, seed_of
from core.kv_layout import KVLayout
from core.plan import StepPlan, StepResult
from core.ports import LoopClock, OnLayer
from core.session import Role, WorkerDescriptor
from core.types import GenerateRequest, RequestEvent, SamplingParams
from decode_worker.part import decode_role
from engine.hash_model import HashModel, MemoryKV
from prefill_worker.part import prefill_role
from router.admission import Admission
from router.links import Links
from router.orchestrator import Orchestrator
from simulation.network import Hub, SimNetwork
from worker.unit import WorkerParts, WorkerUnit

VOCABULARY = 97


class InlineDecoder:
    """Token ids as letters; the simulated side of the text decoder."""

    def push(self, token_id: int) -> str:
        """One letter a token."""
        return chr(32 + token_id)

    def flush(self) -> str:
        """Nothing is ever held back."""
        return ""


class StaticMembership:
    """A list that the simulation edits."""

    def __init__(self) -> None:
        """Start empty."""
        self._members: dict[WorkerId, WorkerDescriptor] = {}
        self._watchers: list[Callable[[], None]] = []
        self.starting = 0

    def join(self, descriptor: WorkerDescriptor) -> None:
        """Add or replace a member."""
        self._members[descriptor.worker_id] = descriptor
        self._notify()

    def leave(self, worker_id: WorkerId) -> None:
        """Remove a member."""
        self._members.pop(worker_id, None)
        self._notify()

    def _notify(self) -> None:
        for watcher in self._watchers:
            watcher()

    def members(self) -> tuple[WorkerDescriptor, ...]:
        """See `Membership`."""
        return tuple(self._members.values())

    def watch(self, on_change: Callable[[], None]) -> None:
        """See `Membership`."""
        self._watchers.append(on_change)

    def is_starting(self) -> bool:
        """See `Membership`."""
        return self.starting > 0


class SimRunner:
    """The hash model as a restartable runner that checks the pool at every step boundary."""

    def __init__(self, model: HashModel, on_step: Callable[[StepPlan], None]) -> None:
        """Wrap a model."""
        self._model, self._on_step = model, on_step

    async def execute(self, plan: StepPlan, on_layer: OnLayer) -> StepResult:
        """See `Runner`."""
        self._on_step(plan)
        return await self._model.execute(plan, on_layer)

    async def restart(self) -> None:
        """Ranks never die on their own here."""

    def rank_pids(self) -> tuple[int, ...]:
        """No processes."""
        return ()


@dataclass(slots=True)
class Shape:
    """Sizes of a simulated cluster."""

    prefill: int = 2
    decode: int = 2
    engine: EngineConfig = field(
        default_factory=lambda: EngineConfig(block_size_tokens=4, num_blocks=64, max_step_tokens=32, max_sequences=16)
    )
    router: RouterConfig = field(default_factory=RouterConfig)
    placement: PlacementConfig = field(default_factory=lambda: PlacementConfig(path="auto", local_below_tokens=12))
    transfer: TransferConfig = field(default_factory=lambda: TransferConfig(frame_bytes=4096))
    layers: int = 3
    step_s: float = 0.008
    token_s: float = 0.0005
    latency_s: tuple[float, float] = (0.0001, 0.002)
    max_model_len: int = 200


class SimCluster:
    """One router and its workers on the running virtual loop."""

    def __init__(self, shape: Shape, seed: int) -> None:
        """Prepare; `start` brings the nodes up."""
        self.shape, self.rng = shape, random.Random(seed)
        self.hub = Hub(self.rng, shape.latency_s)
        self.membership = StaticMembership()
        self.clock = LoopClock()
        self.ids = Ids(random.Random(seed + 1))
        self.units: dict[str, WorkerUnit] = {}
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_forced_preemptions = 0
        self.preempt_odds = 0.0
        self._serial = 0
        self.layout = KVLayout("hash", "uint8", shape.layers, 1, 8, shape.engine.block_size_tokens)
        self.links = Links(self.membership, SimNetwork(self.hub, "router", "session"), self.ids.router(), self.clock)
        router = shape.router
        self.orchestrator = Orchestrator(
            self.links,
            Admission(router.max_running, router.max_queued, router.queue_wait_s),
            router,
            shape.placement,
            self.clock,
            self.ids,
            lambda prompt: InlineDecoder(),
        )

    async def start(self) -> None:
        """Bring every node up."""
        for _ in range(self.shape.prefill):
            await self.add(Role.PREFILL)
        for _ in range(self.shape.decode):
            await self.add(Role.DECODE)
        self.links.follow()

    async def add(self, role: Role) -> str:
        """Start one worker.

        Returns:
            The node's name.
        """
        self._serial += 1
        node, shape = f"{role.value}{self._serial}", self.shape
        kv = MemoryKV(self.layout, shape.engine.num_blocks)
        model = HashModel(
            self.layout, kv, VOCABULARY, asyncio.sleep, lambda plan: shape.step_s + shape.token_s * plan.num_tokens
        )
        descriptor = WorkerDescriptor(
            worker_id=WorkerId(node), role=role, incarnation=self.ids.incarnation(), session_address="",
            transfer_address="", model="hash", content_digest=self.layout.content_digest,
            block_size_tokens=shape.engine.block_size_tokens, num_blocks=shape.engine.num_blocks,
            max_model_len=shape.max_model_len,
        )  # fmt: skip
        unit: WorkerUnit
        parts = WorkerParts(
            role=role,
            make_role=prefill_role if role is Role.PREFILL else decode_role(shape.transfer.reserve_wait_s),
            runner=SimRunner(model, lambda plan: self._check(unit)),
            kv=kv,
            layout=self.layout,
            engine=shape.engine,
            transfer=shape.transfer,
            max_model_len=shape.max_model_len,
            session_network=SimNetwork(self.hub, node, "session"),
            transfer_network=SimNetwork(self.hub, node, "fetch"),
            clock=self.clock,
            descriptor=descriptor,
        )
        unit = WorkerUnit(parts, None)
        self.units[node] = unit
        self._buggify(unit)
        self.membership.join(await unit.start())
        return node

    def _buggify(self, unit: WorkerUnit) -> None:
        """Preempt at random before a plan: legal, but rare when left to chance."""
        plan = unit.scheduler.plan

        def preempting(now_s: float) -> StepPlan:
            victims = [*unit.scheduler.running, *unit.scheduler.holding.values()]
            if victims and self.rng.random() < self.preempt_odds:
                self.num_forced_preemptions += 1
                unit.scheduler.preempt(self.rng.choice(victims))
            return plan(now_s)

        unit.scheduler.plan = preempting  # type: ignore[method-assign]

    def _check(self, unit: WorkerUnit) -> None:
        self.num_steps += 1
        unit.pool.check()

    async def kill(self, node: str) -> None:
        """End a node as SIGKILL would: nothing is said to anyone."""
        unit = self.units.pop(node)
        self.num_preemptions += unit.scheduler.num_preemptions
        self.hub.kill(node)
        await unit.stop()
        self.membership.leave(WorkerId(node))

    def request(
        self, name: str, token_ids: tuple[int, ...], sampling: SamplingParams, timeout_s: float = 120.0, scope: str = ""
    ) -> GenerateRequest:
        """Make a request as a door would."""
        request_id = RequestId(name)
        return GenerateRequest(
            request_id=request_id, model="", token_ids=token_ids, sampling=sampling,
            seed=sampling.seed if sampling.seed is not None else seed_of(request_id, b"sim"),
            deadline_at=self.clock.now_s() + timeout_s, eos_token_ids=(0,), scope=scope,
        )  # fmt: skip

    async def generate(self, request: GenerateRequest) -> list[RequestEvent]:
        """Run one request and collect its events."""
        events: list[RequestEvent] = []
        await self.orchestrator.run(request, events.append)
        return events

    async def rest(self, patience_s: float = 8.0) -> None:
        """Wait a while, then check that nothing is left anywhere (L3)."""
        await asyncio.sleep(patience_s)
        for unit in self.units.values():
            unit.check_at_rest()

    async def stop(self) -> None:
        """Bring everything down."""
        await self.links.close()
        for unit in list(self.units.values()):
            await unit.stop()
