"""A whole cluster in one process with real models: real scheduler, transfers,
orchestrator, transports.

Ranks are replaced by the same `ModelRunner` called directly, so that hundreds of runs take seconds.
"""

import asyncio
import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from core.clocks import SystemClock
from core.config import EngineConfig, PlacementConfig, RouterConfig, TransferConfig
from core.ids import Ids, RequestId, WorkerId
from core.plan import StepItem, StepPlan
from core.session import Role
from core.types import (
    ChoiceFinished,
    GenerateRequest,
    PromptScored,
    RequestEnded,
    SamplingParams,
    TextDelta,
)
from decode_worker.role import DecodeRole
from engine.checkpoint.model_spec import read_model
from engine.model.kv_pools import StagedPool
from engine.model.model import Model
from engine.model.runner import ModelRunner
from engine.model.sharding import Shard
from engine.ranks.shared_kv import SharedKV
from kv_transfer.agent_thread import AgentThread
from kv_transfer.sidecar.network import SidecarNetwork
from kv_transfer.transports.choice import Transports
from kv_transfer.transports.shared_memory import SharedNetwork
from prefill_worker.role import PrefillRole
from process.shared_memory import create_segment
from router.compose import RouterComponents
from router.compose import compose as compose_router
from simulation.hash_runner import MemoryKV
from simulation.ports import StaticMembership
from support.in_process_network import InProcessNetwork
from transport.fetch_streams import fetch_network
from transport.session_streams import session_network
from worker.components import WorkerComponents
from worker.worker import Worker
from worker.worker import compose as compose_worker

HAS_NIXL = importlib.util.find_spec("nixl") is not None
NIXL = pytest.param(
    "nixl", marks=pytest.mark.skipif(not HAS_NIXL, reason="the extra nixl is not installed")
)
_models: dict = {}


def load(folder, dtype, attention="cpu"):
    """Load a model once per session."""
    key = (str(folder), dtype, attention)
    if key not in _models:
        torch.set_num_threads(1)
        spec = read_model(folder, dtype)
        model = Model(Shard(spec), torch.device("cpu"), attention)
        # As a rank does when it starts: in a fresh clone the kernels compile for seconds, longer
        # than a lease.
        runner = ModelRunner(model, MemoryKV(spec.layout(16), 2)._shards[0], 2, 16)
        runner.execute(StepPlan(0, (StepItem(0, 0, (0,), (0,)),)), lambda *_: None)
        _models[key] = (spec, model)
    return _models[key]


class DirectRunner:
    """A `ModelRunner` on the worker's own loop."""

    def __init__(self, model, memory, engine):
        self.inner = ModelRunner(model, memory, engine.num_blocks, engine.block_size_tokens)
        self.num_steps = 0
        self.layers_done = 0

    def counted(self, plan, on_layer):
        """As a rank does: count every layer, speak of those that are asked for."""

        def layer_done(step_id, layer):
            self.layers_done += 1
            if plan.report_layers:
                on_layer(step_id, layer)

        return layer_done

    async def execute(self, plan, on_layer):
        self.num_steps += 1
        await asyncio.sleep(0)
        result = self.inner.execute(plan, self.counted(plan, on_layer))
        await asyncio.sleep(0)
        return result

    async def lost(self):
        await asyncio.Event().wait()

    async def restart(self):
        raise AssertionError("a direct runner never dies")

    def rank_pids(self):
        return ()

    def ranks(self):
        return [self.inner, *getattr(self, "others", [])]


def shared_pool(layout, num_blocks):
    """A pool as a rank group makes it."""
    kv = SharedKV(layout, num_blocks)
    kv.use([create_segment(layout.pool_bytes(num_blocks)) for _ in range(layout.num_shards)])
    return kv


class ThreadGroup:
    """The ranks of one model as threads of this process:
    the rule of `engine.model.collectives` without a network."""

    def __init__(self, size):
        self.barrier, self.parts = threading.Barrier(size, timeout=60), [None] * size

    def member(self, rank):
        return ThreadMember(self, rank)


class ThreadMember:
    def __init__(self, group, rank):
        self.group, self.rank, self.size = group, rank, len(group.parts)

    def gather(self, x):
        self.group.parts[self.rank] = x
        self.group.barrier.wait()
        parts = list(self.group.parts)
        self.group.barrier.wait()
        return parts

    def sum(self, x, rows):
        total, *others = (part[:rows].float() for part in self.gather(x))
        for part in others:
            total = total + part
        out = torch.zeros_like(x)
        out[:rows] = total
        return out

    def exchange(self, x, owners, widths):
        mine = [row for row, owner in enumerate(owners) if owner == self.rank]
        return torch.cat([part[mine] for part in self.gather(x)], dim=1)


class ThreadedRunner(DirectRunner):
    """`DirectRunner` over several ranks."""

    def __init__(self, models, memories, engine):
        super().__init__(models[0], memories[0], engine)
        sizes = engine.num_blocks, engine.block_size_tokens
        self.others = [
            ModelRunner(m, memory, *sizes)
            for m, memory in zip(models[1:], memories[1:], strict=True)
        ]

    async def execute(self, plan, on_layer):
        self.num_steps += 1
        await asyncio.sleep(0)
        with ThreadPoolExecutor(len(self.others)) as pool:
            rest = [pool.submit(runner.execute, plan, lambda *_: None) for runner in self.others]
            result = self.inner.execute(plan, self.counted(plan, on_layer))
            for part in rest:
                result.tokens.update(part.result().tokens)
                result.failed.update(part.result().failed)
                result.scored.update(part.result().scored)
        await asyncio.sleep(0)
        return result


def load_shards(folder, dtype, size):
    """Load every rank's part of a model, joined as threads."""
    spec, group = load(folder, dtype)[0], ThreadGroup(size)
    return [
        Model(Shard(spec, rank, size), torch.device("cpu"), "cpu", group.member(rank))
        for rank in range(size)
    ]


class LetterDecoder:
    def push(self, token_id):
        return chr(0x100 + token_id)

    def flush(self):
        return ""


@dataclass
class Reply:
    tokens: dict = field(default_factory=dict)
    texts: dict = field(default_factory=dict)
    finish: dict = field(default_factory=dict)
    logprobs: dict = field(default_factory=dict)
    ended: RequestEnded | None = None
    prompt: tuple = ()


open_clusters: list = []


class InProcessCluster:
    """Workers and a router: `async with InProcessCluster(...) as cluster`, then `cluster.ask`."""

    def __init__(
        self,
        folder,
        dtype="float32",
        engine=None,
        decode_engine=None,
        path="pd",
        transport="inproc",
        prefill=1,
        decode=1,
        transfer=None,
        threaded=False,
        staged=False,
        key=None,
        stores=lambda layout, role: (),
    ):
        """With a `key` sessions go over gRPC as well, and everybody has to know it."""
        self.stores = stores
        self.threaded, self.staged, self.key = threaded, staged, key
        self.spec, self.model = load(folder, dtype)
        self.engine = engine or EngineConfig(
            block_size_tokens=16, num_blocks=96, max_step_tokens=64
        )
        self.decode_engine = decode_engine or self.engine
        self.transport, self.counts = transport, {Role.PREFILL: prefill, Role.DECODE: decode}
        self.transfer = transfer or TransferConfig()
        self.directory: dict = {}
        self.session_directory: dict = {}
        self.membership, self.clock, self.ids = StaticMembership(), SystemClock(), Ids()
        self.units: list[Worker] = []
        self.shared: list[SharedKV] = []
        self.sidecars = {role: [] for role in Role}
        core = compose_router(
            RouterComponents(
                membership=self.membership,
                session_network=self._session_network(),
                config=RouterConfig(max_running=64, max_queued=64),
                placement=PlacementConfig(path=path),
                clock=self.clock,
                ids=self.ids,
                new_decoder=lambda request: LetterDecoder(),
            )
        )
        self.sessions = core.sessions
        self.orchestrator = core.orchestrator

    async def __aenter__(self):
        open_clusters.append(self)
        for role, count in self.counts.items():
            for _ in range(count):
                await self._add(role)
        self.sessions.follow()
        return self

    async def _add(self, role):
        engine = self.engine if role is Role.PREFILL else self.decode_engine
        size = engine.tensor_parallel_size
        layout = self.spec.layout(engine.block_size_tokens, size)
        if self.transport == "shm":
            self.shared.append(kv := shared_pool(layout, engine.num_blocks))
        else:
            kv = MemoryKV(layout, engine.num_blocks)
        if size == 1:
            runner = DirectRunner(self.model, kv._shards[0], engine)
        else:
            runner = ThreadedRunner(
                load_shards(self.spec.folder, self.spec.dtype, size), kv._shards, engine
            )
        if self.staged:
            for inner, memory in zip(runner.ranks(), kv._shards, strict=True):
                shape, dtype = inner.kv.shape, inner.kv.dtype
                inner.pool = StagedPool(
                    memory, shape, dtype, torch.device("cpu"), exports_kv=role is Role.PREFILL
                )
        make = {
            "inproc": lambda: InProcessNetwork(self.directory),
            "grpc": lambda: fetch_network(key=self.key or b""),
            "shm": lambda: SharedNetwork(kv.shared),
            "gloo": lambda: self._sidecars("gloo", role),
            "nixl": lambda: self._sidecars("nixl", role),
        }
        names = self.transport.split("+")
        transfer_network = (
            make[names[0]]()
            if len(names) == 1
            else Transports({name: make[name]() for name in names})
        )
        parts = WorkerComponents(
            role=PrefillRole if role is Role.PREFILL else DecodeRole,
            runner=runner,
            kv=kv,
            layout=layout,
            engine=engine,
            transfer=self.transfer,
            max_model_len=self.spec.max_model_len,
            vocabulary_size=self.spec.vocabulary_size,
            session_network=self._session_network(),
            transfer_network=transfer_network,
            clock=self.clock,
            worker_id=WorkerId(f"{role.value}-{len(self.units)}"),
            incarnation=self.ids.incarnation(),
            model=self.spec.name,
            pid=len(self.units) + 1,
            exports_kv=role is Role.PREFILL or not self.staged,
            stores=self.stores(layout, role),
        )
        unit = compose_worker(parts, AgentThread() if self.threaded else None)
        self.units.append(unit)
        self.membership.join(await unit.start())

    def _session_network(self):
        if self.key is None:
            return InProcessNetwork(self.session_directory)
        return session_network(key=self.key)

    def _sidecars(self, kind, role):
        network = SidecarNetwork(kind, "127.0.0.1", self.transfer.frame_bytes + (1 << 16))
        self.sidecars[role].append(network)
        return network

    def of_role(self, role):
        return [u for u in self.units if u.descriptor.role is role]

    def request(self, prompt, timeout_s=60.0, **sampling):
        params = SamplingParams(**{"temperature": 0.0, **sampling})
        request_id = self.ids.request()
        return GenerateRequest(
            RequestId(request_id),
            self.spec.name,
            tuple(prompt),
            params,
            7 if params.seed is None else params.seed,
            self.clock.now_s() + timeout_s,
            self.spec.eos_token_ids,
        )

    async def ask(self, prompt, **sampling):
        request = self.request(prompt, **sampling)
        events: list = []
        await self.orchestrator.run(request, events.append)
        return read(events)

    async def __aexit__(self, kind, *_):
        if kind is None:
            for _ in range(200):
                try:
                    for unit in self.units:
                        unit.check_at_rest()
                    break
                except Exception:
                    await asyncio.sleep(0.01)
            for unit in self.units:
                unit.check_at_rest()
            assert self.orchestrator.num_running == 0
            assert all(len(session.subscriptions) == 0 for session in self.sessions.all())
        await self.sessions.close()
        for unit in self.units:
            await unit.stop()
        for kv in self.shared:
            kv.close()
        open_clusters.remove(self)


def read(events) -> Reply:
    reply = Reply()
    for event in events:
        match event:
            case TextDelta():
                assert event.position == len(reply.tokens.get(event.choice, []))
                reply.tokens.setdefault(event.choice, []).extend(event.token_ids)
                reply.texts[event.choice] = reply.texts.get(event.choice, "") + event.text
                reply.logprobs.setdefault(event.choice, []).extend(event.logprobs)
            case PromptScored():
                assert not reply.prompt and not reply.tokens
                reply.prompt = event.logprobs
            case ChoiceFinished():
                assert event.choice not in reply.finish
                reply.finish[event.choice] = event
            case RequestEnded():
                assert reply.ended is None
                reply.ended = event
    assert isinstance(events[-1], RequestEnded)
    return reply
