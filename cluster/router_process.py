"""One real router: sessions over gRPC, tokenizer processes, the HTTP and the gRPC server.

Owns the composition of a router from real components. Does not know where members come from.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time

from starlette.types import ASGIApp

from cluster.certificate_expiry import CertificateEnds
from cluster.http_servers import STOP_GRACE_S, RunningHttp, metrics_socket, shared_socket
from cluster.pools import pools_of
from cluster.prefix_index import IndexTask, make_feed
from cluster.quotas import make_quota_store
from cluster.redis.member_store import RedisMemberStore
from cluster.secrets import with_read_secrets
from cluster.served_model import model_of
from cluster.tracing import make_tracing
from core import events
from core.addresses import bare_host, is_any
from core.block_hash import hash_key
from core.clocks import SystemClock
from core.config import BatonConfig
from core.ids import Ids
from core.ports import Membership
from core.session import Role
from core.tenant_classes import TenantClasses
from prefix_index.view import PrefixView
from router.access.certificate import ServerCertificate
from router.access.credentials import Keyring
from router.compose import RouterComponents, ServiceComponents, compose_service
from router.descriptors import INSIDE_DESCRIPTORS, grpc_share, raise_descriptor_limit
from router.grpc.server import GrpcServer
from router.http.app import make_app, make_metrics_app
from router.http.body_reading import BodyReader
from router.http.server.connections import ConnectionTable
from router.http.server.listener import NUM_RESERVED, make_connection_table
from router.observe.prefix_report import no_report
from router.observe.routers import RouterEntry
from router.public_prompts import PublicPrompts, read_prompts
from router.request_params import ServedModel
from router.text.detokenizing import TextModel
from router.text.text_bounds import longest_token_bytes
from router.text.tokenizing import TokenizerPool
from router.tiers import Tiers
from transport.session_streams import session_network
from transport.stream_proof import stream_key
from transport.tls import session_tls

MAX_SCRAPERS = 32
"""Connections to a router's own port for metrics; what is monitored needs few."""
NUM_RESERVED_SCRAPERS = 4


def expected_roles(config: BatonConfig) -> frozenset[Role]:
    """Return the roles of pools that the config fills with workers, both if path pd is forced."""
    # The operator wants the transfer: one pool alone is not what was asked for.
    if config.placement.path == "pd":
        return frozenset(Role)
    return frozenset(pool_id.role for pool_id, pool in pools_of(config).items() if pool.replicas)


class RunningRouter:
    """A started router."""

    def __init__(self, config: BatonConfig, membership: Membership, node_host: str = "") -> None:
        """Compose; `start` listens.

        Args:
            config: The whole tree.
            membership: The workers.
            node_host: By which other machines reach this one; empty: nobody knows.
        """
        config = with_read_secrets(config)
        spec = model_of(config)
        router = config.router
        clock = SystemClock()
        security = config.security
        inner = session_tls(security, "router")
        self._network = session_network(router.host, inner, stream_key(security.cluster_key))
        self._tokenizer = TokenizerPool(
            spec.folder, router.tokenize_timeout_s, router.tokenizer_processes, router.queue_wait_s
        )
        self._public_prompts = PublicPrompts(read_prompts(router.public_prompts))
        self._bodies = BodyReader(router.max_body_bytes, router.body_timeout_s, router.queue_wait_s)
        text = TextModel(spec.folder)
        self._tracing = make_tracing(config.tracing, "baton-router")
        self.prefix_view = PrefixView()
        self.prefix_feed = (
            make_feed(
                config,
                self.prefix_view,
                lambda: [(m.worker_id, m.incarnation) for m in membership.members()],
            )
            if config.redis.url
            else None
        )
        model = ServedModel(
            spec.name,
            spec.vocabulary_size,
            spec.max_model_len,
            spec.eos_token_ids,
            spec.dtype,
            spec.default_sampling,
            fingerprint=f"fp_{spec.digest[:10]}",
            max_prompt_bytes=spec.max_model_len * (longest_token_bytes(spec.folder) or 0),
        )
        is_private = bool(security.door_certificate)
        self._certificate = ServerCertificate(security, clock.now_s) if is_private else None
        self._ends = CertificateEnds(
            security,
            "router",
            inner,
            self._certificate.chain if self._certificate is not None else None,
        )
        tiers = Tiers(config.tiers, config.default_tier)
        classes = TenantClasses(config.tenant_classes)
        pools = pools_of(config)
        made = compose_service(
            RouterComponents(
                membership=membership,
                session_network=self._network,
                config=router,
                placement=config.placement,
                clock=clock,
                ids=Ids(),
                new_decoder=text.decoder_of,
                tracing=self._tracing,
                view=self.prefix_view,
                hash_key=hash_key(security.cluster_key),
                tiers=tiers,
            ),
            ServiceComponents(
                model=model,
                tokenizer=self._tokenizer,
                text=text,
                seed_key=config.seed_key.encode(),
                keyring=Keyring(security.api_keys, clock.now_s, tiers=tiers, classes=classes),
                tenant_classes=classes,
                expected_roles=expected_roles(config),
                configured={pool_id: pool.replicas for pool_id, pool in pools.items()},
                prices_per_hour={pool_id: pool.price_per_hour for pool_id, pool in pools.items()},
                must_cross=config.placement.path == "pd",
                store=RedisMemberStore(config.redis.url) if config.redis.url else None,
                quota_store=make_quota_store(config) if config.redis.url else None,
                cluster_key=security.cluster_key,
                read_certificate_ends=self._ends.read,
                public_prompts=self._public_prompts,
                read_prefix_report=self.prefix_feed.report if self.prefix_feed else no_report,
            ),
        )
        self.sessions = made.core.sessions
        self.orchestrator = made.core.orchestrator
        self.service = made.service
        self._mirror = made.mirror
        self._mirror_task: asyncio.Task[None] | None = None
        self._following: IndexTask | None = None
        self._config = config
        self._grpc = GrpcServer(self.service, security, self._certificate)
        self._node_host = node_host
        self._http: RunningHttp | None = None
        self._metrics: RunningHttp | None = None

    async def start(self) -> None:
        """Follow the members, and start both servers."""
        # Child processes before the ports: the first request would wait for them otherwise.
        await self._tokenizer.start()
        await self._public_prompts.start(self._tokenizer)
        await self._bodies.start()
        self.sessions.follow()
        self.service.start()
        if self._mirror is not None:
            self._mirror_task = asyncio.get_running_loop().create_task(self._mirror.run())
        if self.prefix_feed is not None:
            self._following = IndexTask(self.prefix_feed)
        connections = self._make_connection_table()
        await self._grpc.start()
        created = int(time.time())  # noqa: TID251 - OpenAI's `created` is wall-clock
        production = self._config.security.production
        app = make_app(self.service, created, self._bodies, is_production=production)
        self._http = self._serve(app, shared_socket(self._config.router), connections)
        self._metrics = self._serve(
            make_metrics_app(self.service),
            metrics_socket(self._config.router),
            ConnectionTable(MAX_SCRAPERS, MAX_SCRAPERS, NUM_RESERVED_SCRAPERS),
        )
        self.service.status.routers.listens(self.entry)
        self._ends.watch()
        events.ROUTER_LISTENS.log(
            http_port=self.http_port,
            grpc_port=self.grpc_port,
            metrics_port=self.entry.metrics_port,
        )

    def _serve(
        self, app: ASGIApp, listener: socket.socket, connections: ConnectionTable
    ) -> RunningHttp:
        return RunningHttp(
            app,
            listener,
            connections,
            self._config.router,
            self._config.security,
            self._certificate,
            self.service.recorder.connection_refused,
        )

    def _make_connection_table(self) -> ConnectionTable:
        """Make the table of HTTP connections; limit both servers to this process's descriptors."""
        router = self._config.router
        at_once = min(router.max_connections, router.max_running + router.max_queued)
        limit = raise_descriptor_limit(at_once * 4 // 3 + INSIDE_DESCRIPTORS + NUM_RESERVED)
        self._grpc.max_connections = grpc_share(limit)
        return make_connection_table(
            router.max_connections, router.max_connections_per_address, limit
        )

    @property
    def http_port(self) -> int:
        """Port of the HTTP server; 0 before it is started."""
        return 0 if self._http is None else self._http.port

    @property
    def entry(self) -> RouterEntry:
        """Where it listens."""
        host = bare_host(self._config.router.host)
        return RouterEntry(
            router_id=self.sessions.router_id,
            pid=os.getpid(),
            host=self._node_host if is_any(host) else host,
            http_port=self.http_port,
            grpc_port=self.grpc_port,
            metrics_port=0 if self._metrics is None else self._metrics.port,
        )

    @property
    def grpc_port(self) -> int:
        """Port of the gRPC server."""
        return self._grpc.port

    async def stop(self) -> None:
        """Refuse new requests, let running ones finish, close servers and sessions."""
        # From the clients inwards: requests end first, then what they run on.
        self._ends.close()
        await self.service.stop(STOP_GRACE_S)
        await self._grpc.stop(STOP_GRACE_S)
        for server in (self._http, self._metrics):
            if server is not None:
                await server.stop()
        if self._mirror_task is not None:
            self._mirror_task.cancel()
            await asyncio.gather(self._mirror_task, return_exceptions=True)
        if self._following is not None:
            await self._following.stop()
        await self.sessions.close()
        await self._network.close()
        await self._bodies.stop()
        await self._tokenizer.stop()
        self._tracing.close()
