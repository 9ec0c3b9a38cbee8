"""A randomised run with faults, and the invariants of reliability.md D1 checked on it.

Owns the load, the fault schedule of one seed and the comparison with the fault-free run. Does not
know how faults are carried out. Called by tests; `baton simulate` will grow from here.

    I1 tokens equal the fault-free run      I2 positions without gap or repeat, one ending, last
    I3 blocks and requests are conserved    I5 stale epochs have no effect (implied by I1, I2)
    L1 every request ends by its deadline   L3 at rest nothing is left
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from core.errors import Cancelled, DeadlineExceeded
from core.session import Role
from core.types import ChoiceFinished, GenerateRequest, RequestEnded, RequestEvent, SamplingParams, TextDelta
from simulation.cluster import Shape, SimCluster
from simulation.loop import run_virtual
from simulation.network import SimStream

Tokens = dict[int, tuple[int, ...]]


@dataclass(slots=True)
class Report:
    """What happened in one run."""

    tokens: dict[str, Tokens] = field(default_factory=dict)
    endings: dict[str, str] = field(default_factory=dict)
    paths: Counter[str] = field(default_factory=Counter)
    bitten: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    steps: int = 0
    preemptions: int = 0
    retries: int = 0
    virtual_s: float = 0.0


def make_load(seed: int, num_requests: int) -> list[tuple[float, str, tuple[int, ...], SamplingParams]]:
    """Draw requests: (start, name, prompt, sampling). Every third shares a prefix."""
    rng = random.Random(seed)
    shared = tuple(rng.randrange(1, 97) for _ in range(24))
    load = []
    for i in range(num_requests):
        prompt = tuple(rng.randrange(1, 97) for _ in range(rng.randrange(1, 60)))
        sampling = SamplingParams(
            max_tokens=rng.randrange(1, 40),
            n=rng.choice([1, 1, 1, 2, 3]),
            temperature=rng.choice([0.0, 1.0]),
            min_tokens=0,
        )
        load.append((rng.uniform(0, 2), f"r{i}", shared + prompt if i % 3 == 0 else prompt, sampling))
    return load


def read_events(name: str, events: list[RequestEvent], report: Report) -> Tokens:
    """Check the order of one request's events (I2) and return its tokens by choice."""
    tokens: dict[int, list[int]] = {}
    finished: set[int] = set()
    for index, event in enumerate(events):
        is_last = index == len(events) - 1
        match event:
            case TextDelta(choice, position, token_ids):
                seen = tokens.setdefault(choice, [])
                if position != len(seen) or choice in finished:
                    report.violations.append(f"I2 {name}: position {position} of choice {choice} after {len(seen)}")
                seen += token_ids
            case ChoiceFinished(choice):
                if choice in finished:
                    report.violations.append(f"I2 {name}: choice {choice} finished twice")
                finished.add(choice)
            case RequestEnded() if not is_last:
                report.violations.append(f"I2 {name}: ended before its last event")
            case RequestEnded():
                pass
    if not events or not isinstance(events[-1], RequestEnded):
        report.violations.append(f"I2 {name}: no terminal event")
    return {choice: tuple(ids) for choice, ids in tokens.items()}


@dataclass(frozen=True, slots=True)
class Faults:
    """Which faults a run may meet, and how often."""

    session_resets: int = 0
    fetch_resets: int = 0
    flips: int = 0
    kills: int = 0
    cancels: int = 0
    preempt_odds: float = 0.0


async def _run(seed: int, shape: Shape, num_requests: int, faults: Faults) -> Report:
    report, cluster = Report(), SimCluster(shape, seed)
    rng = random.Random(seed + 7)
    cluster.preempt_odds = faults.preempt_odds
    await cluster.start()
    cancelled = set(rng.sample(range(num_requests), faults.cancels))

    async def one(index: int, start_s: float, request: GenerateRequest) -> None:
        await asyncio.sleep(start_s)
        events: list[RequestEvent] = []
        task = asyncio.get_running_loop().create_task(cluster.orchestrator.run(request, events.append))
        if index in cancelled:
            await asyncio.sleep(rng.uniform(0, 0.2))
            report.bitten["cancel"] += task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        ended = events[-1]
        report.tokens[request.request_id] = read_events(request.request_id, events, report)
        if isinstance(ended, RequestEnded):
            report.endings[request.request_id] = type(ended.error).__name__ if ended.error else "finished"
            report.paths[ended.anatomy.path] += 1
            report.retries += max(0, len(ended.anatomy.attempts) - 1)
            if isinstance(ended.error, DeadlineExceeded):
                report.violations.append(f"L1 {request.request_id}: nothing moved until its deadline")
            if cluster.clock.now_s() > request.deadline_at + 1:
                report.violations.append(f"L1 {request.request_id}: ended after its deadline")
            if isinstance(ended.error, Cancelled) and index not in cancelled:
                report.violations.append(f"I7 {request.request_id}: ended with {ended.error}")

    async with asyncio.TaskGroup() as tasks:
        for index, (start_s, name, prompt, sampling) in enumerate(make_load(seed, num_requests)):
            tasks.create_task(one(index, start_s, cluster.request(name, prompt, sampling)))
        tasks.create_task(_inflict(cluster, rng, faults, report))
    try:
        await cluster.rest()
    except Exception as error:  # noqa: BLE001 - any left-over is a violation to be reported with its seed
        report.violations.append(f"L3 {error}")
    if cluster.orchestrator.num_running:
        report.violations.append(f"I3 {cluster.orchestrator.num_running} requests still run")
    left = sum(link.num_subscribers for link in cluster.links.all())
    if left:
        report.violations.append(f"L3 {left} subscriptions are left")
    report.steps, report.virtual_s = cluster.num_steps, cluster.clock.now_s()
    report.bitten["preempt"] += cluster.num_forced_preemptions
    report.preemptions = cluster.num_preemptions + sum(u.scheduler.num_preemptions for u in cluster.units.values())
    await cluster.stop()
    return report


async def _inflict(cluster: SimCluster, rng: random.Random, faults: Faults, report: Report) -> None:
    """Spread the faults over the run; count only those that bit."""
    flips, fetch_resets = faults.flips, faults.fetch_resets

    def tamper(stream: SimStream, message: Any) -> Any:  # noqa: ANN401
        nonlocal flips, fetch_resets
        if fetch_resets and stream.kind == "fetch" and rng.random() < 0.05:
            fetch_resets -= 1
            report.bitten["fetch"] += 1
            stream.reset()
            return None
        if flips and isinstance(message, bytes) and message[:1] == b"\x05" and rng.random() < 0.2:
            flips -= 1
            report.bitten["flip"] += 1
            at = rng.randrange(len(message) - 32, len(message))
            return message[:at] + bytes([message[at] ^ (1 << rng.randrange(8))]) + message[at + 1 :]
        return message

    cluster.hub.tamper = tamper
    plan = [*["session"] * faults.session_resets, *["kill"] * faults.kills]
    rng.shuffle(plan)
    for kind in plan:
        await asyncio.sleep(rng.uniform(0.02, 2.0 / len(plan)))
        if kind == "session":
            report.bitten[kind] += cluster.hub.reset(kind) > 0
            continue
        role = rng.choice([Role.PREFILL, Role.DECODE])
        victims = [n for n, u in cluster.units.items() if u.descriptor.role is role]
        if not victims:
            continue
        report.bitten["kill"] += 1
        cluster.membership.starting += 1
        await cluster.kill(rng.choice(victims))
        await asyncio.sleep(0.5)
        await cluster.add(role)
        cluster.membership.starting -= 1


def smoke(seed: int, shape: Shape | None = None, num_requests: int = 24, faults: Faults | None = None) -> Report:
    """Run one seed with faults and compare it with the fault-free run of the same load.

    Returns:
        The faulty run's report; `violations` is empty when every invariant held.
    """
    shape = shape or Shape()
    calm = run_virtual(_run(seed, shape, num_requests, Faults()))
    report = run_virtual(_run(seed, shape, num_requests, faults or Faults()))
    report.violations += [f"calm run: {v}" for v in calm.violations]
    for name, ending in report.endings.items():
        expected = calm.tokens[name]
        for choice, token_ids in report.tokens[name].items():
            is_exact = (
                token_ids == expected[choice]
                if ending == "finished"
                else token_ids == expected[choice][: len(token_ids)]
            )
            if not is_exact:
                report.violations.append(f"I1 {name} choice {choice}: {token_ids} is not {expected[choice]}")
    if len(report.endings) != num_requests:
        report.violations.append(f"I3 {len(report.endings)} of {num_requests} requests ended")
    return report
