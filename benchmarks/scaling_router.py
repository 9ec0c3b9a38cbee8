"""What a router pays by the number of workers: placing a request, introducing peers.

Owns a membership and a network of workers that exist in memory only, and the sweep over their
number. Called by `benchmarks.scaling`.
"""

import asyncio
import itertools
import random
import time

from core.clocks import LoopClock
from core.ids import Incarnation, RouterId, WorkerId
from core.session import (
    ConnectPeers,
    Hello,
    Load,
    Progress,
    Role,
    RouterHeartbeat,
    Welcome,
    WorkerDescriptor,
)
from core.types import GenerateRequest, SamplingParams
from router.placement import PlacementConstraints, choose
from router.workers.sessions import WorkerSessions
from transport.sequenced import Numbered

WORKERS = (8, 64, 512, 1_000)
BLOCK_SIZE_TOKENS = 16


def place(sessions, request):
    return choose(sessions.candidates(), request, PlacementConstraints(), now_s=0.0)


def cpu_ms(action, repeats, inner=1):
    """CPU milliseconds of one call: a sample per repeat, each the mean over `inner` calls."""
    samples = []
    for _ in range(repeats):
        began = time.thread_time()
        for _ in range(inner):
            action()
        samples.append((time.thread_time() - began) * 1e3 / inner)
    return samples


class ConnectedPairs:
    """Which decode workers have been told of which prefill workers, as the workers see it."""

    def __init__(self):
        self.pairs = set()
        self.wanted = 0
        self.is_complete = asyncio.Event()

    def want(self, number):
        self.wanted = number
        self.is_complete.clear()
        self._check()

    def note(self, worker_id, addresses):
        self.pairs.update((worker_id, address) for address in addresses)
        self._check()

    def _check(self):
        if len(self.pairs) >= self.wanted:
            self.is_complete.set()


class WorkerStream:
    """A session stream whose other end is a worker with nothing to do."""

    transport = "memory"

    def __init__(self, descriptor, load, met):
        self._descriptor, self._load, self._met = descriptor, load, met
        self._inbox = asyncio.Queue()
        self._numbers = itertools.count()

    async def send(self, numbered):
        match numbered.message:
            case Hello():
                self._say(Welcome(self._descriptor))
                self._say(Progress(0, 0, False, self._load))
            case RouterHeartbeat():
                self._say(Progress(0, 0, False, self._load))
            case ConnectPeers(addresses):
                self._met.note(self._descriptor.worker_id, addresses)

    def _say(self, message):
        self._inbox.put_nowait(Numbered(next(self._numbers), message))

    async def recv(self):
        return await self._inbox.get()

    async def close(self):
        pass

    def reset(self):
        pass


class MemoryCluster:
    """Membership and network of workers that exist in memory only."""

    def __init__(self):
        self.rng = random.Random(5)
        self.descriptors = {}
        self.met = ConnectedPairs()
        self.on_change = lambda: None

    def members(self):
        return tuple(self.descriptors.values())

    def watch(self, on_change):
        self.on_change = on_change

    def is_starting(self):
        return False

    async def dial(self, address):
        load = Load(
            num_waiting=self.rng.randrange(4),
            num_running=self.rng.randrange(32),
            waiting_tokens=self.rng.randrange(4_096),
            free_blocks=self.rng.randrange(512),
        )
        return WorkerStream(self.descriptors[address], load, self.met)

    def add(self, role):
        number = len(self.descriptors)
        name = f"{role.value}-{number}"
        self.descriptors[name] = WorkerDescriptor(
            WorkerId(name),
            role,
            Incarnation(number + 1),
            session_address=name,
            transfer_address=f"grpc=10.0.{number // 256}.{number % 256}:4000",
            model="m",
            content_digest="digest",
            block_size_tokens=BLOCK_SIZE_TOKENS,
            num_blocks=512,
            max_model_len=4_096,
        )

    def num_pairs(self):
        roles = [d.role for d in self.descriptors.values()]
        return roles.count(Role.PREFILL) * roles.count(Role.DECODE)

    async def introduced_ms(self, change):
        """CPU milliseconds from a change of the members until every pair has been introduced."""
        began = time.thread_time()
        change()
        self.met.want(self.num_pairs())
        async with asyncio.timeout(300):
            await self.met.is_complete.wait()
        return (time.thread_time() - began) * 1e3


async def router_at(curves, num_workers, repeats):
    cluster = MemoryCluster()
    roles = itertools.cycle((Role.PREFILL, Role.DECODE))
    for _ in range(num_workers):
        cluster.add(next(roles))
    sessions = WorkerSessions(cluster, cluster, RouterId("router"), LoopClock())
    curves.add("introduce_all", num_workers, [await cluster.introduced_ms(sessions.follow)])
    prompt = tuple(range(256))
    request = GenerateRequest("r", "m", prompt, SamplingParams(), seed=1, deadline_at=1e9)
    curves.add("placement", num_workers, cpu_ms(lambda: place(sessions, request), repeats))

    def join():
        cluster.add(next(roles))
        cluster.on_change()

    for _ in range(repeats):
        curves.add("introduce_one", num_workers, [await cluster.introduced_ms(join)])
    await sessions.close()


def measure_router(curves, repeats):
    for num_workers in WORKERS:
        for _ in range(2 if num_workers > 100 else repeats):
            asyncio.run(router_at(curves, num_workers, repeats))
