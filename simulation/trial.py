"""One seed: a load, a fault schedule, and the invariants of reliability checked while it runs.

Owns the drawing of both, the clients (which reconnect as our Python client does), the comparison
with the reference output, and the list of violations. Does not know how faults are carried out.
Called by `simulation.search` and tests.

    I1 tokens and text equal the reference     I2 positions without gap or repeat, one ending, last
    I3 blocks and requests are conserved       I4, I5 follow from I1: the hash model shows any cross-talk
    I6 queues stay under their bounds          I7 an error is justified by the faults that were met
    L1 every request ends by its deadline      L2 after the last fault, service is whole again
    L3 at rest nothing is left                 H1 enough faults bit
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field, replace

from core.config import EngineConfig, PlacementConfig, RouterConfig, TransferConfig
from core.errors import InvariantViolation, NoWorker, Quarantined, ServingError
from core.types import (
    ChoiceFinished,
    GenerateRequest,
    RequestEnded,
    RequestEvent,
    SamplingParams,
    TextDelta,
)
from engine.wake_ups import WakeUp, wake_up_of
from router.request_stream import RequestStream
from simulation.cluster import VOCABULARY, Shape, SimCluster, SimRouter
from simulation.faults import Fault, Injector, Kind, draw
from simulation.loop import run_virtual
from simulation.oracle import Expected, Oracle

NUM_REQUESTS = 24
NUM_FAULTS = 20
LOAD_S = 4.0
TIMEOUT_S = 120.0
PROBES_PER_ROUTER = 2
MIN_BITTEN = 5
RECOVERY_S = 8.0
UNANSWERED_PING_S = 3.0
MAX_RECONNECTS = 8


@dataclass(frozen=True, slots=True)
class Order:
    """What one client does."""

    start_s: float
    name: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    scope: str = ""
    cancel_after_s: float | None = None
    stall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything one seed decides before the run."""

    seed: int
    shape: Shape
    orders: tuple[Order, ...]
    faults: tuple[Fault, ...]


@dataclass(slots=True)
class Report:
    """What happened."""

    violations: list[str] = field(default_factory=list)
    bitten: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    transitions: Counter[str] = field(default_factory=Counter)
    decisions: list[str] = field(default_factory=list)
    requests: int = 0
    retries: int = 0
    moves: int = 0
    reconnects: int = 0
    tokens: int = 0
    steps: int = 0
    virtual_s: float = 0.0


def make_plan(seed: int, num_faults: int = NUM_FAULTS, num_requests: int = NUM_REQUESTS) -> Plan:
    """Draw a cluster with odd but legal settings, a load and a fault schedule."""
    rng = random.Random(seed)
    block_size = rng.choice([2, 4, 8])
    num_blocks = rng.choice([44, 64, 128]) * 4 // block_size
    engine = EngineConfig(
        block_size_tokens=block_size,
        num_blocks=num_blocks,
        max_step_tokens=rng.choice([8, 16, 32, 128]),
        max_sequences=rng.choice([4, 8, 16]),
        is_prefix_cache_on=rng.random() < 0.8,
    )
    shape = Shape(
        prefill=rng.randint(1, 3),
        decode=rng.randint(2, 3),
        routers=2,
        engine=engine,
        router=RouterConfig(credit_positions=rng.choice([4, 16, 256]), replicas=2),
        placement=PlacementConfig(path="auto", local_below_tokens=rng.choice([1, 12, 40])),
        transfer=TransferConfig(
            frame_bytes=4096, lease_s=rng.choice([1.0, 5.0]), reserve_wait_s=rng.choice([0.5, 10.0])
        ),
        step_s=rng.choice([0.0005, 0.004, 0.02]),
        latency_s=rng.choice([(1e-6, 2e-5), (0.0001, 0.002), (0.001, 0.03)]),
        max_model_len=130,
    )
    faults = draw(rng, num_faults, LOAD_S)
    return Plan(seed, shape, _draw_orders(rng, num_requests, faults), faults)


def _draw_orders(
    rng: random.Random, num_requests: int, faults: tuple[Fault, ...]
) -> tuple[Order, ...]:
    shared = tuple(rng.randrange(1, VOCABULARY) for _ in range(24))
    orders = []
    for i in range(num_requests):
        prompt = tuple(rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(1, 60)))
        sampling = SamplingParams(
            max_tokens=rng.randrange(1, 40),
            n=rng.choice([1, 1, 1, 2, 3]),
            temperature=rng.choice([0.0, 1.0]),
            ignore_eos=rng.random() < 0.5,
            stop=(chr(32 + rng.randrange(VOCABULARY)) + chr(32 + rng.randrange(VOCABULARY)),)
            * (rng.random() < 0.2),
        )
        scope = rng.choice(["", "", "tenant-b"])
        orders.append(
            Order(
                rng.uniform(0, LOAD_S),
                f"r{i}",
                shared + prompt if i % 3 == 0 else prompt,
                sampling,
                scope,
            )
        )
    for fault in faults:
        index = int(fault.pick * num_requests)
        if fault.kind is Kind.CANCEL:
            orders[index] = replace(orders[index], cancel_after_s=rng.uniform(0, 1.0))
        elif fault.kind is Kind.SLOW_READER:
            orders[index] = replace(orders[index], stall_s=fault.for_s)
    return tuple(orders)


class _Client:
    """One client: reads, stalls, leaves, and comes back when its router is gone. Checks what it is sent."""

    def __init__(self, cluster: SimCluster, order: Order, index: int, report: Report) -> None:
        self._cluster, self._order, self._index, self._report = cluster, order, index, report
        self._request = cluster.request(
            order.name, order.prompt, order.sampling, TIMEOUT_S, order.scope
        )
        self._tokens: list[list[int]] = [[] for _ in range(order.sampling.n)]
        self._texts = [""] * order.sampling.n
        self._has_tail = [False] * order.sampling.n
        self._finish: dict[int, str] = {}
        self.ended: RequestEnded | None = None
        self.is_cancelled = False

    @property
    def request(self) -> GenerateRequest:
        return self._request

    async def run(self) -> None:
        for attempt in range(MAX_RECONNECTS):
            router = await self._alive_router(attempt)
            wake = asyncio.Event()
            have = tuple(
                len(tokens) + (2 if choice in self._finish else self._has_tail[choice])
                for choice, tokens in enumerate(self._tokens)
            )
            said = (
                tuple(tuple(t) for t in self._tokens) if self._index % 2 else ()
            )  # as our client does; SSE cannot
            request = (
                replace(self._request, resume_from=have, resume_tokens=said)
                if attempt
                else self._request
            )
            stream = router.open(request, wake)
            self._report.reconnects += attempt > 0
            is_over = await self._read(router, stream, wake)
            router.closed(wake)
            if (
                router.is_alive
            ):  # the router sees the connection close, at the latest when it runs again
                asyncio.get_running_loop().create_task(
                    stream.close(), context=router.context.copy()
                )
            if is_over:
                return

    async def _alive_router(self, attempt: int) -> SimRouter:
        while True:
            routers = self._cluster.routers
            for step in range(len(routers)):
                router = routers[(self._index + attempt + step) % len(routers)]
                if router.is_alive and router.name not in self._cluster.paused:
                    return router
            await asyncio.sleep(0.05)

    async def _read(self, router: SimRouter, stream: RequestStream, wake: asyncio.Event) -> bool:
        """Read one stream; False: it broke, come back elsewhere."""
        loop = asyncio.get_running_loop()
        order, stall_s = self._order, self._order.stall_s
        leaves_at = None if order.cancel_after_s is None else loop.time() + order.cancel_after_s
        while True:
            wake.clear()
            if not router.is_alive:
                return False
            for event in stream.take() if router.name not in self._cluster.paused else []:
                self._check(event)
            if self.ended is not None:
                return True
            if leaves_at is not None and loop.time() >= leaves_at:
                self.is_cancelled = True
                self._report.bitten[Kind.CANCEL] += 1
                return True
            if stall_s and any(self._tokens):
                self._report.bitten[Kind.SLOW_READER] += 1
                await asyncio.sleep(stall_s)
                stall_s = 0.0
            wait_s = UNANSWERED_PING_S if leaves_at is None else max(0.0, leaves_at - loop.time())
            try:
                async with asyncio.timeout(wait_s):
                    await wake.wait()
            except TimeoutError:
                if router.name in self._cluster.paused:
                    return False

    def _check(self, event: RequestEvent) -> None:
        name, report = self._order.name, self._report
        if self.ended is not None:
            report.violations.append(f"I2 {name}: {type(event).__name__} after its end")
        match event:
            case TextDelta(choice, position, token_ids, text):
                if (
                    position != len(self._tokens[choice])
                    or choice in self._finish
                    or self._has_tail[choice]
                ):
                    report.violations.append(
                        f"I2 {name}: position {position} of choice {choice} after {len(self._tokens[choice])}"
                    )
                self._tokens[choice] += token_ids
                self._texts[choice] += text
                self._has_tail[choice] = not token_ids
            case ChoiceFinished(choice, reason):
                if choice in self._finish:
                    report.violations.append(f"I2 {name}: choice {choice} finished twice")
                self._finish[choice] = reason.value
            case RequestEnded():
                self.ended = event
                self._check_end(event)

    def _check_end(self, ended: RequestEnded) -> None:
        name, report = self._order.name, self._report
        now_s, phases = self._cluster.clock.now_s(), ended.anatomy.phases()
        if now_s > self._request.deadline_at + 1:
            report.violations.append(
                f"L1 {name}: ended {now_s - self._request.deadline_at:.1f} s after its deadline"
            )
        if min(phases.values()) < -1e-9 or abs(sum(phases.values()) - ended.anatomy.e2e_s) > 1e-6:
            report.violations.append(
                f"I7 {name}: phases {phases} do not add up to {ended.anatomy.e2e_s}"
            )
        report.retries += sum(not a.endswith((":ok", ":draining")) for a in ended.anatomy.attempts)
        report.moves += sum(a.endswith(":draining") for a in ended.anatomy.attempts)
        report.decisions.append(f"{name} {' '.join(ended.anatomy.attempts)}")

    def compare(self, expected: list[Expected], max_faults: int) -> None:
        """Check the whole stream against the reference (I1), and its ending (I7)."""
        name, report = self._order.name, self._report
        if self.is_cancelled:
            report.endings["cancelled"] += 1
        elif self.ended is None:
            report.violations.append(f"I2 {name}: no terminal event")
        else:
            error = self.ended.error
            report.endings[type(error).__name__ if error else "finished"] += 1
            if error is not None and not _is_justified(
                error, self.ended.anatomy.attempts, max_faults
            ):
                report.violations.append(
                    f"I7 {name}: {error!r} after {self.ended.anatomy.attempts}"
                )
            if error is None and len(self._finish) != len(expected):
                report.violations.append(
                    f"I2 {name}: {len(self._finish)} of {len(expected)} choices finished"
                )
        for choice, want in enumerate(expected):
            tokens, text = tuple(self._tokens[choice]), self._texts[choice]
            report.tokens += len(tokens)
            if choice in self._finish:
                is_exact = (tokens, text, self._finish[choice]) == (
                    want.token_ids,
                    want.text,
                    want.finish,
                )
            else:
                is_exact = tokens == want.token_ids[: len(tokens)] and want.text.startswith(text)
            if not is_exact:
                report.violations.append(
                    f"I1 {name} choice {choice}: {tokens} {text!r} is not {want}"
                )


def _is_justified(error: ServingError, attempts: tuple[str, ...], max_faults: int) -> bool:
    """An error is honest if the request met more faults than it has attempts for, or nobody was left."""
    num_faults = sum(not a.endswith((":ok", ":draining")) for a in attempts)
    if isinstance(error, NoWorker):
        return num_faults > 0
    if isinstance(error, Quarantined):
        return num_faults > 2
    return error.is_retryable and num_faults > max_faults


def run_trial(plan: Plan) -> Report:
    """Run one plan and check everything."""
    return run_virtual(_trial(plan))


async def _trial(plan: Plan) -> Report:
    report, cluster = Report(requests=len(plan.orders)), SimCluster(plan.shape, plan.seed)
    await cluster.start()
    injector = Injector(cluster, plan.faults, random.Random(plan.seed + 7))
    clients = []

    async def one(index: int, order: Order) -> None:
        await asyncio.sleep(order.start_s)
        client = _Client(cluster, order, index, report)
        clients.append(client)
        await client.run()

    watching = asyncio.get_running_loop().create_task(_watch_bounds(cluster, report))
    async with asyncio.TaskGroup() as tasks:
        for index, order in enumerate(plan.orders):
            tasks.create_task(one(index, order))
        tasks.create_task(injector.run())
    await _check_recovery(cluster, injector, report)
    watching.cancel()
    await _check_rest(cluster, report)
    oracle = Oracle(cluster.layout, VOCABULARY, plan.shape.max_model_len + 70)
    for client in clients:
        client.compare(oracle.expected(client.request), plan.shape.router.max_fault_attempts)
    report.bitten.update(injector.bitten)
    if plan.faults and report.bitten.total() < min(MIN_BITTEN, len(plan.faults)):
        report.violations.append(f"H1 only {report.bitten.total()} faults bit")
    report.steps, report.virtual_s = cluster.num_steps, cluster.clock.now_s()
    report.transitions.update(cluster.transitions)
    await cluster.stop()
    return report


async def _watch_bounds(cluster: SimCluster, report: Report) -> None:
    """I6: nothing the workers hold for a router grows beyond what its requests may have open."""
    credit = cluster.shape.router.credit_positions
    suspects: list[str] = []
    while True:
        await asyncio.sleep(0.25)
        stuck = [v for v in _lost_wake_ups(cluster) if v in suspects]
        suspects = _lost_wake_ups(
            cluster
        )  # twice in a row, so that a wake-up under way is not taken for a lost one
        report.violations += [v for v in stuck if v not in report.violations]
        for node, unit in cluster.units.items():
            for attempt in unit.worker.attempts.values():
                for choice, log in attempt.logs.items():
                    if len(log.tokens) - log.num_sent > max(credit, attempt.submit.credit) + 1:
                        report.violations.append(
                            f"I6 {node}: {len(log.tokens) - log.num_sent} unsent of {choice}"
                        )


def _lost_wake_ups(cluster: SimCluster) -> list[str]:
    """L1: on an idle worker every unfinished sequence waits for something that is still to come."""
    found = []
    for node, unit in cluster.units.items():
        if node in cluster.paused or not unit.worker.is_idle:
            continue
        if cluster.failing_allocations.get(node, 0):
            continue  # blocks are refused that are there, and a timer makes good for it
        scheduler = unit.scheduler
        found += [
            f"L1 {node}: sequence {sequence.key} waits for a step that nobody takes"
            for sequence in (*scheduler.running, *scheduler.waiting)
            if wake_up_of(scheduler, sequence) is WakeUp.STEP
        ]
    return found


async def _check_recovery(cluster: SimCluster, injector: Injector, report: Report) -> None:
    """L2: a while after the last fault every router serves at the first attempt, and the store is whole."""
    await asyncio.sleep(RECOVERY_S)
    for router in cluster.routers:
        for number in range(PROBES_PER_ROUTER):
            request = cluster.request(
                f"probe-{router.name}-{number}", tuple(range(1, 50)), SamplingParams(max_tokens=4)
            )
            wake = asyncio.Event()
            stream = router.open(request, wake)
            ended = await _last_event(stream, wake)
            router.closed(wake)
            if ended.error is not None or len(ended.anatomy.attempts) != 1:
                report.violations.append(
                    f"L2 {router.name}: {ended.error!r} after {ended.anatomy.attempts}"
                )
    if injector.store_back_at is not None and cluster.store.written_at < injector.store_back_at:
        report.violations.append(
            f"L2 the store was not written within {RECOVERY_S} s of its return"
        )


async def _last_event(stream: RequestStream, wake: asyncio.Event) -> RequestEnded:
    while True:
        wake.clear()
        for event in stream.take():
            if isinstance(event, RequestEnded):
                return event
        await wake.wait()


async def _check_rest(cluster: SimCluster, report: Report) -> None:
    """L3 and I3: nothing is left, neither at the workers nor at the routers."""
    try:
        await cluster.rest()
    except InvariantViolation as error:
        report.violations.append(f"L3 {error}")
    for router in cluster.routers:
        left = {
            "requests": router.orchestrator.num_running,
            "subscriptions": sum(link.num_subscribers for link in router.links.all()),
        }
        if any(left.values()):
            report.violations.append(f"L3 {router.name} is not at rest: {left}")
