"""A router put together from its parts: alone, and with the service that its servers share.

Owns the wiring; the same in production, simulation and tests. Does not know HTTP, gRPC or
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from core import metrics
from core.config import PlacementConfig, RouterConfig
from core.ids import Ids
from core.ports import Clock, Membership, MemberStore, Network, QuotaStore, Tokenizer
from core.session import PoolId, Role
from core.tenant_classes import TenantClasses
from core.trace import NoTracing, Tracing
from prefix_index.mirror import MembershipMirror
from router.access.credentials import Keyring
from router.admission import Admission
from router.attempts import Attempts
from router.charging import Charging
from router.choice_output import NewDecoder
from router.load_shedding import LoadShedding
from router.observe.canary import Canary
from router.observe.explanations import Explanations
from router.observe.prefix_report import ReadReport, gauges_of, no_report
from router.observe.prompt_report import PromptReport
from router.observe.readiness import Proof
from router.observe.recorder import Recorder
from router.observe.request_log import RequestLog
from router.observe.routers import RouterList
from router.observe.shedding_log import SheddingLog
from router.observe.status import ClusterStatus, replica
from router.observe.storage_gauges import storage_gauges
from router.observe.telemetry import Telemetry
from router.observe.worker_gauges import worker_gauges
from router.orchestrator import Orchestrator
from router.peer_fetches import PeerFetches
from router.placer import Placer
from router.pool_choice import PoolChoice
from router.prompt_prefixes import PromptPrefixes, PublishedBlocks
from router.public_prompts import PublicPrompts
from router.quotas.quotas import Quotas
from router.quotas.values import ValueCodec
from router.request_builder import RequestBuilder
from router.request_params import ServedModel
from router.request_state import RequestObserver
from router.service import GenerationService
from router.text.detokenizing import TextModel
from router.tiers import Tiers
from router.workers.sessions import WorkerSessions


@dataclass(frozen=True, slots=True)
class RouterComponents:
    """What carries requests inside a router is made of these."""

    membership: Membership
    session_network: Network
    config: RouterConfig
    placement: PlacementConfig
    clock: Clock
    ids: Ids
    new_decoder: NewDecoder
    tracing: Tracing = field(default_factory=NoTracing)
    view: PublishedBlocks | None = None
    """Which worker has published which blocks; None: placement does not ask."""
    hash_key: bytes = b""
    """Of the cluster, as in `root_hash`."""
    tiers: Tiers = field(default_factory=Tiers)


@dataclass(frozen=True, slots=True)
class ServiceComponents:
    """What the service in front of it is made of."""

    model: ServedModel
    tokenizer: Tokenizer
    text: TextModel
    seed_key: bytes
    keyring: Keyring
    expected_roles: frozenset[Role]
    """Pools that must have a worker before the router is ready for the first time."""
    configured: Mapping[PoolId, int] = field(default_factory=dict)
    """Workers that each pool should have."""
    prices_per_hour: Mapping[PoolId, float] = field(default_factory=dict)
    """What a worker of each pool costs."""
    must_cross: bool = False
    """Path pd is forced: the router is ready only while every expected pool has a worker."""
    store: MemberStore | None = None
    """Where the members are mirrored."""
    read_certificate_ends: Callable[[], dict[str, int]] = dict
    """End of each certificate (Unix seconds) by its name."""
    quota_store: QuotaStore | None = None
    """Where routers compare what keys have used; None: each counts its own."""
    cluster_key: str = ""
    """Secret that the cluster's processes share."""
    public_prompts: PublicPrompts = field(default_factory=PublicPrompts)
    """Beginnings of prompts that all tenants share."""
    tenant_classes: TenantClasses = field(default_factory=TenantClasses)
    """As what keys count in metrics."""
    read_prefix_report: ReadReport = no_report
    """How the router's view of cached blocks is kept."""


@dataclass(frozen=True, slots=True)
class RouterCore:
    """A router without servers."""

    sessions: WorkerSessions
    admission: Admission
    attempts: Attempts
    orchestrator: Orchestrator


@dataclass(frozen=True, slots=True)
class Router:
    """A router, ready for its servers."""

    core: RouterCore
    service: GenerationService
    mirror: MembershipMirror | None


def compose(components: RouterComponents, observer: RequestObserver | None = None) -> RouterCore:
    """Put a router's core together; it follows the members once `sessions.follow` is called."""
    sessions = _sessions(components)
    pools = PoolChoice(components.tiers.by_name)
    admission = _admission(components, sessions, pools)
    prefixes = _prefixes(components)
    fetches = _fetches(components, sessions)
    placer = Placer(sessions.candidates, pools, prefixes, fetches, components.clock)
    return _core(
        components, sessions, admission, prefixes, fetches, placer, observer or RequestObserver()
    )


def compose_service(components: RouterComponents, parts: ServiceComponents) -> Router:
    """Put a router and its service together; `service.start` begins what runs without calls.

    The order is that of need: requests are noted in the metrics, which show the status of workers.
    """
    config = components.config
    clock = components.clock
    sessions = _sessions(components)
    pools = PoolChoice(components.tiers.by_name)
    admission = _admission(components, sessions, pools)
    mirror = (
        MembershipMirror(parts.store, lambda: [replica(view) for view in sessions.views()])
        if parts.store is not None
        else None
    )
    routers = RouterList(config.replicas)
    proof = Proof(sessions.live_roles, parts.expected_roles, must_cross=parts.must_cross)
    status = ClusterStatus(
        parts.model.name,
        sessions,
        admission,
        proof,
        parts.configured,
        lambda: "off" if mirror is None else mirror.state,
        routers,
    )
    telemetry = Telemetry(
        {
            metrics.RUNNING: admission.running_by_tier,
            metrics.QUEUED: admission.queued_by_tier,
            metrics.REFUSED: lambda: admission.num_refused,
            metrics.OVERFLOWED: lambda: admission.num_overflowed,
            metrics.SLO_OBJECTIVE: lambda: {
                name: tier.slo_objective for name, tier in components.tiers.by_name.items()
            },
            metrics.WORKERS: lambda: _labelled(status.live_by_pool()),
            metrics.POOL_PRICE: lambda: _labelled(
                {
                    pool: num_live * parts.prices_per_hour.get(pool, 0.0)
                    for pool, num_live in status.live_by_pool().items()
                }
            ),
            metrics.API_KEYS: parts.keyring.num_by_state,
            metrics.CERTIFICATE_ENDS: parts.read_certificate_ends,
            metrics.PROBLEMS: status.num_by_problem,
            metrics.ROUTERS: routers.num_by_state,
            **gauges_of(parts.read_prefix_report),
            **worker_gauges(sessions.views),
            **storage_gauges(sessions.views),
        },
        components.tiers.by_name,
        parts.tenant_classes,
    )
    log = RequestLog(clock.now_s) if config.log_requests else None
    explanations = Explanations(
        config.max_explained, sessions.router_id, config.replicas, clock.now_s
    )
    recorder = Recorder(telemetry, SheddingLog(admission, clock.now_s), explanations, log)
    prefixes = _prefixes(components)
    fetches = _fetches(components, sessions)
    placer = Placer(sessions.candidates, pools, prefixes, fetches, clock)
    core = _core(components, sessions, admission, prefixes, fetches, placer, recorder)
    service = GenerationService(
        model=parts.model,
        config=config,
        runner=core.orchestrator,
        admission=admission,
        builder=RequestBuilder(
            parts.model,
            config,
            parts.tokenizer,
            clock,
            components.ids,
            parts.seed_key,
            lambda tier: [c.descriptor for c in pools.usable(tier, sessions.candidates())],
            parts.text,
            parts.public_prompts,
            components.tiers,
        ),
        tokenizer=parts.tokenizer,
        text=parts.text,
        canary=Canary(
            parts.model, config, core.orchestrator, sessions, clock, components.ids, proof
        ),
        status=status,
        telemetry=telemetry,
        recorder=recorder,
        keyring=parts.keyring,
        read_prefix_report=parts.read_prefix_report,
        explanations=explanations,
        prompt_report=PromptReport(prefixes, placer, sessions.candidates, components.placement),
        charging=compose_charging(
            components, parts.quota_store, parts.cluster_key, telemetry.quota_decided_locally
        ),
        clock=clock,
    )
    return Router(core, service, mirror)


def compose_charging(
    components: RouterComponents,
    store: QuotaStore | None,
    cluster_key: str,
    on_local_decision: Callable[[], None],
) -> Charging:
    """Put together what charges a router's replies; its `start` begins to share counts."""
    quotas = Quotas(
        components.ids.router(),
        components.config.replicas,
        store,
        ValueCodec(cluster_key),
        components.clock,
        on_local_decision,
    )
    return Charging(quotas, components.tiers)


def _labelled(by_pool: Mapping[PoolId, float]) -> dict[tuple[str, ...], float]:
    """Return the figures of pools under their labels; an empty tier is no label."""
    return {(pool.role.value, pool.tier): figure for pool, figure in by_pool.items()}


def _sessions(components: RouterComponents) -> WorkerSessions:
    return WorkerSessions(
        components.membership,
        components.session_network,
        components.ids.router(),
        components.clock,
    )


def _admission(
    components: RouterComponents, sessions: WorkerSessions, pools: PoolChoice
) -> Admission:
    config = components.config
    return Admission(
        config.max_running,
        config.max_queued,
        config.queue_wait_s,
        config.max_queued_tokens,
        components.tiers.by_name,
        LoadShedding(
            components.clock,
            components.ids,
            components.tiers.by_name,
            config.queue_wait_s,
            components.placement,
            lambda tier: pools.usable(tier, sessions.candidates()),
        ),
    )


def _fetches(components: RouterComponents, sessions: WorkerSessions) -> PeerFetches:
    return PeerFetches(sessions, components.ids, components.clock)


def _prefixes(components: RouterComponents) -> PromptPrefixes:
    return PromptPrefixes(components.view, components.hash_key, components.clock)


def _core(
    components: RouterComponents,
    sessions: WorkerSessions,
    admission: Admission,
    prefixes: PromptPrefixes,
    fetches: PeerFetches,
    placer: Placer,
    observer: RequestObserver,
) -> RouterCore:
    config = components.config
    attempts = Attempts(
        sessions,
        config,
        components.clock,
        components.ids,
        prefixes,
        fetches,
        placer,
        observer,
    )
    orchestrator = Orchestrator(
        attempts=attempts,
        admission=admission,
        config=config,
        placement=components.placement,
        clock=components.clock,
        ids=components.ids,
        new_decoder=components.new_decoder,
        tracing=components.tracing,
        observer=observer,
    )
    return RouterCore(sessions, admission, attempts, orchestrator)
