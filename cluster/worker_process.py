"""One real worker: ranks, transfer agent in its thread, sessions over gRPC.

Owns the composition of a worker from real components, for child processes and Ray replicas alike.
Does not know who started it.
"""

from __future__ import annotations

import os
import sys
import time
from typing import assert_never

from cluster.block_stores import exports_kv, make_stores
from cluster.certificate_expiry import CertificateEnds
from cluster.pools import pools_of
from cluster.prefix_index import IndexTask, make_publisher
from cluster.secrets import with_read_secrets
from cluster.served_model import model_of
from cluster.tracing import make_tracing
from core import events
from core.block_hash import hash_key
from core.clocks import SystemClock
from core.config import BatonConfig
from core.errors import ConfigError, ModelLoadError
from core.ids import Ids, WorkerId
from core.ports import Network
from core.prefix_changes import StorageTier
from core.session import PoolId, Role, WorkerDescriptor
from decode_worker.role import DecodeRole
from engine.ranks.rank_group import Launch, RankGroup, launch_child
from engine.scheduling.block_changes import BlockChanges
from kv_transfer.agent_thread import AgentThread
from kv_transfer.sidecar.network import SidecarNetwork
from kv_transfer.transports.choice import Transports
from kv_transfer.transports.shared_memory import SharedNetwork
from prefill_worker.role import PrefillRole
from prefix_index.publisher import Content
from transport.fetch_streams import fetch_network
from transport.session_streams import session_network
from transport.stream_proof import stream_key
from transport.tls import fetch_tls, session_tls
from worker.components import WorkerComponents
from worker.worker import Worker, compose

DRAIN_GRACE_S = 5.0
FRAME_HEAD_BYTES = 1 << 16
"""Room for a frame's header, so that it goes in one piece."""


def _transports(config: BatonConfig, role: Role, ranks: RankGroup, host: str) -> Transports:
    """Make the networks that the config names, in its order."""
    made: dict[str, Network] = {}
    security = config.security
    for name in config.transfer.transports:
        match name:
            case "shm":
                if sys.platform == "linux":
                    made[name] = SharedNetwork(ranks.kv.shared)
            case "grpc":
                tls = fetch_tls(security, role.value)
                made[name] = fetch_network(host, tls, stream_key(security.cluster_key))
            case "gloo" | "nccl" | "nixl":
                # Its bytes are neither encrypted nor signed: they stay on this host unless the
                # operator trusts the network.
                where = host if security.trust_network else "127.0.0.1"
                frame_bytes = config.transfer.frame_bytes + FRAME_HEAD_BYTES
                made[name] = SidecarNetwork(name, where, frame_bytes)
            case _:
                assert_never(name)  # a name that the config gained: mypy finds it before it runs
    return Transports(made)


class RunningWorker:
    """A started worker."""

    def __init__(
        self,
        ranks: RankGroup,
        unit: Worker,
        ends: CertificateEnds,
        publishing: IndexTask | None,
    ) -> None:
        """Made by `start`."""
        self._ranks = ranks
        self._unit = unit
        self._ends = ends
        self._publishing = publishing

    @classmethod
    async def start(
        cls,
        config: BatonConfig,
        pool: PoolId,
        node: str,
        host: str = "127.0.0.1",
        launch: Launch = launch_child,
    ) -> RunningWorker:
        """Load the model, listen, be ready.

        Args:
            config: The whole tree.
            pool: Which of its pools the worker is in.
            node: Where it runs.
            host: Address that it listens on.
            launch: Starts one rank process.

        Raises:
            ModelLoadError: The model cannot be served.
            WorkerLost: The rank did not start.
            ConfigError: There is no cluster key.
        """
        config = with_read_secrets(config)
        if not config.security.cluster_key:
            raise ConfigError(
                "a worker was started without security.cluster_key; `baton up` makes one if the "
                "config has none; if you start workers yourself, set it"
            )
        began_at = time.monotonic()
        spec = model_of(config)
        role = pool.role
        engine = pools_of(config)[pool].engine
        is_exported = exports_kv(engine, role)
        ranks = RankGroup(spec, engine, launch, exports_kv=is_exported)
        try:
            # Before any process is started: the reason then stands in one line, not in a killed
            # child.
            ranks.check_memory()
            await ranks.start()
        except ModelLoadError as error:
            events.WORKER_FAILED.log(reason=error.message)
            raise
        layout = spec.layout(engine.block_size_tokens, engine.tensor_parallel_size)
        ids = Ids()
        worker_id = ids.worker(str(pool))
        tls = session_tls(config.security, role.value)
        # Without a cache there is nothing that another request could find.
        is_published = bool(config.redis.url) and engine.cache_prefixes
        changes = BlockChanges() if is_published else None
        components = WorkerComponents(
            role=PrefillRole if role is Role.PREFILL else DecodeRole,
            runner=ranks,
            kv=ranks.kv,
            layout=layout,
            engine=engine,
            transfer=config.transfer,
            max_model_len=spec.max_model_len,
            vocabulary_size=spec.vocabulary_size,
            hash_key=hash_key(config.security.cluster_key),
            session_network=session_network(host, tls, stream_key(config.security.cluster_key)),
            transfer_network=_transports(config, role, ranks, host),
            clock=SystemClock(),
            worker_id=WorkerId(worker_id),
            incarnation=ids.incarnation(),
            model=spec.name,
            tier=pool.tier,
            node=node,
            pid=os.getpid(),
            tracing=make_tracing(config.tracing, f"baton-{role.value}"),
            block_changes=changes,
            exports_kv=is_exported,
            stores=make_stores(config, engine, role, layout, is_published=is_published),
            tiers=config.tiers,
        )
        unit = compose(components, AgentThread())
        descriptor = await unit.start()
        events.WORKER_READY.log(
            worker_id=worker_id,
            role=role.value,
            tier=pool.tier,
            model=spec.name,
            rank_pids=descriptor.rank_pids,
            took_s=round(time.monotonic() - began_at, 3),
        )
        ends = CertificateEnds(config.security, role.value, tls)
        ends.watch()
        publishing = None
        if changes is not None:
            life = (components.worker_id, components.incarnation)
            contents = {StorageTier.POOL: Content(changes, unit.pool.registered, engine.num_blocks)}
            for one in components.stores:
                if one.changes is not None and unit.stored is not None:
                    book = unit.stored.tiers.tiers[one.tier].book
                    contents[one.tier] = Content(one.changes, book.registered, one.num_slots)
            publishing = IndexTask(make_publisher(config, life, contents))
        return cls(ranks, unit, ends, publishing)

    @property
    def descriptor(self) -> WorkerDescriptor:
        """Who it is and where it listens."""
        return self._unit.descriptor

    @property
    def unit(self) -> Worker:
        """The worker inside, for health checks and tests."""
        return self._unit

    def check(self) -> None:
        """Raise what ended the worker's loop, if it has ended.

        Raises:
            Exception: The failure, as it was.
        """
        fatal = self._unit.fatal
        if fatal.done():
            fatal.result()

    async def stop(self, grace_s: float = DRAIN_GRACE_S) -> None:
        """Let requests move to other workers, then end sessions, agent and ranks."""
        self._ends.close()
        # Ranks last: hand-overs that the drain lets finish still read their memory.
        await self._unit.drain(grace_s)
        if self._publishing is not None:
            await self._publishing.stop()
        await self._unit.stop()
        await self._ranks.stop()
        self._unit.attempts.tracing.close()
