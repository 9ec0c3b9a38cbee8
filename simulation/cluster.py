"""A simulated cluster: routers and workers of both roles, each on a node of its own.

Owns the nodes and their composition from the product's own parts, and what can be done to a node:
kill, pause, drain, replace. Does not know a scenario or a fault schedule.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from core.config import EngineConfig, PlacementConfig, RouterConfig, TransferConfig
from core.errors import ServingError
from core.ids import Ids, RequestId, WorkerId, seed_of
from core.kv_layout import KVLayout
from core.plan import StepPlan
from core.ports import LoopClock
from core.session import Role
from core.types import GenerateRequest, RequestEnded, RequestEvent, SamplingParams
from decode_worker.role import DecodeRole
from kv_transfer.agent import TransferAgent
from prefill_worker.role import PrefillRole
from prefix_index.mirror import MembershipMirror
from router.compose import RouterComponents
from router.compose import compose as compose_router
from router.orchestrator import Orchestrator
from router.request_state import RequestObserver, RequestState
from router.request_stream import RequestStream
from router.workers.sessions import WorkerSessions
from simulation.contrary import Contrary
from simulation.hash_runner import HashModel, MemoryKV
from simulation.loop import VirtualLoop
from simulation.network import Hub, SimNetwork, on_node
from simulation.parts import MemoryStore, NodeClock, SimRunner, StaticMembership
from simulation.sizes import message_bytes
from simulation.traps import Traps
from worker.attempt import Attempt
from worker.components import WorkerComponents
from worker.sessions import FRAME_BYTES
from worker.worker import Worker
from worker.worker import compose as compose_worker

VOCABULARY = 97
ENVELOPE_BYTES = 1 << 10
"""Room in a message for what is around a frame."""
HASH_KEY = b"simulation"


@dataclass(slots=True)
class Shape:
    """Sizes of a simulated cluster."""

    prefill: int = 2
    decode: int = 2
    routers: int = 1
    engine: EngineConfig = field(
        default_factory=lambda: EngineConfig(
            block_size_tokens=4, num_blocks=64, max_step_tokens=32, max_sequences=16
        )
    )
    router: RouterConfig = field(default_factory=RouterConfig)
    placement: PlacementConfig = field(
        default_factory=lambda: PlacementConfig(path="auto", local_below_tokens=12)
    )
    transfer: TransferConfig = field(default_factory=lambda: TransferConfig(frame_bytes=4096))
    layers: int = 3
    step_s: float = 0.008
    token_s: float = 0.0005
    latency_s: tuple[float, float] = (0.0001, 0.002)
    max_model_len: int = 200
    max_message_bytes: int | None = None
    spawn_s: float = 0.05
    load_s: float = 0.45
    slow: float = 1.0
    """How many times slower the first decode worker is than the others."""


def _ignore(*_: object) -> None:
    """Nobody listens."""


class RouterObservers(RequestObserver):
    """Passes what routers note on to each observer that has joined."""

    def __init__(self) -> None:
        """Nobody looks on yet."""
        self._all: list[RequestObserver] = []

    def join(self, observer: RequestObserver) -> None:
        """Let one more hear everything from now on."""
        self._all.append(observer)

    def request_ended(self, run: RequestState, ended: RequestEnded) -> None:
        """Pass on."""
        for observer in self._all:
            observer.request_ended(run, ended)

    def request_refused(self, request: GenerateRequest, error: ServingError) -> None:
        """Pass on."""
        for observer in self._all:
            observer.request_refused(request, error)

    def retried(self, error: ServingError) -> None:
        """Pass on."""
        for observer in self._all:
            observer.retried(error)


class SimRouter:
    """One router on its node, with the clients that are connected to it."""

    def __init__(self, cluster: SimCluster, name: str) -> None:
        """Compose it from the product's parts; `start` lets it follow the members."""
        self.name = name
        self.is_alive = True
        self.context = on_node(name)
        self._clients: dict[asyncio.Event, None] = {}
        core = compose_router(
            RouterComponents(
                membership=cluster.membership,
                session_network=SimNetwork(cluster.hub, name, "session"),
                config=cluster.shape.router,
                placement=cluster.shape.placement,
                clock=cluster.clock,
                ids=cluster.ids,
                new_decoder=cluster.traps.decoder,
            ),
            cluster.observers,
        )
        self.sessions = core.sessions
        self.admission = core.admission
        self.attempts = core.attempts
        self.orchestrator = core.orchestrator
        cluster.traps.trap_emit(self.orchestrator)
        self.mirror = MembershipMirror(
            cluster.store,
            lambda: [
                {"worker_id": session.descriptor.worker_id} for session in self.sessions.all()
            ],
        )
        self._mirroring: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Follow the members and mirror them."""
        self.context.run(self.sessions.follow)
        loop = asyncio.get_running_loop()
        self._mirroring = loop.create_task(self.mirror.run(), context=self.context.copy())

    def open(self, request: GenerateRequest, wake: asyncio.Event) -> RequestStream:
        """Start a request as this router's door would; `wake` is also set when the router dies."""
        self._clients[wake] = None
        return self.context.copy().run(RequestStream, self.orchestrator, request, wake)

    def closed(self, wake: asyncio.Event) -> None:
        """The client has its end, or is gone."""
        self._clients.pop(wake, None)

    def died(self) -> None:
        """The kernel closes the connections of its clients."""
        self.is_alive = False
        for wake in self._clients:
            wake.set()

    async def stop(self) -> None:
        """End in good order."""
        if self._mirroring is not None:
            self._mirroring.cancel()
            await asyncio.gather(self._mirroring, return_exceptions=True)
        await self.sessions.close()


class SimCluster:
    """Routers and workers on the running virtual loop."""

    def __init__(self, shape: Shape, seed: int) -> None:
        """Prepare; `start` brings the nodes up."""
        self.shape = shape
        self.rng = random.Random(seed)
        self.hub = Hub(self.rng, shape.latency_s)
        self.hub.max_message_bytes = shape.max_message_bytes
        self.hub.size_of = message_bytes
        self.membership = StaticMembership()
        self.store = MemoryStore()
        self.clock = LoopClock()
        self.ids = Ids(random.Random(seed + 1))
        self.units: dict[str, Worker] = {}
        self.runners: dict[str, SimRunner] = {}
        self.clocks: dict[str, NodeClock] = {}
        self._agents: list[TransferAgent] = []
        self.draining: dict[str, None] = {}
        self.paused: dict[str, None] = {}
        self.num_steps = 0
        self.num_preemptions = 0
        self.contrary = Contrary(self.rng)
        self.traps = Traps()
        self.ill_at: dict[str, float] = {}
        """When something last happened to a node that may be taken for its death."""
        self.observers = RouterObservers()
        self.on_step: Callable[[str, Worker, StepPlan], None] = _ignore
        self.on_attempt_ended: Callable[[str, Worker, Attempt], None] = _ignore
        self._serial = self._router_serial = 0
        self.layout = KVLayout("hash", "uint8", shape.layers, 1, 8, shape.engine.block_size_tokens)
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

    def _new_router(self) -> SimRouter:
        self._router_serial += 1
        return SimRouter(self, f"router{self._router_serial}")

    async def start(self) -> None:
        """Bring every node up."""
        for _ in range(self.shape.prefill):
            await self.add(Role.PREFILL)
        for _ in range(self.shape.decode):
            await self.add(Role.DECODE)
        for router in self.routers:
            router.start()

    async def add(self, role: Role, *, is_incompatible: bool = False) -> str:
        """Start one worker; a misfit holds another model than it says.

        Returns:
            The node's name.
        """
        self._serial += 1
        node = f"{role.value}{self._serial}"
        shape = self.shape
        engine = shape.engine
        layout = replace(self.layout, model_digest="another") if is_incompatible else self.layout
        kv = MemoryKV(layout, engine.num_blocks)
        is_slow = role is Role.DECODE and self._serial == shape.prefill + 1
        slow = shape.slow if is_slow else 1.0
        clock = self.clocks[node] = NodeClock()
        model = HashModel(
            self.layout,
            kv,
            VOCABULARY,
            asyncio.sleep,
            lambda plan: (
                slow * (shape.step_s + shape.token_s * plan.num_tokens) + runner.take_slowness_s()
            ),
        )
        unit: Worker
        runner = self.runners[node] = SimRunner(
            model,
            kv,
            self.rng,
            lambda plan: self._check(node, unit, plan),
            shape.spawn_s,
            shape.load_s,
        )
        parts = WorkerComponents(
            role=PrefillRole if role is Role.PREFILL else DecodeRole,
            runner=runner,
            kv=kv,
            layout=layout,
            engine=engine,
            transfer=shape.transfer,
            max_model_len=shape.max_model_len,
            vocabulary_size=VOCABULARY,
            session_network=SimNetwork(self.hub, node, "session"),
            transfer_network=SimNetwork(self.hub, node, "fetch"),
            clock=clock,
            worker_id=WorkerId(node),
            incarnation=self.ids.incarnation(),
            model="hash",
            frame_bytes=min(FRAME_BYTES, (shape.max_message_bytes or FRAME_BYTES) - ENVELOPE_BYTES),
            hash_key=HASH_KEY,
        )
        context = on_node(node)
        unit = context.run(compose_worker, parts)
        digest = self.layout.content_digest
        unit.worker.identity = replace(unit.worker.identity, content_digest=digest)
        self.units[node] = unit
        self._agents.append(unit.agent)
        self.traps.trap_role(node, unit.worker)
        self.traps.trap_worker(node, unit.worker)
        self.contrary.take_hold(node, unit)
        self._hear_endings(node, unit)
        self.membership.join(
            await asyncio.get_running_loop().create_task(unit.start(), context=context)
        )
        return node

    def _check(self, node: str, unit: Worker, plan: StepPlan) -> None:
        self.num_steps += 1
        unit.pool.check()
        self.on_step(node, unit, plan)

    def _hear_endings(self, node: str, unit: Worker) -> None:
        end = unit.worker.end

        def heard(attempt: Attempt, error: ServingError | None) -> None:
            is_news = attempt.ended is None
            end(attempt, error)
            if is_news:
                self.on_attempt_ended(node, unit, attempt)

        unit.worker.end = heard  # type: ignore[method-assign]

    # --- what can be done to a node ---------------------------------------------------------------

    async def kill(self, node: str, lag_s: float = 0.0) -> None:
        """End a worker's node as SIGKILL would, without a word; members hear after `lag_s`."""
        unit = self.units.pop(node)
        self.num_preemptions += unit.scheduler.num_preemptions
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
        self.hub.crash(node)
        self.loop.kill(node)

    async def pause(self, node: str, for_s: float) -> None:
        """Stop a node as SIGSTOP would, and let it go on later."""
        self.paused[node] = None
        self.loop.pause(node)
        await asyncio.sleep(for_s)
        if node in self.paused:
            del self.paused[node]
            self.loop.resume(node)

    async def drain(self, node: str, grace_s: float = 5.0) -> bool:
        """Take a worker out of service as a rolling restart does.

        Returns:
            True if it left nothing behind.
        """
        unit = self.units[node]
        self.draining[node] = None
        is_empty = await self.loop.create_task(unit.worker.drain(grace_s), context=on_node(node))
        if node in self.units:
            del self.units[node]
            self.num_preemptions += unit.scheduler.num_preemptions
            await self.loop.create_task(unit.stop(), context=on_node(node))
            self.membership.leave(WorkerId(node))
        return is_empty

    def request(
        self,
        name: str,
        token_ids: tuple[int, ...],
        sampling: SamplingParams,
        timeout_s: float = 120.0,
        scope: str = "",
    ) -> GenerateRequest:
        """Make a request as a door would."""
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
        )

    async def generate(self, request: GenerateRequest) -> list[RequestEvent]:
        """Run one request and collect its events."""
        events: list[RequestEvent] = []
        await self.orchestrator.run(request, events.append)
        return events

    @property
    def transitions(self) -> Counter[str]:
        """Transfer transitions of all workers there ever were, by name."""
        total: Counter[str] = Counter()
        for agent in self._agents:
            total.update(agent.transitions)
        return total

    async def rest(self, patience_s: float = 8.0) -> None:
        """Wait a while, then check that nothing is left anywhere (L3)."""
        await asyncio.sleep(patience_s)
        for unit in self.units.values():
            unit.check_at_rest()

    async def stop(self) -> None:
        """Bring everything down."""
        for router in self.routers:
            if router.is_alive:
                await router.stop()
        for unit in list(self.units.values()):
            await unit.stop()
