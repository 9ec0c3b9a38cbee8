"""A simulated router on a node of its own.

Owns its composition from the product's components, its clients' connections and its life. Does not
know workers or faults.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from core.types import GenerateRequest, Path, RequestEvent, TextDelta
from prefix_index.feed import PrefixFeed
from prefix_index.mirror import MembershipMirror
from prefix_index.view import PrefixView
from router.charging import Charging
from router.compose import RouterComponents, compose_charging
from router.compose import compose as compose_router
from router.orchestrator import Orchestrator
from router.request_state import Emit
from router.request_stream import OnEnded, RequestStream
from router.tiers import Tiers
from router.turns import Turns
from simulation.network import SimNetwork, on_node
from simulation.ports import InlineDecoder, NodeClock
from simulation.shape import CLUSTER_KEY, HASH_KEY
from simulation.traps import Place, Traps
from simulation.world import World

MAX_UPTIME_S = 100_000.0
"""Machines' clocks began so long apart at most."""


class SimRouter:
    """One router on its node, and the clients that are connected to it."""

    def __init__(self, name: str, world: World) -> None:
        """Compose it as in production; `start` lets it follow the members."""
        self.name = name
        self.is_alive = True
        self.context = on_node(name)
        self.view = PrefixView()
        self.feed = PrefixFeed(
            world.prefix_store,
            self.view,
            lambda: [(m.worker_id, m.incarnation) for m in world.membership.members()],
            world.codec,
            world.clock,
        )
        self._clients: dict[asyncio.Event, None] = {}
        components = RouterComponents(
            membership=world.membership,
            session_network=SimNetwork(world.hub, name, "session"),
            config=world.shape.router,
            placement=world.shape.placement,
            clock=world.clock,
            ids=world.ids,
            new_decoder=lambda request: _TrappedDecoder(world.traps, request.request_id),
            view=self.view,
            hash_key=HASH_KEY,
            tiers=Tiers(world.shape.tiers),
        )
        core = compose_router(components, world.observers)
        self.clock = NodeClock(world.quota_rng.uniform(0.0, MAX_UPTIME_S))
        """What its quotas count by; deadlines come from clients, by the world's."""
        self.local_charges: dict[asyncio.Task[Any], None] = {}
        """Tasks whose charge was decided without the store."""
        self.charging = self._charging(components, world)
        self.sessions = core.sessions
        self.admission = core.admission
        self.attempts = core.attempts
        self.orchestrator = core.orchestrator
        self.turns = Turns()
        _trap_emit(self.orchestrator, world.traps)
        self.mirror = MembershipMirror(
            world.store,
            lambda: [
                {"worker_id": session.descriptor.worker_id} for session in self.sessions.all()
            ],
        )
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Follow the members and mirror them, and follow what workers cache."""
        self.context.run(self.sessions.follow)
        self.context.run(self.charging.start)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(endless, context=self.context.copy())
            for endless in (self.mirror.run(), self.feed.run())
        ]

    def open(
        self,
        request: GenerateRequest,
        wake: asyncio.Event,
        on_ended: OnEnded = lambda _: None,
    ) -> RequestStream:
        """Start a request as the router's servers do; `wake` is also set when the router dies."""
        self.connected(wake)
        context = self.context.copy()
        return context.run(RequestStream, self.orchestrator, request, self.turns, wake, on_ended)

    def connected(self, wake: asyncio.Event) -> None:
        """Set `wake` if the router dies."""
        self._clients[wake] = None

    def closed(self, wake: asyncio.Event) -> None:
        """Forget a client that has its end, or is gone."""
        self._clients.pop(wake, None)

    def died(self) -> None:
        """Close the connections of its clients, as the kernel does."""
        self.is_alive = False
        for wake in self._clients:
            wake.set()

    async def stop(self) -> None:
        """End in good order."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.charging.stop()
        await self.sessions.close()

    def _charging(self, components: RouterComponents, world: World) -> Charging:
        def decided_locally() -> None:
            task = asyncio.current_task()
            if task is not None:
                self.local_charges[task] = None

        store = world.quota_store if world.shape.has_quota_store else None
        own = replace(components, clock=self.clock, ids=world.quota_ids)
        return compose_charging(own, store, CLUSTER_KEY, decided_locally)


class _TrappedDecoder:
    def __init__(self, traps: Traps, request_id: str) -> None:
        self._inner = InlineDecoder()
        self._traps = traps
        self._request_id = request_id

    def push(self, token_id: int) -> str:
        self._traps.step(Place.DECODER, self._request_id, self._request_id)
        return self._inner.push(token_id)

    def flush(self) -> str:
        return self._inner.flush()


def _trap_emit(orchestrator: Orchestrator, traps: Traps) -> None:
    """Let the consumer of an orchestrator's events raise on a token."""
    run = orchestrator.run

    async def trapped(
        request: GenerateRequest, emit: Emit, forced_path: Path | None = None
    ) -> None:
        def passing(event: RequestEvent) -> None:
            if isinstance(event, TextDelta):
                traps.step(Place.EMIT, request.request_id, request.request_id)
            emit(event)

        await run(request, passing, forced_path)

    orchestrator.run = trapped  # type: ignore[method-assign]
