"""The cluster as this router sees it: readiness, workers, KV routes, load.

Owns the answers to operators' questions. Does not know HTTP, nor what any request says.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from core.errors import Overloaded
from core.session import Role, RouteReport, WorkerDescriptor
from router.admission import Admission
from router.observe.canary import Canary
from router.observe.readiness import PROBLEMS, View, num_usable, pools_of, state_of
from router.workers.session import SessionState, WorkerSession
from router.workers.sessions import WorkerSessions


class ClusterStatus:
    """What `baton status`, `/ready`, `/load` and the gauges show."""

    def __init__(
        self, model_name: str, sessions: WorkerSessions, admission: Admission, canary: Canary
    ) -> None:
        """Show `sessions` and `admission`; `canary` decides whether the router is ready."""
        self.configured: Mapping[Role, int] = {}
        """Workers that each pool should have."""
        self.read_store_state: Callable[[], str] = lambda: "off"
        self.read_certificate_ends: Callable[[], dict[str, int]] = dict
        self._model_name = model_name
        self._sessions = sessions
        self._admission = admission
        self._canary = canary
        self._measuring = asyncio.Lock()

    # --- readiness --------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """True when a request can get through."""
        return self._canary.is_good and not self._admission.is_draining

    def on_checked(self, callback: Callable[[bool], Awaitable[None]]) -> None:
        """Call back after every canary: is the router ready?"""
        self._canary.on_checked = callback

    def readiness(self) -> dict[str, Any]:
        """Describe readiness per model, and every difference from the config."""
        view = self._view()
        problems = view.problems()
        canary_ms = None if self._canary.took_s is None else round(self._canary.took_s * 1000, 3)
        return {
            "ready": self.is_ready,
            "state": state_of(problems, is_ready=self.is_ready),
            "problems": [problem.tree() for problem in problems],
            "store": view.store,
            "models": {
                self._model_name: {
                    **pools_of(view.sessions, self.configured),
                    "canary_ms": canary_ms,
                    "canary_error": self._canary.error,
                }
            },
        }

    def _view(self) -> View:
        return View(
            sessions=self._sessions.all(),
            configured=self.configured,
            store=self.read_store_state(),
            is_draining=self._admission.is_draining,
            is_starting=not self._canary.has_passed,
            canary_error=self._canary.error,
        )

    # --- gauges -----------------------------------------------------------------------------------

    def live_by_role(self) -> dict[str, int]:
        """Count usable workers by role."""
        sessions = self._sessions.all()
        return {role.value: num_usable(sessions, role) for role in Role}

    def num_by_problem(self) -> dict[str, int]:
        """Count problems by code, zeros included."""
        found = Counter(problem.code for problem in self._view().problems())
        return {code: found[code] for code in PROBLEMS}

    def certificate_ends(self) -> dict[str, int]:
        """Return the end of each certificate (Unix seconds) by its name."""
        return self.read_certificate_ends()

    # --- workers and routes -----------------------------------------------------------------------

    def replicas(self) -> list[dict[str, Any]]:
        """Describe every worker, for `baton status`."""
        return [_replica(session) for session in self._sessions.all()]

    def routes(self) -> list[dict[str, Any]]:
        """Describe every KV route between workers, as last connected or measured."""
        senders = {x.descriptor.transfer_address: x.descriptor for x in self._sessions.all()}
        return [
            _route(senders[address], session.descriptor, route)
            for session in self._sessions.all()
            for address, route in session.routes.reports.items()
            if address in senders
        ]

    async def measure_routes(self, mib: int) -> list[dict[str, Any]]:
        """Move `mib` MiB over every KV route and describe it.

        Raises:
            Overloaded: Another caller is measuring: two at once would measure one another, and load
                the workers twice.
        """
        if self._measuring.locked():
            raise Overloaded("another caller is measuring the routes; try again in some seconds", 5)
        async with self._measuring:
            return [_route(*found) for found in await self._sessions.measure(mib << 20)]

    def load(self) -> dict[str, Any]:
        """Describe the load of the router and of each pool."""
        pools: dict[str, dict[str, int]] = {
            role.value: {
                "replicas": 0,
                "running": 0,
                "waiting": 0,
                "waiting_tokens": 0,
                "free_blocks": 0,
            }
            for role in Role
        }
        for session in self._sessions.all():
            pool = pools[session.descriptor.role.value]
            pool["replicas"] += session.state is SessionState.LIVE
            pool["running"] += session.load.num_running
            pool["waiting"] += session.load.num_waiting
            pool["waiting_tokens"] += session.load.waiting_tokens
            pool["free_blocks"] += session.load.free_blocks + session.load.cached_blocks
        running = self._admission.num_running
        queued = self._admission.num_queued
        return {
            "server_load": running + queued,
            "running": running,
            "queued": queued,
            "pools": pools,
        }


def _replica(session: WorkerSession) -> dict[str, Any]:
    d = session.descriptor
    load = session.load
    return {
        "role": d.role.value,
        "tier": d.tier,
        "worker_id": d.worker_id,
        "pid": d.pid,
        "rank_pids": list(session.rank_pids),
        "node": d.node,
        # Before the `@` stands the listener's nonce, which only diallers need.
        "address": d.session_address.rpartition("@")[2],
        "state": session.state.name.lower() if session.is_ready else "restarting",
        "load": {
            "running": load.num_running,
            "waiting": load.num_waiting,
            "waiting_tokens": load.waiting_tokens,
            "free_blocks": load.free_blocks,
            "cached_blocks": load.cached_blocks,
            "total_blocks": d.num_blocks,
        },
    }


def _route(
    sender: WorkerDescriptor, receiver: WorkerDescriptor, route: RouteReport
) -> dict[str, Any]:
    return {
        "prefill": sender.worker_id,
        "decode": receiver.worker_id,
        "transport": route.transport,
        "round_trip_ms": round(route.round_trip_s * 1000, 3),
        "gb_per_s": round(route.gb_per_s, 3) or None,
        "error": route.error or None,
    }
