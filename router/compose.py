"""What carries requests inside a router, put together.

Owns the wiring of sessions, admission and orchestrator; the same in production, simulation and
tests. Does not know doors, texts or processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.config import PlacementConfig, RouterConfig
from core.ids import Ids
from core.ports import Clock, Membership, Network
from core.trace import NoTracing, Tracing
from router.admission import Admission
from router.attempts import Attempts
from router.choice_output import NewDecoder
from router.orchestrator import Orchestrator
from router.prompt_prefixes import HeldBlocks, PromptPrefixes
from router.workers.sessions import WorkerSessions


@dataclass(frozen=True, slots=True)
class RouterComponents:
    """What a router is made of, chosen by the composition root."""

    membership: Membership
    session_network: Network
    config: RouterConfig
    placement: PlacementConfig
    clock: Clock
    ids: Ids
    new_decoder: NewDecoder
    tracing: Tracing = field(default_factory=NoTracing)
    view: HeldBlocks | None = None
    """Which worker holds which blocks; None: placement does not ask."""
    hash_key: bytes = b""
    """Of the cluster, as in `root_hash`."""


@dataclass(frozen=True, slots=True)
class RouterCore:
    """A router without doors."""

    sessions: WorkerSessions
    admission: Admission
    orchestrator: Orchestrator


def compose(components: RouterComponents) -> RouterCore:
    """Put a router's core together; it follows the members once `sessions.follow` is called."""
    config = components.config
    sessions = WorkerSessions(
        components.membership,
        components.session_network,
        components.ids.router(),
        components.clock,
    )
    admission = Admission(
        config.max_running, config.max_queued, config.queue_wait_s, config.max_queued_tokens
    )
    prefixes = PromptPrefixes(components.view, components.hash_key, components.clock)
    attempts = Attempts(
        sessions, config, components.placement, components.clock, components.ids, prefixes
    )
    orchestrator = Orchestrator(
        attempts,
        admission,
        config,
        components.placement,
        components.clock,
        components.ids,
        components.new_decoder,
        components.tracing,
    )
    return RouterCore(sessions, admission, orchestrator)
